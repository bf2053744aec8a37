-- Moves delayed messages that are due into the stream, in the order of their due times and then of their produce calls.
local function move_due(delayed, stream, now, most)
  local due = redis.call('ZRANGEBYSCORE', delayed, '-inf', now, 'LIMIT', 0, most)
  for i = 1, #due do
    -- ZREM first: Redis allows it above maxmemory, and with it the append.
    redis.call('ZREM', delayed, due[i])
    redis.call('XADD', stream, '*', due[i]:sub(17, 17), due[i]:sub(18))
  end
end
