-- What a consumer of a shared stream holds in the PEL, less what is on offer to every consumer.
-- KEYS[1] stream     stream
-- KEYS[2] requeued   sorted set of entry ids
-- ARGV[1] group
-- ARGV[2] incarnation
-- ARGV[3] id to start from
-- ARGV[4] most entries to look at
-- Returns: {last id looked at or '', ids}
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], '+', tonumber(ARGV[4]), ARGV[2])
local ids = {}
local last = ''
for i = 1, #pending do
  last = pending[i][1]
  if not redis.call('ZSCORE', KEYS[2], last) then
    ids[#ids + 1] = last
  end
end
return { last, ids }
