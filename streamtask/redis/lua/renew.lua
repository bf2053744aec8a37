-- Prolongs a lease, also late, as long as nobody took it. A record that a flush removed is written anew.
-- KEYS[1] lease    hash
-- KEYS[2] token    counter
-- ARGV[1] token
-- ARGV[2] incarnation
-- ARGV[3] lease time, ms
-- Returns: expires_at (ms), or LEASE_LOST
--- @include codes
--- @include now
-- A write that Redis allows above maxmemory lets the next ones through: a full Redis must be drained.
redis.call('HDEL', KEYS[1], '')
local record = redis.call('HMGET', KEYS[1], 'token', 'owner')
local expires_at = now_ms() + tonumber(ARGV[3])
if record[1] == ARGV[1] and record[2] == ARGV[2] then
  redis.call('HSET', KEYS[1], 'expires_at', expires_at)
  return expires_at
end
local last = tonumber(redis.call('GET', KEYS[2]) or '0')
if record[2] == false and last <= tonumber(ARGV[1]) then
  redis.call('SET', KEYS[2], ARGV[1])
  redis.call('HSET', KEYS[1], 'owner', ARGV[2], 'token', ARGV[1], 'expires_at', expires_at, 'lease_ms', ARGV[3], 'how', 0)
  return expires_at
end
return LEASE_LOST
