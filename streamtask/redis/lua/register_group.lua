-- Registers a consumer group in the queue's metadata, before any shard has it.
-- KEYS[1] meta     hash
-- ARGV[1] field of the group: group:NAME
-- Returns: 1 if it is new, else 0
return redis.call('HSETNX', KEYS[1], ARGV[1], 1)
