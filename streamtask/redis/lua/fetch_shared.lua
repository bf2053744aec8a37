-- Gives a consumer what waits in the shared streams of a queue, one stream for each priority, the most urgent first: what
-- is due moves into its stream, then requeued entries come, the oldest first, then new ones.
-- KEYS[1...] for each stream: lease of the consumer (hash), stream, requeued (sorted set of entry ids), delayed (sorted set
-- by due time, ms), wake (stream)
-- ARGV[1] incarnation
-- ARGV[2] group
-- ARGV[3] most entries to give
-- ARGV[4...] token of the lease of each stream
-- Returns: {now (ms), {last delivered id, newest wake id, when the next is due (ms) or -1, requeued entries, new entries}
-- for each stream ...}, with 0 in place of a list where the lease is another's
--- @include fence
--- @include last_delivered
--- @include now
--- @include pending
local now = now_ms()
local left = tonumber(ARGV[3])
local reply = { now }
for i = 0, #ARGV - 4 do
  local lease, stream, requeued, delayed, wake = unpack(KEYS, 5 * i + 1, 5 * i + 5)
  if not owns(lease, ARGV[4 + i], ARGV[1]) then
    reply[i + 2] = 0
  else
    local due = redis.call('ZRANGEBYSCORE', delayed, '-inf', now, 'LIMIT', 0, 500)
    for j = 1, #due do
      -- ZREM first: Redis allows it above maxmemory, and with it the append.
      redis.call('ZREM', delayed, due[j])
      redis.call('XADD', stream, '*', due[j]:sub(17, 17), due[j]:sub(18))
    end
    local again, fresh = {}, {}
    if left > 0 and redis.call('EXISTS', requeued) == 1 then
      local ids = redis.call('ZRANGE', requeued, 0, left - 1)
      for j = 1, #ids do
        redis.call('ZREM', requeued, ids[j])
        if is_pending(stream, ARGV[2], ids[j]) then
          local entry = redis.call('XRANGE', stream, ids[j], ids[j])[1]
          if entry then
            redis.call('XCLAIM', stream, ARGV[2], ARGV[1], 0, ids[j], 'JUSTID')
            again[#again + 1] = entry
          else
            redis.call('XACK', stream, ARGV[2], ids[j])
          end
        end
      end
      left = left - #again
    end
    if left > 0 then
      local found = redis.call('XREADGROUP', 'GROUP', ARGV[2], ARGV[1], 'COUNT', left, 'STREAMS', stream, '>')
      if found then
        fresh = found[1][2]
        left = left - #fresh
      end
    end
    local last = #fresh > 0 and fresh[#fresh][1] or last_delivered(stream, ARGV[2])
    local rung = redis.call('XREVRANGE', wake, '+', '-', 'COUNT', 1)[1]
    local following = redis.call('ZRANGE', delayed, 0, 0, 'WITHSCORES')
    reply[i + 2] = { last, rung and rung[1] or '0-0', tonumber(following[2] or '-1'), again, fresh }
  end
end
return reply
