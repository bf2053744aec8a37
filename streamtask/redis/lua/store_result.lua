-- Stores a task's result and tells whoever waits for it.
-- KEYS[1] result   string; its name is the channel too
-- ARGV[1] payload, msgpack
-- ARGV[2] time to live, ms
-- Returns: how many were told
-- A write that Redis allows above maxmemory lets the next ones through: a full Redis must be drained.
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return redis.call('PUBLISH', KEYS[1], '1')
