-- Removes dead letters for good. A lane that one of them holds opens: its entry is marked to be dropped by the owner.
-- KEYS[1] dlq      stream
-- KEYS[2] stream   stream
-- KEYS[3] wake     stream
-- KEYS[4...] notes of the group of each dead letter
-- ARGV[1...] ids of dead letters
-- Returns: how many were there
local done = 0
for i = 1, #ARGV do
  local entry = redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])[1]
  if entry then
    local held, pending, group = '0', '', ''
    for j = 1, #entry[2], 2 do
      if entry[2][j] == 'held' then
        held = entry[2][j + 1]
      elseif entry[2][j] == 'entry' then
        pending = entry[2][j + 1]
      elseif entry[2][j] == 'group' then
        group = entry[2][j + 1]
      end
    end
    redis.call('XDEL', KEYS[1], ARGV[i])
    if held == '1' and #redis.call('XPENDING', KEYS[2], group, pending, pending, 1) > 0 then
      redis.call('HDEL', KEYS[3 + i], pending)
      redis.call('HSET', KEYS[3 + i], pending, '0 0 0 0 0 2')
      redis.call('XADD', KEYS[3], 'MAXLEN', '1', '*', 'w', 'held')
    end
    done = done + 1
  end
end
return done
