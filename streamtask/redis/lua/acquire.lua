-- Takes a shard's lease for an incarnation, if it is free. Each call draws a new token, also for the owner
-- itself: Redis may have lost that another had the lease since (the last second of its append-only file).
-- KEYS[1] lease    hash: owner, token, expires_at (ms, Redis' clock), lease_ms, how; no TTL
-- KEYS[2] token    counter without TTL
-- ARGV[1] incarnation
-- ARGV[2] lease time, ms
-- ARGV[3] since when the caller has been heard without a gap, ms on Redis' clock
-- ARGV[4] the lowest token to hand out
-- ARGV[5] when the caller first missed a lease record that it had seen before, ms, or 0
-- ARGV[6] the lease time of the owner that the caller saw last, ms; its own if it saw none
-- Returns: {token, expires_at, by_expiry} when taken, else {0, when to ask again (ms)}
-- An outage that silences everybody moves no shard: see returns_until.
--- @include now
--- @include times
-- A write that Redis allows above maxmemory lets the next ones through: a full Redis must be drained.
redis.call('HDEL', KEYS[1], '')
local now = now_ms()
local lease_ms = tonumber(ARGV[2])
local record = redis.call('HMGET', KEYS[1], 'owner', 'token', 'expires_at', 'how', 'lease_ms')
local owner, expires_at = record[1], tonumber(record[3] or '0')
local its_lease_ms = tonumber(record[5] or ARGV[6])
if owner ~= ARGV[1] and expires_at > now + its_lease_ms then
  -- The clock was set back since: it is counted from here on.
  expires_at = now + its_lease_ms
  redis.call('HSET', KEYS[1], 'expires_at', expires_at)
end
local by_expiry = 0
local free_from, heard_at = 0, math.huge
if owner == ARGV[1] then
  by_expiry = tonumber(record[4] or '0')
elseif owner and owner ~= '' then
  by_expiry = 1
  free_from, heard_at = expires_at, expires_at - its_lease_ms
elseif not owner and tonumber(ARGV[5]) > 0 then
  by_expiry = 1
  free_from = tonumber(ARGV[5]) + math.max(lease_ms, its_lease_ms)
end
if owner ~= ARGV[1] and by_expiry == 1 then
  free_from = returns_until(free_from, heard_at, tonumber(ARGV[3]), math.max(lease_ms, its_lease_ms))
end
if now < free_from then
  return { 0, free_from }
end
local time = redis.call('TIME')
local micros = tonumber(time[1]) * 1000000 + tonumber(time[2])
local token = math.max(tonumber(redis.call('GET', KEYS[2]) or '0') + 1, tonumber(record[2] or '0') + 1, micros, tonumber(ARGV[4]))
local text = string.format('%.0f', token)
redis.call('SET', KEYS[2], text)
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'token', text, 'expires_at', now + lease_ms, 'lease_ms', lease_ms, 'how', by_expiry,
  'voided', 0)
return { token, now + lease_ms, by_expiry }
