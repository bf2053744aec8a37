-- Puts off the end of queues of the kombu transport that expire unless they are used. Queues that are not declared so, or
-- are deleted, stay as they are.
-- KEYS[1] expiring  sorted set queue -> when it expires (ms)
-- ARGV[1...] how long from now (ms), queue; of each
-- Returns: how many were put off
--- @include now
-- A write that Redis allows above maxmemory lets the next ones through: queues in use must not expire there.
redis.call('ZREM', KEYS[1], '')
local now = now_ms()
local count = 0
for i = 1, #ARGV, 2 do
  count = count + redis.call('ZADD', KEYS[1], 'XX', 'CH', now + tonumber(ARGV[i]), ARGV[i + 1])
end
return count
