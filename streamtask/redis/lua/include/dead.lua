-- Reads a dead letter. Its first four pairs are ours (error, entry, group, held); what follows is the message as it was.
-- needs: pending
-- Returns the message's fields without the mark of an earlier replay, and the entry that the lane is held by, or nil.
local function read_dead(stream, entry)
  local fields = entry[2]
  local message = {}
  for j = 9, #fields, 2 do
    if fields[j] ~= 'replayed' then
      message[#message + 1] = fields[j]
      message[#message + 1] = fields[j + 1]
    end
  end
  if fields[8] ~= '1' then
    return message, nil
  end
  return message, is_pending(stream, fields[6], fields[4]) and fields[4] or nil
end
