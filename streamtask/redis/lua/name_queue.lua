-- Records the name of a kombu queue that is used, and answers of which epoch it is.
-- KEYS[1] queues  set of the queues' names
-- KEYS[2] epochs  hash queue -> epoch, and '' -> how many were deleted
-- ARGV[1] queue
-- ARGV[2] epoch that its streams are of: where that is a later one, a failover has lost it here
-- Returns: its epoch
--- @include epoch
local epoch = epoch_of(KEYS[1], KEYS[2], ARGV[1])
if tonumber(epoch) < tonumber(ARGV[2]) then
  epoch = ARGV[2]
  redis.call('SREM', KEYS[1], '')
  redis.call('HSET', KEYS[2], ARGV[1], epoch)
  if tonumber(redis.call('HGET', KEYS[2], '') or '0') < tonumber(epoch) then
    redis.call('HSET', KEYS[2], '', epoch)
  end
end
return epoch
