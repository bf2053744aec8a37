-- Moves delayed messages that are due into the stream, in the order of their due times and then of their produce calls.
-- KEYS[1] lease    hash
-- KEYS[2] delayed  sorted set
-- KEYS[3] stream   stream
-- KEYS[4] state    hash
-- ARGV[1] token
-- ARGV[2] incarnation
-- ARGV[3] most messages to move
-- Returns: {how many moved, now (ms), when the next is due (ms) or -1}, or LEASE_LOST
--- @include codes
--- @include fence
--- @include now
--- @include delayed
if not owns(KEYS[1], ARGV[1], ARGV[2]) then
  return LEASE_LOST
end
local now = now_ms()
local due = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, tonumber(ARGV[3]))
for i = 1, #due do
  -- ZREM first: Redis allows it above maxmemory, and with it the append.
  redis.call('ZREM', KEYS[2], due[i])
  redis.call('XADD', KEYS[3], '*', due[i]:sub(17, 17), due[i]:sub(18))
end
return { #due, now, note_due(KEYS[4], KEYS[2]) }
