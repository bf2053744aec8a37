-- Writes down, for entries that are still pending, what must survive their owner: attempts, due time, crash count.
-- KEYS[1] lease    hash
-- KEYS[2] stream   stream
-- KEYS[3] notes    hash entry id -> "attempt due_ms crashes mark charged held"
-- ARGV[1] token
-- ARGV[2] incarnation
-- ARGV[3] group
-- ARGV[4...] entry id, note
-- Returns: how many were still pending, or LEASE_LOST
--- @include codes
--- @include fence
--- @include pending
if not owns(KEYS[1], ARGV[1], ARGV[2]) then
  return LEASE_LOST
end
local written = 0
for i = 4, #ARGV, 2 do
  if is_pending(KEYS[2], ARGV[3], ARGV[i]) then
    -- HDEL first: a write that Redis allows above maxmemory lets the next one through.
    redis.call('HDEL', KEYS[3], ARGV[i])
    redis.call('HSET', KEYS[3], ARGV[i], ARGV[i + 1])
    written = written + 1
  end
end
return written
