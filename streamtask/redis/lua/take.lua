-- Takes messages out of a shared stream for good, without a lease: for consumers that don't acknowledge. What is due moves
-- into the stream first; requeued entries come before new ones.
-- KEYS[1] stream     stream
-- KEYS[2] requeued   sorted set of entry ids
-- KEYS[3] delayed    sorted set by due time, ms
-- KEYS[4] state      hash
-- KEYS[5] wake       stream
-- KEYS[6] notes      hash
-- ARGV[1] group
-- ARGV[2] most entries to take
-- Returns: {now (ms), last delivered id, newest wake id, when the next is due (ms) or -1, requeued entries, new entries}
--- @include due
--- @include last_delivered
--- @include now
--- @include slices
--- @include ids
--- @include remove
local now = now_ms()
local left = tonumber(ARGV[2])
-- Where one of these is of a wrong type nothing is taken: what is, is in no other place than the answer.
local rung = redis.call('XREVRANGE', KEYS[5], '+', '-', 'COUNT', 1)[1]
redis.call('HLEN', KEYS[4])
redis.call('HLEN', KEYS[6])
move_due(KEYS[3], KEYS[1], now, 500)
local again, fresh = {}, {}
local ids = redis.call('ZRANGE', KEYS[2], 0, left - 1)
for i = 1, #ids do
  redis.call('ZREM', KEYS[2], ids[i])
  redis.call('HDEL', KEYS[6], ids[i])
  local entry = redis.call('XRANGE', KEYS[1], ids[i], ids[i])[1]
  if redis.call('XACK', KEYS[1], ARGV[1], ids[i]) == 1 and entry then
    again[#again + 1] = entry
    remove_finished(KEYS[1], KEYS[4], ARGV[1], { ids[i] }, 1)
  end
end
left = left - #again
local last = '0-0'
if left > 0 then
  -- The consumer's name lives no longer than this call.
  local found = redis.call('XREADGROUP', 'GROUP', ARGV[1], 'taker', 'COUNT', left, 'NOACK', 'STREAMS', KEYS[1], '>')
  redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], 'taker')
  fresh = found and found[1][2] or {}
  local taken = {}
  for i = 1, #fresh do
    taken[i] = fresh[i][1]
  end
  if #taken > 0 then
    last = taken[#taken]
    remove_finished(KEYS[1], KEYS[4], ARGV[1], taken, #taken)
  end
end
if #again + #fresh > 0 then
  redis.call('HINCRBY', KEYS[4], 'done:' .. ARGV[1], #again + #fresh)
end
if last == '0-0' then
  last = last_delivered(KEYS[1], ARGV[1])
end
local following = redis.call('ZRANGE', KEYS[3], 0, 0, 'WITHSCORES')
return { now, last, rung and rung[1] or '0-0', tonumber(following[2] or '-1'), again, fresh }
