-- Puts dead letters back: at the end of their lanes, or, where the lane is held, at its head. Ids and keys stay.
-- KEYS[1] dlq      stream
-- KEYS[2] stream   stream
-- KEYS[3] wake     stream
-- ARGV[1...] ids of dead letters, each with the key of the notes of its group as KEYS[4...]
-- Returns: how many were there
local done = 0
for i = 1, #ARGV do
  local entry = redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])[1]
  if entry then
    local message, held, pending, group = {}, '0', '', ''
    for j = 1, #entry[2], 2 do
      local field, value = entry[2][j], entry[2][j + 1]
      if field == 'held' then
        held = value
      elseif field == 'entry' then
        pending = value
      elseif field == 'group' then
        group = value
      elseif field ~= 'error' and field ~= 'replayed' then
        message[#message + 1] = field
        message[#message + 1] = value
      end
    end
    redis.call('XDEL', KEYS[1], ARGV[i])
    if held == '1' and #redis.call('XPENDING', KEYS[2], group, pending, pending, 1) > 0 then
      redis.call('HDEL', KEYS[3 + i], pending)
      redis.call('XADD', KEYS[3], 'MAXLEN', '1', '*', 'w', 'held')
    else
      message[#message + 1] = 'replayed'
      message[#message + 1] = '1'
      redis.call('XADD', KEYS[2], '*', unpack(message))
    end
    done = done + 1
  end
end
return done
