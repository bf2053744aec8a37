-- Takes away one binding of a queue, or all of them with the queue's declaration; of very many some, to be called again. A
-- queue that is declared after that is of a later epoch: what is left to be removed of this one is nothing to it.
-- KEYS[1] queues    set of the queues' names
-- KEYS[2] expiring  sorted set queue -> when it expires (ms)
-- KEYS[3] bound     set of the queue's bindings: exchange SEP routing key SEP pattern SEP queue
-- KEYS[4] epochs    hash queue -> epoch, and '' -> how many were deleted
-- ARGV[1] queue
-- ARGV[2] what the keys of the exchanges' bindings begin with (they lie in the same slot)
-- ARGV[3] SEP
-- ARGV[4] 'all', 'expired' (all, but only if its time is over), or one member of the queue's bindings
-- Returns: {how many were deleted so far} where the queue was: all epochs below have ended; 1 if it was a binding, 2 if some of
-- its bindings are left, 0 if the queue has not expired
--- @include now
local sep = ARGV[3]
if ARGV[4] == 'expired' then
  local at = tonumber(redis.call('ZSCORE', KEYS[2], ARGV[1]) or 'inf')
  if at > now_ms() then
    return 0
  end
end
local members = { ARGV[4] }
if ARGV[4] == 'all' or ARGV[4] == 'expired' then
  members = redis.call('SRANDMEMBER', KEYS[3], 1000)
end
for i = 1, #members do
  local at = members[i]:find(sep, 1, true)
  if at then
    redis.call('SREM', ARGV[2] .. members[i]:sub(1, at - 1), members[i]:sub(at + #sep))
    redis.call('SREM', KEYS[3], members[i])
  end
end
if ARGV[4] == 'all' or ARGV[4] == 'expired' then
  if redis.call('EXISTS', KEYS[3]) == 1 then
    return 2
  end
  redis.call('ZREM', KEYS[2], ARGV[1])
  redis.call('DEL', KEYS[3])
  redis.call('SREM', KEYS[1], ARGV[1])
  redis.call('HDEL', KEYS[4], ARGV[1])
  return { redis.call('HINCRBY', KEYS[4], '', 1) }
end
return 1
