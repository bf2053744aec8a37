-- Records a queue's shard count and epoch at its first use, and answers what is recorded.
-- KEYS[1] meta     hash
-- ARGV[1] shards that the caller is configured with
-- Returns: {shards, epoch}
-- Looks before it writes: what is there can be used also above maxmemory.
if redis.call('HEXISTS', KEYS[1], 'shards') == 0 then
  redis.call('HSET', KEYS[1], 'shards', ARGV[1])
  redis.call('HSETNX', KEYS[1], 'epoch', 0)
end
return redis.call('HMGET', KEYS[1], 'shards', 'epoch')
