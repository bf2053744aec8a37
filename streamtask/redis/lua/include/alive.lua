-- Until when a consumer of a shared stream has said that it lives: 0 if it is known to be gone. A name that is not among
-- the living was removed from them a while after its time was over.
local function alive_until(consumers, alive, name)
  if tonumber(redis.call('ZSCORE', consumers, name) or '0') == 0 then
    return 0
  end
  return tonumber(redis.call('ZSCORE', alive, name) or '0')
end
