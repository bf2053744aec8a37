-- Registers a consumer group in the queue's metadata, before any shard has it.
-- KEYS[1] meta     hash
-- ARGV[1] field of the group: group:NAME
-- Returns: 1 if it is new, else 0
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then
  return 0
end
-- A write that Redis allows above maxmemory lets the next ones through: the first worker must be able to begin.
redis.call('HDEL', KEYS[1], '')
return redis.call('HSET', KEYS[1], ARGV[1], 1)
