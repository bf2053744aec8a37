-- The epoch of a kombu queue: how many queues of its app had been deleted when it was declared, so that no two that had one
-- name have one epoch. Nothing stands in Redis of one that is 0.
local function epoch_of(queues, epochs, queue)
  local epoch = redis.call('HGET', epochs, queue)
  if epoch or redis.call('SISMEMBER', queues, queue) == 1 then
    return epoch or '0'
  end
  epoch = redis.call('HGET', epochs, '') or '0'
  -- A write that Redis allows above maxmemory lets the next ones through.
  redis.call('SREM', queues, '')
  redis.call('SADD', queues, queue)
  if epoch ~= '0' then
    redis.call('HSET', epochs, queue, epoch)
  end
  return epoch
end
