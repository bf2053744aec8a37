-- Removes what waits in a shard: entries that no group has been given, and delayed messages. What is pending stays with
-- its owner, and so does what only a part of the groups has been given. Repeated until nothing is left to remove; what
-- is appended meanwhile stays.
-- KEYS[1] stream   stream
-- KEYS[2] state    hash
-- KEYS[3] delayed  sorted set
-- ARGV[1] most to remove in this call
-- ARGV[2] last entry id to remove, as the first call answered, or ''
-- ARGV[3] most delayed messages to remove in this call
-- Returns: {entries removed, delayed removed, last entry id to remove}
--- @include slices
--- @include ids
--- @include remove
--- @include delayed
local limit = tonumber(ARGV[1])
local removed, delayed, last = 0, 0, ARGV[2]
if redis.call('EXISTS', KEYS[1]) == 1 then
  if last == '' then
    local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
    last = newest and newest[1] or '0-0'
  end
  local given = '0-0'
  local groups = redis.call('XINFO', 'GROUPS', KEYS[1])
  for i = 1, #groups do
    for j = 1, #groups[i], 2 do
      if groups[i][j] == 'last-delivered-id' and id_le(given, groups[i][j + 1]) then
        given = groups[i][j + 1]
      end
    end
  end
  while removed < limit and not id_le(last, given) do
    -- In slices: a range brings the bodies into Lua's memory.
    local slice = redis.call('XRANGE', KEYS[1], '(' .. given, last, 'COUNT', math.min(100, limit - removed))
    if #slice == 0 then
      break
    end
    local ids = {}
    for i = 1, #slice do
      ids[i] = slice[i][1]
    end
    removed = removed + redis.call('XDEL', KEYS[1], unpack(ids))
  end
end
local most = math.min(limit - removed, tonumber(ARGV[3]))
if most > 0 then
  delayed = redis.call('ZREMRANGEBYRANK', KEYS[3], 0, most - 1)
  note_due(KEYS[2], KEYS[3])
end
if removed + delayed > 0 then
  redis.call('HINCRBY', KEYS[2], 'purged', removed + delayed)
end
return { removed, delayed, last }
