-- Ends a consumer of a shared stream: its pending entries go to a live consumer and into the requeued set, in id order,
-- and the empty consumer is removed. Where no other consumer lives and entries are pending, nothing is done.
-- KEYS[1] lease      hash of the consumer to end
-- KEYS[2] consumers  sorted set of names
-- KEYS[3] stream     stream
-- KEYS[4] requeued   sorted set of entry ids
-- KEYS[5] wake       stream
-- KEYS[6] notes      hash
-- KEYS[7] alive      sorted set incarnation -> expires_at (ms)
-- KEYS[8] times      hash incarnation -> lease time, ms
-- ARGV[1] group
-- ARGV[2] incarnation of the consumer to end
-- ARGV[3] '1' if it is known to be gone; else only when its lease has expired
-- ARGV[4] since when the caller has been heard without a gap, ms
-- ARGV[5] lease time, ms
-- ARGV[6] most entries to move in this call
-- ARGV[7] token of the lease that is to be ended, or 0: a lease that was taken since by the same process stays
-- ARGV[8] '1' if those of its entries whose bodies ran are charged, or spared: of the others the bodies had ended, and that they
--         started is forgotten, lest the next consumer counts it. Else each gets a note: it may have begun
-- Returns: {1 if the consumer is gone now else 0, how many entries moved}
--- @include alive
--- @include now
--- @include pending
--- @include requeued
--- @include times
local token = redis.call('HGET', KEYS[1], 'token')
if ARGV[7] ~= '0' and token and token ~= ARGV[7] then
  return { 0, 0 }
end
local now = now_ms()
local score = alive_until(KEYS[2], KEYS[7], ARGV[2])
if ARGV[3] ~= '1' and score > 0 then
  local lease_ms = tonumber(ARGV[5])
  local its_lease_ms = lease_time(KEYS[8], ARGV[2], lease_ms)
  local heard_at = score - alive_for(its_lease_ms)
  if now < returns_until(score, heard_at, tonumber(ARGV[4]), math.max(lease_ms, its_lease_ms)) then
    return { 0, 0 }
  end
end
local moved = 0
local limit = tonumber(ARGV[6])
local pending = pending_of(KEYS[3], ARGV[1], '-', '+', limit, ARGV[2])
for i = 1, ARGV[8] == '1' and #pending or 0 do
  local note = redis.call('HGET', KEYS[6], pending[i][1])
  local before, mark, after = (note or ''):match('^(%d+ %d+ %d+) (%d+) (%d+ %d+)$')
  if mark and mark == token then
    -- HDEL first: a write that Redis allows above maxmemory lets the next one through.
    redis.call('HDEL', KEYS[6], pending[i][1])
    redis.call('HSET', KEYS[6], pending[i][1], before .. ' 0 ' .. after)
  end
end
if #pending > 0 then
  local heir
  local names = redis.call('ZRANGE', KEYS[2], 0, -1)
  for i = 1, #names do
    if names[i] ~= ARGV[2] and alive_until(KEYS[2], KEYS[7], names[i]) > now then
      heir = names[i]
      break
    end
  end
  if not heir then
    if ARGV[3] == '1' then
      -- Known to be gone: whoever comes next need not wait until its time is over.
      redis.call('ZREM', KEYS[2], ARGV[2])
      redis.call('ZADD', KEYS[2], 0, ARGV[2])
    end
    return { 0, 0 }
  end
  for i = 1, #pending do
    local id = pending[i][1]
    -- XCLAIM first: Redis allows it above maxmemory, and with it the ZADD.
    local claimed = redis.call('XCLAIM', KEYS[3], ARGV[1], heir, 0, id, 'JUSTID')
    if #claimed > 0 then
      requeue(KEYS[4], id)
      if ARGV[8] ~= '1' then
        redis.call('HSETNX', KEYS[6], id, '0 0 0 0 0 0')
      end
      moved = moved + 1
    else
      -- The entry was deleted under the consumer; on Redis 6.2 its PEL slot stays until it is acknowledged.
      redis.call('XACK', KEYS[3], ARGV[1], id)
      redis.call('HDEL', KEYS[6], id)
    end
  end
  redis.call('XADD', KEYS[5], 'MAXLEN', '1', '*', 'w', 'requeued')
end
if #pending_of(KEYS[3], ARGV[1], '-', '+', 1, ARGV[2]) > 0 then
  return { 0, moved }
end
redis.pcall('XGROUP', 'DELCONSUMER', KEYS[3], ARGV[1], ARGV[2])
redis.call('ZREM', KEYS[2], ARGV[2])
redis.call('DEL', KEYS[1])
return { 1, moved }
