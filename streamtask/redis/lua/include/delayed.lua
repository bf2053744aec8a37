-- Messages that wait for their due time, in a sorted set. Members begin with a fixed-width sequence number, so that those
-- due in the same millisecond keep the order of their produce calls. When the first of a shard falls due stands in its state
-- beside the epoch that is open, "EPOCH DUE", where produce calls look anyway. Shared streams keep no order and say nothing.
local function put_delayed(state, delayed, due_ms, field, envelope)
  local member = string.format('%016d', redis.call('HINCRBY', state, 'seq', 1)) .. field .. envelope
  redis.call('ZADD', delayed, string.format('%.0f', due_ms), member)
  return member
end

-- Brings that up to date. Returns when the first falls due, or -1.
local function note_due(state, delayed)
  local first = tonumber(redis.call('ZRANGE', delayed, '0', '0', 'WITHSCORES')[2] or '-1')
  local open = not state:find('.shared}', 1, true) and redis.call('HGET', state, 'open')
  local epoch = open and open:match('^%d+')
  local now_open = epoch and first >= 0 and string.format('%s %.0f', epoch, first) or epoch
  if epoch and open ~= now_open then
    -- Redis allows this one above maxmemory, and with it the next.
    redis.call('HDEL', state, '')
    redis.call('HSET', state, 'open', now_open)
  end
  return first
end
