-- Removes entries that a group has just finished from the stream, as far as no other registered group needs them.
-- needs: slices, ids
local function other_groups(state, group)
  local others = {}
  local fields = redis.call('HKEYS', state)
  local own = 'group:' .. group
  for i = 1, #fields do
    if fields[i] ~= own and fields[i]:find('group:', 1, true) == 1 then
      others[#others + 1] = fields[i]:sub(7)
    end
  end
  return others
end

-- Those of the ids that none of the groups needs any more.
local function needed_by_none(stream, groups, ids)
  local delivered = {}
  local infos = redis.call('XINFO', 'GROUPS', stream)
  for i = 1, #infos do
    local info = {}
    for j = 1, #infos[i], 2 do
      info[infos[i][j]] = infos[i][j + 1]
    end
    delivered[info['name']] = info['last-delivered-id']
  end
  local free = {}
  for i = 1, #ids do
    local needed = false
    for j = 1, #groups do
      local last = delivered[groups[j]]
      -- A registered group that this shard lacks counts: it is about to be created, from the beginning.
      if not last or not id_le(ids[i], last) or #redis.call('XPENDING', stream, groups[j], ids[i], ids[i], 1) > 0 then
        needed = true
        break
      end
    end
    if not needed then
      free[#free + 1] = ids[i]
    end
  end
  return free
end

-- ids ascend; acked: how many of them the caller's XACK found pending. Where it was all, in a shard that one group reads,
-- everything before its first pending entry is finished, and one trim takes a contiguous batch out in whole nodes. Else only
-- what the group itself was given and has finished goes: where Redis lost its last second, some of the ids, or entries before
-- them, may not be delivered. Where several groups read, 'kept:GROUP' of the state counts the entries that lie there though the
-- group has finished them: the rest of the stream is its backlog.
local function remove_finished(stream, state, group, ids, acked)
  local others = other_groups(state, group)
  local groups = { unpack(others) }
  local all = acked == #ids
  if not all then
    groups[#groups + 1] = group
  end
  local free = ids
  if #groups > 0 then
    free = needed_by_none(stream, groups, ids)
  elseif #ids > 1 then
    local last = ids[#ids]
    local pending = redis.call('XPENDING', stream, group, '-', '+', '1')
    if #pending == 0 or not id_le(pending[1][1], last) then
      local ms, seq = last:match('^(%d+)-(%d+)$')
      if #seq <= 15 then
        redis.call('XTRIM', stream, 'MINID', '=', ms .. '-' .. string.format('%.0f', tonumber(seq) + 1))
      else
        redis.call('XTRIM', stream, 'MINID', '=', last)
        redis.call('XDEL', stream, last)
      end
      return
    end
  end
  local gone = by_slices(free, function(...)
    return redis.call('XDEL', stream, ...)
  end)
  if #others > 0 and acked ~= gone then
    redis.call('HINCRBY', state, 'kept:' .. group, acked - gone)
  end
  for i = 1, gone > 0 and #others or 0 do
    redis.call('HINCRBY', state, 'kept:' .. others[i], -gone)
  end
end
