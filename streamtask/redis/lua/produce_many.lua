-- Appends messages to a shard, in order, unless this call stored them before; delayed ones that are due go first.
-- KEYS[1] state    hash
-- KEYS[2] seen     page of a producer's call numbers: a hash, how many messages each has stored
-- KEYS[3] stream   stream
-- KEYS[4] delayed  sorted set
-- ARGV[1] epoch
-- ARGV[2] number of the call in its page
-- ARGV[3] how long the call may be repeated, ms
-- ARGV[4] max_backlog, 0 for none
-- ARGV[5...] field, envelope of each message
-- Returns: how many of the first messages are stored, or a code where none is. Fewer than all: the shard is full.
-- {STORED_ALREADY, how many}: an earlier call of this id has stored them.
--- @include codes
--- @include admit
--- @include now
--- @include delayed
--- @include overdue
local count = (#ARGV - 4) / 2
local max_backlog = tonumber(ARGV[4])
local stored = redis.call('HGET', KEYS[2], ARGV[2])
if stored then
  return { STORED_ALREADY, tonumber(stored) }
end
local admitted, due, room = admit(KEYS[1], KEYS[3], KEYS[4], ARGV[1], max_backlog)
if admitted ~= 1 then
  return admitted
end
if move_overdue(KEYS[1], KEYS[3], KEYS[4], due) then
  return MORE_DUE
end
if room then
  count = math.min(count, room)
end
redis.call('HSET', KEYS[2], ARGV[2], count)
redis.call('PEXPIRE', KEYS[2], ARGV[3])
for i = 5, 4 + 2 * count, 2 do
  redis.call('XADD', KEYS[3], '*', ARGV[i], ARGV[i + 1])
end
return count
