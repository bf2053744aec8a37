-- Records a queue of the kombu transport: its epoch, and, once they are used, its shards and its streams of further
-- priorities. Repeating it changes nothing. Where another epoch is recorded nothing is done.
-- KEYS[1] meta     hash
-- ARGV[1] epoch
-- ARGV[2] number of shards to record where none is, or ''
-- ARGV[3] group of the consumers
-- ARGV[4...] further priorities to record
-- Returns: {epoch that is recorded, shards or '', priority ...}
local there = redis.call('HGET', KEYS[1], 'epoch')
if there and there ~= ARGV[1] then
  return { there, '' }
end
-- A write that Redis allows above maxmemory lets the next ones through: who consumes must be able to begin.
redis.call('HDEL', KEYS[1], '')
if not there then
  redis.call('HSET', KEYS[1], 'epoch', ARGV[1])
end
if ARGV[2] ~= '' and redis.call('HEXISTS', KEYS[1], 'shards') == 0 then
  redis.call('HSET', KEYS[1], 'shards', ARGV[2])
end
if redis.call('HEXISTS', KEYS[1], 'group:' .. ARGV[3]) == 0 then
  redis.call('HSET', KEYS[1], 'group:' .. ARGV[3], 1)
end
for i = 4, #ARGV do
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
