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
