-- Removes entries that a group has just finished from the stream, as far as no other registered group needs them.
-- Returns the ids that are removed. ids ascend. trim: they may be removed with all before the first pending entry.
local function other_groups(state, group)
  local others = {}
  local fields = redis.call('HKEYS', state)
  for i = 1, #fields do
    if fields[i]:sub(1, 6) == 'group:' and fields[i]:sub(7) ~= group then
      others[#others + 1] = fields[i]:sub(7)
    end
  end
  return others
end

local function id_parts(id)
  local ms, seq = id:match('^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(seq)
end

local function id_le(a, b)
  local a_ms, a_seq = id_parts(a)
  local b_ms, b_seq = id_parts(b)
  return a_ms < b_ms or (a_ms == b_ms and a_seq <= b_seq)
end

local function removable(stream, state, group, ids)
  local others = other_groups(state, group)
  if #others == 0 then
    return ids, true
  end
  local delivered = {}
  local groups = redis.call('XINFO', 'GROUPS', stream)
  for i = 1, #groups do
    local info = {}
    for j = 1, #groups[i], 2 do
      info[groups[i][j]] = groups[i][j + 1]
    end
    delivered[info['name']] = info['last-delivered-id']
  end
  local free = {}
  for i = 1, #ids do
    local needed = false
    for j = 1, #others do
      local last = delivered[others[j]]
      -- A registered group that this shard lacks counts: it is about to be created, from the beginning.
      if not last or not id_le(ids[i], last) or #redis.call('XPENDING', stream, others[j], ids[i], ids[i], 1) > 0 then
        needed = true
        break
      end
    end
    if not needed then
      free[#free + 1] = ids[i]
    end
  end
  return free, false
end

-- In a shard that one group reads, everything before its first pending entry is finished: one trim takes a contiguous
-- batch out in whole nodes. Otherwise XDEL, whatever lies before the entry.
local function remove_finished(stream, state, group, ids)
  local free, alone = removable(stream, state, group, ids)
  if #free == 0 then
    return 0
  end
  if alone then
    local last = free[#free]
    local pending = redis.call('XPENDING', stream, group, '-', '+', 1)
    if #pending == 0 or not id_le(pending[1][1], last) then
      local ms, seq = last:match('^(%d+)-(%d+)$')
      redis.call('XTRIM', stream, 'MINID', '=', ms .. '-' .. string.format('%.0f', tonumber(seq) + 1))
      return #free
    end
  end
  return redis.call('XDEL', stream, unpack(free))
end
