-- Makes a shard's state, unless it is there: open for messages of its epoch, with the groups registered so far.
-- KEYS[1] state    hash
-- KEYS[2] stream   stream
-- ARGV[1] epoch
-- ARGV[2...] names of the groups
-- Returns: 1 if the state is new, else 0
local fresh = redis.call('EXISTS', KEYS[1]) == 0
if fresh then
  redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'open', ARGV[1])
end
for i = 2, #ARGV do
  local made = redis.pcall('XGROUP', 'CREATE', KEYS[2], ARGV[i], '0', 'MKSTREAM')
  if type(made) == 'table' and made.err and made.err:sub(1, 9) ~= 'BUSYGROUP' then
    return made
  end
  redis.call('HSET', KEYS[1], 'group:' .. ARGV[i], 1)
end
if fresh then
  return 1
end
return 0
