-- Appends a message to a shard's stream. Where delayed ones have fallen due and no owner has moved them yet, it goes behind
-- them instead, into their set, and whoever moves these moves it as well. due: as 'admit' says.
-- needs: delayed, now
-- The time if that is so, else false.
local function overdue(delayed, due)
  local now = due and now_ms()
  if not now or tonumber(due) > now then
    return false
  end
  -- It may be left over: who removes delayed messages by hand does not keep it.
  local first = redis.call('ZRANGE', delayed, 0, 0, 'WITHSCORES')[2]
  return first and tonumber(first) <= now and now
end

-- Returns the entry id, or 1 where it went behind others.
local function append(state, stream, delayed, due, field, envelope)
  local now = overdue(delayed, due)
  if now then
    put_delayed(state, delayed, now, field, envelope)
    return 1
  end
  return redis.call('XADD', stream, '*', field, envelope)
end
