-- The pending entries of a group from one id to another, of one consumer where it is named; none where the stream or the
-- group is gone (a flush, an eviction).
local function pending_of(stream, group, first, last, count, consumer)
  local found
  if consumer then
    found = redis.pcall('XPENDING', stream, group, first, last, count, consumer)
  else
    found = redis.pcall('XPENDING', stream, group, first, last, count)
  end
  if found.err then
    return {}
  end
  return found
end

local function is_pending(stream, group, id)
  return #pending_of(stream, group, id, id, 1) > 0
end
