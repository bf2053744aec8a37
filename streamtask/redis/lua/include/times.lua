-- Processes of one group may have different lease times, as while their setting changes: each tells its own.
local function says_alive(alive, times, name, now, lease_ms)
  redis.call('ZADD', alive, now + lease_ms, name)
  redis.call('HSET', times, name, lease_ms)
end

-- What a consumer has told, else the caller's.
local function lease_time(times, name, lease_ms)
  return tonumber(redis.call('HGET', times, name) or lease_ms)
end
