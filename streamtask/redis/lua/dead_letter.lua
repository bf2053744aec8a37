-- Takes a pending entry, whole and with its error, to the dead letters. Appends only if it removed; hold leaves the
-- entry pending, so that its lane stays closed until the dead letter is replayed or dropped.
-- KEYS[1] lease    hash
-- KEYS[2] stream   stream
-- KEYS[3] state    hash
-- KEYS[4] notes    hash
-- KEYS[5] dlq      stream
-- KEYS[6] replaced hash entry id -> "generation due_ms envelope": where a retry took the entry's place, that is what failed
-- ARGV[1] token
-- ARGV[2] incarnation
-- ARGV[3] group
-- ARGV[4] entry id
-- ARGV[5] error, JSON: reason, message, traceback, attempts, times
-- ARGV[6] '' or, to hold the lane, the note to leave
-- Returns: 1 if dead-lettered now, 0 if it was no longer pending or is held already, or LEASE_LOST
--- @include codes
--- @include fence
--- @include narrow
--- @include pending
--- @include slices
--- @include ids
--- @include remove
if not owns(KEYS[1], ARGV[1], ARGV[2]) then
  return LEASE_LOST
end
local entry = redis.call('XRANGE', KEYS[2], ARGV[4], ARGV[4])
local fields = narrow(entry[1] and entry[1][2] or {})
local replacement = redis.call('HGET', KEYS[6], ARGV[4])
if replacement then
  fields = { 'm', replacement:match('^%d+ %d+ (.*)$') }
end
if ARGV[6] ~= '' then
  local note = redis.call('HGET', KEYS[4], ARGV[4])
  if not is_pending(KEYS[2], ARGV[3], ARGV[4]) or (note and note:sub(-1) == '1') then
    return 0
  end
  redis.call('HDEL', KEYS[4], ARGV[4])
  redis.call('HSET', KEYS[4], ARGV[4], ARGV[6])
  redis.call('XADD', KEYS[5], '*', 'error', ARGV[5], 'entry', ARGV[4], 'group', ARGV[3], 'held', '1', unpack(fields))
  return 1
end
if redis.call('XACK', KEYS[2], ARGV[3], ARGV[4]) == 0 then
  return 0
end
redis.call('XADD', KEYS[5], '*', 'error', ARGV[5], 'entry', ARGV[4], 'group', ARGV[3], 'held', '0', unpack(fields))
remove_finished(KEYS[2], KEYS[3], ARGV[3], { ARGV[4] }, 1)
redis.call('HDEL', KEYS[4], ARGV[4])
redis.call('HDEL', KEYS[6], ARGV[4])
redis.call('HINCRBY', KEYS[3], 'dead:' .. ARGV[3], 1)
return 1
