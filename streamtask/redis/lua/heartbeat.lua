-- Says that worker processes live, and who else does. Members whose time is over are removed.
-- KEYS[1] members      sorted set by expiry, ms
-- KEYS[2] member info  hash incarnation -> JSON
-- ARGV[1] lease time, ms
-- ARGV[2] 1 if the caller was cut off since its last heartbeat
-- ARGV[3] when the caller's supervisor was last heard, ms on Redis' clock (0: never), as an earlier call answered
-- ARGV[4] since when it has been heard without a gap, as an earlier call answered
-- ARGV[5...] incarnation, info of each of the caller's processes; the info's first field is lease_ms
-- Returns: {now, since, changed, {member, ...}} with the members in the order of their names
--- @include now
-- A write that Redis allows above maxmemory lets the next ones through: a full Redis must be drained.
redis.call('ZREM', KEYS[1], '')
local now = now_ms()
local lease_ms = tonumber(ARGV[1])
local since = tonumber(ARGV[4])
local heard = tonumber(ARGV[3])
if ARGV[2] == '1' or now - heard > lease_ms * 0.6 or now < heard then
  since = now
end
local changed = 0
-- Whose time ends later than if it was heard now was heard before the clock was set back. Each has its own lease time.
local ahead = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now + lease_ms, '+inf', 'WITHSCORES')
for i = 1, #ahead, 2 do
  local info = redis.call('HGET', KEYS[2], ahead[i]) or ''
  local latest = now + tonumber(info:match('^{"lease_ms":(%d+)') or lease_ms)
  if tonumber(ahead[i + 1]) > latest then
    redis.call('ZADD', KEYS[1], latest, ahead[i])
  end
end
local gone = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)
for i = 1, #gone do
  redis.call('ZREM', KEYS[1], gone[i])
  redis.call('HDEL', KEYS[2], gone[i])
  changed = 1
end
for i = 5, #ARGV, 2 do
  changed = changed + redis.call('ZADD', KEYS[1], now + lease_ms, ARGV[i])
  redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
end
if redis.call('PTTL', KEYS[1]) < lease_ms * 10 then
  redis.call('PEXPIRE', KEYS[1], lease_ms * 10)
  redis.call('PEXPIRE', KEYS[2], lease_ms * 10)
end
local members = redis.call('ZRANGE', KEYS[1], 0, -1)
table.sort(members)
return { now, since, changed, members }
