-- Records a queue's shard count and epoch at its first use, and answers what is recorded.
-- KEYS[1] meta     hash
-- ARGV[1] shards that the caller is configured with
-- Returns: {shards, epoch}
if redis.call('HSETNX', KEYS[1], 'shards', ARGV[1]) == 1 then
  redis.call('HSETNX', KEYS[1], 'epoch', 0)
end
return redis.call('HMGET', KEYS[1], 'shards', 'epoch')
