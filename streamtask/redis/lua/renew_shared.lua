-- Looks whether the lease of a consumer of a shared stream is still its own, and prolongs it, also late, as long as nobody
-- removed it. A record that a flush removed is written anew: the token counter, never below a token that was handed out,
-- tells it by being gone or lower.
-- KEYS[1] lease      hash of this consumer
-- KEYS[2] consumers  sorted set of names
-- KEYS[3] token      counter
-- KEYS[4] alive      sorted set incarnation -> expires_at (ms)
-- KEYS[5] times      hash incarnation -> lease time, ms
-- ARGV[1] token
-- ARGV[2] incarnation
-- ARGV[3] lease time, ms
-- Returns: {consumers whose time is over, ...}, or LEASE_LOST
--- @include alive
--- @include codes
--- @include fence
--- @include now
--- @include times
-- A write that Redis allows above maxmemory lets the next ones through: a full Redis must be drained.
redis.call('HDEL', KEYS[1], '')
if not owns(KEYS[1], ARGV[1], ARGV[2]) then
  if redis.call('EXISTS', KEYS[1]) == 1 or tonumber(redis.call('GET', KEYS[3]) or '0') >= tonumber(ARGV[1]) then
    return LEASE_LOST
  end
  redis.call('SET', KEYS[3], ARGV[1])
  redis.call('HSET', KEYS[1], 'owner', ARGV[2], 'token', ARGV[1])
end
local now = now_ms()
redis.call('ZADD', KEYS[2], 1, ARGV[2])
says_alive(KEYS[4], KEYS[5], ARGV[2], now, tonumber(ARGV[3]))
local over = {}
local names = redis.call('ZRANGE', KEYS[2], 0, -1)
for i = 1, #names do
  if alive_until(KEYS[2], KEYS[4], names[i]) <= now then
    over[#over + 1] = names[i]
  end
end
return over
