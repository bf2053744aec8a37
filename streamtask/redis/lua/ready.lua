-- How many messages of a stream wait: not given to any consumer, on offer again, or not due yet. Reads only.
-- KEYS[1] stream     stream
-- KEYS[2] requeued   sorted set of entry ids
-- KEYS[3] delayed    sorted set
-- ARGV[1] group
-- Returns: their number
if redis.call('EXISTS', KEYS[1]) == 0 then
  return redis.call('ZCARD', KEYS[3])
end
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1])
local given = pending.err and 0 or pending[1]
return redis.call('XLEN', KEYS[1]) - given + redis.call('ZCARD', KEYS[2]) + redis.call('ZCARD', KEYS[3])
