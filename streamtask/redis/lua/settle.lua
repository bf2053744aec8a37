-- Finishes messages: acknowledges them and removes their entries. Repeating it changes nothing.
-- KEYS[1] lease    hash
-- KEYS[2] stream   stream
-- KEYS[3] state    hash
-- KEYS[4] notes    hash
-- ARGV[1] token
-- ARGV[2] incarnation
-- ARGV[3] group
-- ARGV[4...] entry ids, ascending
-- Returns: how many were still pending, or LEASE_LOST
--- @include codes
--- @include fence
--- @include slices
--- @include ids
--- @include remove
if not owns(KEYS[1], ARGV[1], ARGV[2]) then
  return LEASE_LOST
end
local ids = { unpack(ARGV, 4) }
-- XACK is the first write: Redis allows it above maxmemory, and with it what follows.
local acked = redis.call('XACK', KEYS[2], ARGV[3], unpack(ids))
if acked == 0 then
  return 0
end
remove_finished(KEYS[2], KEYS[3], ARGV[3], ids, acked)
if redis.call('EXISTS', KEYS[4]) == 1 then
  redis.call('HDEL', KEYS[4], unpack(ids))
end
redis.call('HINCRBY', KEYS[3], 'done:' .. ARGV[3], acked)
return acked
