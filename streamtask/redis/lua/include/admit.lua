-- Whether a shard takes a message now.
-- needs: codes

-- How much of a backlog limit is left: of all that waits for the group that has most of it, delayed messages with it. What lies
-- there for another group alone is none of a group's backlog ('kept', see remove.lua); it is asked for only at the limit.
local function room_for(state, stream, delayed, max_backlog)
  local left = max_backlog - redis.call('XLEN', stream) - redis.call('ZCARD', delayed)
  if left > 0 then
    return left
  end
  local fields = redis.call('HGETALL', state)
  local kept, groups = {}, {}
  for i = 1, #fields, 2 do
    if fields[i]:sub(1, 5) == 'kept:' then
      kept[fields[i]:sub(6)] = tonumber(fields[i + 1])
    elseif fields[i]:sub(1, 6) == 'group:' then
      groups[#groups + 1] = fields[i]:sub(7)
    end
  end
  local least = #groups > 1 and math.huge or 0
  for i = 1, #groups do
    least = math.min(least, math.max(0, kept[groups[i]] or 0))
  end
  return left + least
end

-- Whether a shard takes a message of this epoch now: 1, NO_STATE, SEALED or FULL. max_backlog 0 means no limit. Second: when
-- the first delayed message falls due, if there is one; see 'delayed'. Third: for how many there is room, where there is a limit.
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
  if max_backlog == 0 then
    return 1, due
  end
  local room = room_for(state, stream, delayed, max_backlog)
  if room <= 0 then
    return FULL
  end
  return 1, due, room
end
