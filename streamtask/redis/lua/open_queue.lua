-- Records a queue of the kombu transport: its epoch, and, once they are used, its shards and its streams of further
-- priorities. Repeating it changes nothing.
-- KEYS[1] meta     hash
-- ARGV[1] number of shards to record where none is, or ''
-- ARGV[2] group of the consumers
-- ARGV[3...] further priorities to record
-- Returns: {epoch, shards or '', priority ...}
-- A write that Redis allows above maxmemory lets the next ones through: who consumes must be able to begin.
redis.call('HDEL', KEYS[1], '')
if redis.call('HEXISTS', KEYS[1], 'epoch') == 0 then
  redis.call('HSET', KEYS[1], 'epoch', 0)
end
if ARGV[1] ~= '' and redis.call('HEXISTS', KEYS[1], 'shards') == 0 then
  redis.call('HSET', KEYS[1], 'shards', ARGV[1])
end
if redis.call('HEXISTS', KEYS[1], 'group:' .. ARGV[2]) == 0 then
  redis.call('HSET', KEYS[1], 'group:' .. ARGV[2], 1)
end
for i = 3, #ARGV do
  if redis.call('HEXISTS', KEYS[1], 'priority:' .. ARGV[i]) == 0 then
    redis.call('HSET', KEYS[1], 'priority:' .. ARGV[i], 1)
  end
end
local reply = { redis.call('HGET', KEYS[1], 'epoch'), redis.call('HGET', KEYS[1], 'shards') or '' }
local fields = redis.call('HKEYS', KEYS[1])
for i = 1, #fields do
  if fields[i]:sub(1, 9) == 'priority:' then
    reply[#reply + 1] = fields[i]:sub(10)
  end
end
return reply
