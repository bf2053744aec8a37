-- Delayed messages that have fallen due go into the stream before what is sent after them, whoever comes first, their owner
-- or a produce call. Moves some of them. due: as 'admit' says. Returns true if there are more: to be called again.
-- needs: delayed, now
local function move_overdue(state, stream, delayed, due)
  local now = due and now_ms()
  if not now or tonumber(due) > now then
    return false
  end
  local found = redis.call('ZRANGEBYSCORE', delayed, '-inf', now, 'LIMIT', 0, 200)
  for i = 1, #found do
    -- XADD first: a full Redis refuses it, and with it the call.
    redis.call('XADD', stream, '*', found[i]:sub(17, 17), found[i]:sub(18))
    redis.call('ZREM', delayed, found[i])
  end
  if #found == 0 then
    return false -- it was left over: who removes delayed messages by hand does not keep it
  end
  local first = note_due(state, delayed)
  return first >= 0 and first <= now
end
