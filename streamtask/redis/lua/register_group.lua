-- Registers a consumer group in the queue's metadata, before any shard has it.
-- KEYS[1] meta     hash
-- ARGV[1] field of the group: group:NAME
-- Returns: 1 if it is new, else 0
-- Looks before it writes: what is there can be used also above maxmemory.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then
  return 0
end
return redis.call('HSET', KEYS[1], ARGV[1], 1)
