-- The id of the last entry that a group was given.
local function last_delivered(stream, group)
  local groups = redis.call('XINFO', 'GROUPS', stream)
  for i = 1, #groups do
    local fields = {}
    for j = 1, #groups[i], 2 do
      fields[groups[i][j]] = groups[i][j + 1]
    end
    if fields['name'] == group then
      return fields['last-delivered-id']
    end
  end
  return '0-0'
end
