-- Lifts a stream's last id to the highest that its owner was given, where Redis has lost that it gave it: a new entry must not
-- get the id of one that is still held.
-- KEYS[1] lease    hash
-- KEYS[2] stream   stream
-- ARGV[1] token
-- ARGV[2] incarnation
-- ARGV[3] the highest id that the caller was given
-- Returns: 1 if the stream's last id was lower, 0 if not or without a stream, or LEASE_LOST
--- @include codes
--- @include fence
--- @include ids
if not owns(KEYS[1], ARGV[1], ARGV[2]) then
  return LEASE_LOST
end
if redis.call('EXISTS', KEYS[2]) == 0 then
  return 0
end
local info = redis.call('XINFO', 'STREAM', KEYS[2])
for i = 1, #info, 2 do
  if info[i] == 'last-generated-id' and id_le(ARGV[3], info[i + 1]) then
    return 0
  end
end
-- A write that Redis allows above maxmemory lets the next ones through: a full Redis must be drained.
redis.call('HDEL', KEYS[1], '')
redis.call('XSETID', KEYS[2], ARGV[3])
return 1
