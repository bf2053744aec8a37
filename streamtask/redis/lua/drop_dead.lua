-- Removes dead letters for good. A lane that one of them holds opens: its entry is marked to be dropped by the owner.
-- KEYS[1] dlq      stream
-- KEYS[2] stream   stream
-- KEYS[3] wake     stream
-- KEYS[4...] notes of the group of each dead letter
-- ARGV[1...] ids of dead letters
-- Returns: how many were there
--- @include pending
--- @include dead
local done = 0
for i = 1, #ARGV do
  local entry = redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])[1]
  if entry then
    local _, held_by = read_dead(KEYS[2], entry)
    redis.call('XDEL', KEYS[1], ARGV[i])
    if held_by then
      redis.call('HSET', KEYS[3 + i], held_by, '0 0 0 0 0 2')
      redis.call('XADD', KEYS[3], 'MAXLEN', '1', '*', 'w', 'held')
    end
    done = done + 1
  end
end
return done
