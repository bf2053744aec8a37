-- Makes an incarnation a consumer of a shared stream, with a lease of its own. Repeating it answers the same token.
-- KEYS[1] lease      hash of this consumer: owner, token
-- KEYS[2] consumers  sorted set of names: 0 behind one that is known to be gone, else 1
-- KEYS[3] token      counter without TTL
-- KEYS[4] alive      sorted set incarnation -> expires_at (ms)
-- KEYS[5] times      hash incarnation -> lease time, ms
-- ARGV[1] incarnation
-- ARGV[2] lease time, ms
-- Returns: {token, expires_at}
--- @include now
--- @include times
-- A write that Redis allows above maxmemory lets the next ones through: a full Redis must be drained.
redis.call('HDEL', KEYS[1], '')
local now = now_ms()
local token = redis.call('HGET', KEYS[1], 'token')
if not token then
  local time = redis.call('TIME')
  local micros = tonumber(time[1]) * 1000000 + tonumber(time[2])
  token = string.format('%.0f', math.max(tonumber(redis.call('GET', KEYS[3]) or '0') + 1, micros))
  redis.call('SET', KEYS[3], token)
  redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'token', token)
end
redis.call('HSET', KEYS[1], 'voided', 0)
redis.call('ZADD', KEYS[2], 1, ARGV[1])
says_alive(KEYS[4], KEYS[5], ARGV[1], now, tonumber(ARGV[2]))
return { tonumber(token), now + tonumber(ARGV[2]) }
