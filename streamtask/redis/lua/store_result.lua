-- Stores a task's result and tells whoever waits for it, unless another message with this id has ended before.
-- KEYS[1] result   string; its name is the channel too
-- ARGV[1] payload, msgpack: a map whose last pair says of which message this is the result
-- ARGV[2] time to live, ms
-- ARGV[3] that last pair: a payload that ends with it is this message's own
-- Returns: how many were told, or -1 where another's result stays
local mine = ARGV[3]
local there = redis.pcall('GET', KEYS[1])
if type(there) == 'string' and there:sub(-#mine) ~= mine then
  return -1
end
-- A write that Redis allows above maxmemory lets the next ones through: a full Redis must be drained.
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return redis.call('PUBLISH', KEYS[1], '1')
