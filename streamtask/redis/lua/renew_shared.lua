-- Prolongs the lease of a consumer of a shared stream, also late, as long as nobody removed it. A record that a flush
-- removed is written anew: the token counter, never below a token that was handed out, tells it by being gone or lower.
-- KEYS[1] lease      hash of this consumer
-- KEYS[2] consumers  sorted set
-- KEYS[3] token      counter
-- ARGV[1] token
-- ARGV[2] incarnation
-- ARGV[3] lease time, ms
-- Returns: expires_at (ms), or LEASE_LOST
--- @include codes
--- @include fence
--- @include now
-- A write that Redis allows above maxmemory lets the next ones through: a full Redis must be drained.
redis.call('HDEL', KEYS[1], '')
if not owns(KEYS[1], ARGV[1], ARGV[2]) then
  if redis.call('EXISTS', KEYS[1]) == 1 or tonumber(redis.call('GET', KEYS[3]) or '0') >= tonumber(ARGV[1]) then
    return LEASE_LOST
  end
  redis.call('SET', KEYS[3], ARGV[1])
  redis.call('HSET', KEYS[1], 'owner', ARGV[2], 'token', ARGV[1])
end
local expires_at = now_ms() + tonumber(ARGV[3])
-- Whose time ends later than that of one who is heard now was heard before the clock was set back.
local ahead = redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. expires_at, '+inf')
for i = 1, #ahead do
  redis.call('ZADD', KEYS[2], expires_at, ahead[i])
end
redis.call('ZADD', KEYS[2], expires_at, ARGV[2])
return expires_at
