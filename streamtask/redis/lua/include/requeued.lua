-- Puts an entry on offer, in its place. A double holds the milliseconds and twelve bits more, for the order within one.
local function requeue(requeued, id)
  local ms, seq = id:match('^(%d+)-(%d+)$')
  redis.call('ZADD', requeued, string.format('%.12f', tonumber(ms) + math.min(tonumber(seq), 4095) / 4096), id)
end
