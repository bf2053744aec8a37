-- How many messages of a stream wait: not given to any consumer, on offer again, or not due yet. Reads only.
-- KEYS[1] stream     stream
-- KEYS[2] requeued   sorted set of entry ids
-- KEYS[3] delayed    sorted set
-- KEYS[4] state      hash
-- ARGV[1] group
-- Returns: their number
if redis.call('EXISTS', KEYS[1]) == 0 then
  return redis.call('ZCARD', KEYS[3])
end
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1])
local given = pending.err and 0 or pending[1]
-- What it has finished may be kept for another group.
local kept = tonumber(redis.call('HGET', KEYS[4], 'kept:' .. ARGV[1]) or '0')
return redis.call('XLEN', KEYS[1]) - kept - given + redis.call('ZCARD', KEYS[2]) + redis.call('ZCARD', KEYS[3])
