-- Whether a shard takes a message of this epoch now: 1, NO_STATE, SEALED or FULL. max_backlog 0 means no limit. Second: when
-- the first delayed message falls due, if there is one; see 'delayed'.
-- needs: codes
local function admit(state, stream, delayed, epoch, max_backlog)
  local open = redis.call('HGET', state, 'open')
  local due
  if open ~= epoch then
    if open == false and redis.call('EXISTS', state) == 0 then
      return NO_STATE
    end
    due = open and open:match('^' .. epoch .. ' (%d+)$')
    if not due then
      return SEALED
    end
  end
  if max_backlog > 0 and redis.call('XLEN', stream) + redis.call('ZCARD', delayed) >= max_backlog then
    return FULL
  end
  return 1, due
end
