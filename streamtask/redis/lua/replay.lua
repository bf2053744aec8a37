-- Puts dead letters back: at the end of their lanes, or, where the lane is held, at its head. Ids and keys stay. What is
-- appended names the group whose dead letter it was: the others have dealt with the message already.
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
    local message, held_by = read_dead(KEYS[2], entry)
    redis.call('XDEL', KEYS[1], ARGV[i])
    if held_by then
      redis.call('HDEL', KEYS[3 + i], held_by)
      redis.call('XADD', KEYS[3], 'MAXLEN', '1', '*', 'w', 'held')
    else
      message[#message + 1] = 'replayed'
      message[#message + 1] = entry[2][6]
      redis.call('XADD', KEYS[2], '*', unpack(message))
    end
    done = done + 1
  end
end
return done
