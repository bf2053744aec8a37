-- Whether a shard takes a message of this epoch now: 1, NO_STATE, SEALED or FULL. max_backlog 0 means no limit.
-- needs: codes
local function admit(state, stream, delayed, epoch, max_backlog)
  local open = redis.call('HGET', state, 'open')
  if open ~= epoch then
    if open == false and redis.call('EXISTS', state) == 0 then
      return NO_STATE
    end
    return SEALED
  end
  if max_backlog > 0 and redis.call('XLEN', stream) + redis.call('ZCARD', delayed) >= max_backlog then
    return FULL
  end
  return 1
end
