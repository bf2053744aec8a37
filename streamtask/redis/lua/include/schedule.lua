-- Puts a message among the delayed ones. Members begin with a fixed-width sequence number, so that messages due in the
-- same millisecond keep the order of their produce calls. Wakes the owner when this one is now the next to fall due.
local function schedule(state, delayed, wake, due_ms, field, envelope)
  local seq = redis.call('HINCRBY', state, 'seq', 1)
  local member = string.format('%016d', seq) .. field .. envelope
  redis.call('ZADD', delayed, string.format('%.0f', due_ms), member)
  if redis.call('ZRANGE', delayed, 0, 0)[1] == member then
    redis.call('XADD', wake, 'MAXLEN', '1', '*', 'w', 'due')
  end
end
