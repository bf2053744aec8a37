-- As settle, for shards whose pending entries may have been given a replacement (produce_replacement): where a later one
-- is stored than the one that ran, the entry stays pending, and the replacement is answered.
-- KEYS[1] lease     hash
-- KEYS[2] stream    stream
-- KEYS[3] state     hash
-- KEYS[4] notes     hash
-- KEYS[5] replaced  hash entry id -> "generation due_ms envelope"
-- ARGV[1] token
-- ARGV[2] incarnation
-- ARGV[3] group
-- ARGV[4...] entry id, generation that ran (0: the entry as it was produced); ids ascend
-- Returns: {id, "generation due_ms envelope", ...} of those that have a replacement, or LEASE_LOST
--- @include codes
--- @include fence
--- @include pending
--- @include slices
--- @include ids
--- @include remove
if not owns(KEYS[1], ARGV[1], ARGV[2]) then
  return LEASE_LOST
end
local ids, kept = {}, {}
local any = redis.call('EXISTS', KEYS[5]) == 1
for i = 4, #ARGV, 2 do
  local replacement = any and redis.call('HGET', KEYS[5], ARGV[i])
  if replacement and tonumber(replacement:match('^%d+') or '0') > tonumber(ARGV[i + 1]) and is_pending(KEYS[2], ARGV[3], ARGV[i]) then
    kept[#kept + 1] = ARGV[i]
    kept[#kept + 1] = replacement
  else
    ids[#ids + 1] = ARGV[i]
  end
end
if #ids > 0 then
  -- XACK is the first write: Redis allows it above maxmemory, and with it what follows.
  local acked = redis.call('XACK', KEYS[2], ARGV[3], unpack(ids))
  if acked > 0 then
    remove_finished(KEYS[2], KEYS[3], ARGV[3], ids, acked)
    if redis.call('EXISTS', KEYS[4]) == 1 then
      redis.call('HDEL', KEYS[4], unpack(ids))
    end
    if any then
      redis.call('HDEL', KEYS[5], unpack(ids))
    end
    redis.call('HINCRBY', KEYS[3], 'done:' .. ARGV[3], acked)
  end
end
return kept
