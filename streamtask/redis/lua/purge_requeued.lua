-- Removes entries of a shared stream that are on offer again.
-- KEYS[1] stream     stream
-- KEYS[2] requeued   sorted set of entry ids
-- KEYS[3] state      hash
-- KEYS[4] notes      hash
-- ARGV[1] group
-- ARGV[2] most to look at in this call: to be repeated until fewer were there
-- Returns: {how many were looked at, how many were removed}
--- @include slices
--- @include ids
--- @include remove
local ids = redis.call('ZRANGE', KEYS[2], 0, tonumber(ARGV[2]) - 1)
local removed = 0
for i = 1, #ids do
  redis.call('ZREM', KEYS[2], ids[i])
  redis.call('HDEL', KEYS[4], ids[i])
  if redis.call('XACK', KEYS[1], ARGV[1], ids[i]) == 1 then
    remove_finished(KEYS[1], KEYS[3], ARGV[1], { ids[i] }, 1)
    removed = removed + 1
  end
end
if removed > 0 then
  redis.call('HINCRBY', KEYS[3], 'purged', removed)
end
return { #ids, removed }
