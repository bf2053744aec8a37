-- Processes of one group may have different lease times, as while their setting changes: each tells its own.
-- To the others they live a little longer than they trust their leases themselves: who is late by a moment, on a busy machine,
-- is not ended for it.
local function alive_for(lease_ms)
  return lease_ms + math.floor(math.min(lease_ms / 3, 500))
end

local function says_alive(alive, times, name, now, lease_ms)
  redis.call('ZADD', alive, now + alive_for(lease_ms), name)
  redis.call('HSET', times, name, lease_ms)
end

-- What a consumer has told, else the caller's.
local function lease_time(times, name, lease_ms)
  return tonumber(redis.call('HGET', times, name) or lease_ms)
end

-- Until when another process may come back to its lease, after an outage that silenced it and the caller; all in ms.
-- expires_at: when its lease ends; heard_at: when it was heard last; since: since when the caller is heard without a gap.
-- Where the outage was longer than the lease, it has one lease time from the caller's return. Where it was shorter, so much
-- as it takes to connect again: the caller may have been just a little faster.
local function returns_until(expires_at, heard_at, since, lease_ms)
  if since > expires_at then
    return since + lease_ms
  end
  if since > heard_at then
    return math.max(expires_at, since + math.min(lease_ms, math.floor(lease_ms / 3) + 1000))
  end
  return expires_at
end
