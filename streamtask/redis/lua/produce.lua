-- Appends one message to a shard unless this call stored it before; delayed ones that are due go first. Four inner calls
-- where there is no limit and nothing is due.
-- What is nearly always asked is answered first, before the functions below are even made: each costs a part of a call.
-- KEYS[1] state    hash
-- KEYS[2] seen     page of a producer's call numbers, a bit for each; a repeated call names the same page and number
-- KEYS[3] stream   stream
-- KEYS[4] delayed  sorted set
-- ARGV[1] epoch
-- ARGV[2] number of the call in its page, from 0
-- ARGV[3] how long the call may be repeated, ms
-- ARGV[4] max_backlog, 0 for none
-- ARGV[5] field of the entry: m (msgpack envelope) or j (JSON envelope)
-- ARGV[6] envelope
-- Returns: the entry id, 0 if stored already, or a code.
local open = redis.call('HGET', KEYS[1], 'open')
local plain = open == ARGV[1]
if open and not plain then
  local epoch, due = open:match('^(%d+) (%d+)$')
  if epoch == ARGV[1] then
    local time = redis.call('TIME')
    plain = tonumber(due) > tonumber(time[1]) * 1000 + tonumber(time[2]) / 1000
  end
end
if plain and ARGV[4] == '0' then
  -- SETBIT is refused above maxmemory, and so guards the writes after it. Its '1' is text: Redis prints a number of Lua's
  -- with all its digits.
  if redis.call('SETBIT', KEYS[2], ARGV[2], '1') == 1 then
    return 0 -- STORED_ALREADY
  end
  redis.call('PEXPIRE', KEYS[2], ARGV[3])
  return redis.call('XADD', KEYS[3], '*', ARGV[5], ARGV[6])
end
--- @include codes
--- @include admit
--- @include now
--- @include delayed
--- @include overdue
local admitted, due = admit(KEYS[1], KEYS[3], KEYS[4], ARGV[1], tonumber(ARGV[4]))
if admitted == 1 and move_overdue(KEYS[1], KEYS[3], KEYS[4], due) then
  admitted = MORE_DUE
end
if admitted ~= 1 then
  if redis.call('GETBIT', KEYS[2], ARGV[2]) == 1 then
    return STORED_ALREADY
  end
  return admitted
end
if redis.call('SETBIT', KEYS[2], ARGV[2], '1') == 1 then
  return STORED_ALREADY
end
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return redis.call('XADD', KEYS[3], '*', ARGV[5], ARGV[6])
