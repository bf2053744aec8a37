-- Gives requeued entries of a shared stream to a consumer, the oldest first.
-- KEYS[1] lease      hash of the consumer
-- KEYS[2] requeued   sorted set of entry ids
-- KEYS[3] stream     stream
-- ARGV[1] token
-- ARGV[2] incarnation
-- ARGV[3] group
-- ARGV[4] most entries to take
-- Returns: {1 if more are on offer else 0, entries {{id, fields}, ...}}, or LEASE_LOST
--- @include codes
--- @include fence
--- @include pending
if not owns(KEYS[1], ARGV[1], ARGV[2]) then
  return LEASE_LOST
end
local entries = {}
local ids = redis.call('ZRANGE', KEYS[2], 0, tonumber(ARGV[4]) - 1)
for i = 1, #ids do
  redis.call('ZREM', KEYS[2], ids[i])
  if is_pending(KEYS[3], ARGV[3], ids[i]) then
    local entry = redis.call('XRANGE', KEYS[3], ids[i], ids[i])[1]
    if entry then
      redis.call('XCLAIM', KEYS[3], ARGV[3], ARGV[2], 0, ids[i], 'JUSTID')
      entries[#entries + 1] = entry
    else
      redis.call('XACK', KEYS[3], ARGV[3], ids[i])
    end
  end
end
return { redis.call('EXISTS', KEYS[2]), entries }
