-- Records a queue's shard count and epoch at its first use, and answers what is recorded.
-- KEYS[1] meta     hash
-- ARGV[1] shards that the caller is configured with
-- Returns: {shards, epoch}
if redis.call('HEXISTS', KEYS[1], 'shards') == 0 then
  -- A write that Redis allows above maxmemory lets the next ones through: a worker of a queue that nobody has used yet may have
  -- others to drain.
  redis.call('HDEL', KEYS[1], '')
  redis.call('HSET', KEYS[1], 'shards', ARGV[1])
  redis.call('HSETNX', KEYS[1], 'epoch', 0)
end
return redis.call('HMGET', KEYS[1], 'shards', 'epoch')
