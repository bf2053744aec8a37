-- Says that processes live, for all their leases of shared streams on this server at once, and which others no longer do.
-- KEYS[1] alive  sorted set incarnation -> expires_at (ms)
-- ARGV[1] lease time, ms
-- ARGV[2] since when the caller has been heard without a gap, ms on Redis' clock, or 0
-- ARGV[3...] incarnations of the caller's processes
-- Returns: {now, when the next one's time is over (ms), {whose time is over, ...}, {1 if a process was heard in time else 0, ...}}
-- Who was heard in time has lost no lease: nobody ends a consumer before its time is over. Who is late looks at each.
--- @include now
-- A write that Redis allows above maxmemory lets the next ones through: a full Redis must be drained.
redis.call('ZREM', KEYS[1], '')
local now = now_ms()
local expires_at = now + tonumber(ARGV[1])
local in_time = {}
for i = 3, #ARGV do
  local before = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[i]) or '0')
  in_time[i - 2] = before > now and 1 or 0
  redis.call('ZADD', KEYS[1], expires_at, ARGV[i])
end
-- Whose time ends later than that of one who is heard now was heard before the clock was set back.
local ahead = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. expires_at, '+inf')
for i = 1, #ahead do
  redis.call('ZADD', KEYS[1], expires_at, ahead[i])
end
-- By now all others have seen it, and it could have come back after an outage of all.
local long_ago = now - 3 * tonumber(ARGV[1])
if tonumber(ARGV[2]) > 0 and tonumber(ARGV[2]) < long_ago then
  redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', long_ago)
end
local over = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)
local following = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
return { now, tonumber(following[2] or expires_at), over, in_time }
