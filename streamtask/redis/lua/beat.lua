-- Says that processes live, for all their leases of shared streams on this server at once, and which others no longer do.
-- KEYS[1] alive  sorted set incarnation -> expires_at (ms)
-- KEYS[2] times  hash incarnation -> lease time, ms
-- ARGV[1] lease time, ms
-- ARGV[2] since when the caller has been heard without a gap, ms on Redis' clock, or 0
-- ARGV[3...] incarnations of the caller's processes
-- Returns: {now, when the next one's time is over (ms), {whose time is over, ...}, {1 if a process was heard in time else 0, ...}}
-- Who was heard in time has lost no lease: nobody ends a consumer before its time is over. Who is late looks at each.
--- @include now
--- @include times
-- A write that Redis allows above maxmemory lets the next ones through: a full Redis must be drained.
redis.call('ZREM', KEYS[1], '')
local now = now_ms()
local lease_ms = tonumber(ARGV[1])
local expires_at = now + alive_for(lease_ms)
local in_time, all_in_time = {}, #ARGV > 2
for i = 3, #ARGV do
  local before = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[i]) or '0')
  in_time[i - 2] = before > now and 1 or 0
  all_in_time = all_in_time and before > now
  says_alive(KEYS[1], KEYS[2], ARGV[i], now, lease_ms)
end
-- Whose time ends later than if it was heard now was heard before the clock was set back.
local ahead = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. expires_at, '+inf', 'WITHSCORES')
for i = 1, #ahead, 2 do
  local latest = now + alive_for(lease_time(KEYS[2], ahead[i], lease_ms))
  if tonumber(ahead[i + 1]) > latest then
    redis.call('ZADD', KEYS[1], latest, ahead[i])
  end
end
-- By now all others have seen it, and it could have come back after an outage of all. An outage that the caller does not know
-- of yet (this call may have waited for its end) would have let the caller's own time run out.
local since = tonumber(ARGV[2])
if all_in_time and since > 0 and since < now - 3 * lease_ms then
  local past = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - 3 * lease_ms, 'WITHSCORES')
  for i = 1, #past, 2 do
    local long_ago = now - 3 * lease_time(KEYS[2], past[i], lease_ms)
    if since < long_ago and tonumber(past[i + 1]) <= long_ago then
      redis.call('ZREM', KEYS[1], past[i])
      redis.call('HDEL', KEYS[2], past[i])
    end
  end
end
local over = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)
local following = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
return { now, tonumber(following[2] or expires_at), over, in_time }
