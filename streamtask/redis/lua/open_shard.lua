-- Makes a shard's state, unless it is there: open for messages of its epoch, with the groups registered so far.
-- KEYS[1] state    hash
-- KEYS[2] stream   stream
-- ARGV[1] epoch
-- ARGV[2...] names of the groups
-- Returns: 1 if the state is new, else 0
-- A write that Redis allows above maxmemory lets the next ones through: who consumes must be able to begin.
redis.call('HDEL', KEYS[1], '')
local fresh = redis.call('EXISTS', KEYS[1]) == 0
if fresh then
  redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'open', ARGV[1])
end
local there = {}
if redis.call('EXISTS', KEYS[2]) == 1 then
  local groups = redis.call('XINFO', 'GROUPS', KEYS[2])
  for i = 1, #groups do
    for j = 1, #groups[i], 2 do
      if groups[i][j] == 'name' then
        there[groups[i][j + 1]] = true
      end
    end
  end
end
for i = 2, #ARGV do
  if not there[ARGV[i]] then
    local made = redis.pcall('XGROUP', 'CREATE', KEYS[2], ARGV[i], '0', 'MKSTREAM')
    if type(made) == 'table' and made.err and made.err:sub(1, 9) ~= 'BUSYGROUP' then
      return made
    end
  end
  if redis.call('HEXISTS', KEYS[1], 'group:' .. ARGV[i]) == 0 then
    redis.call('HSET', KEYS[1], 'group:' .. ARGV[i], 1)
  end
end
if fresh then
  return 1
end
return 0
