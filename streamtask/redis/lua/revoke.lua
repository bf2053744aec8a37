-- Revokes a task id of a queue, forgets those that were revoked long ago, and tells the queue's processes.
-- KEYS[1] revoked  sorted set task id -> until when it is revoked (ms)
-- ARGV[1] task id
-- ARGV[2] for how long, ms
-- ARGV[3] channel of the queue's events
-- Returns: 1 if it was not revoked before, else 0
--- @include now
local now = now_ms()
local new = redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
-- Each call adds one and forgets more: what is over does not grow.
local over = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, 200)
if over[1] then
  redis.call('ZREM', KEYS[1], unpack(over))
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
-- It makes things faster: whoever does not hear it finds the id by looking.
redis.call('PUBLISH', ARGV[3], 'revoked')
return new
