-- Stores one message that falls due later, unless this call stored it before.
-- KEYS[1] state    hash
-- KEYS[2] seen     page of a producer's call numbers, a bit for each
-- KEYS[3] stream   stream
-- KEYS[4] delayed  sorted set by due time, ms
-- KEYS[5] wake     stream
-- ARGV[1] epoch
-- ARGV[2] number of the call in its page, from 0
-- ARGV[3] how long the call may be repeated, ms
-- ARGV[4] max_backlog, 0 for none
-- ARGV[5] field of the entry
-- ARGV[6] envelope
-- ARGV[7] due time: ms since the epoch, or ms from now when ARGV[8] is 1
-- ARGV[8] 1 if the due time counts from now on Redis' clock
-- Returns: 1 if stored, 0 if stored already, or a code.
--- @include codes
--- @include admit
--- @include now
--- @include delayed
--- @include overdue
--- @include schedule
local admitted, due_first = admit(KEYS[1], KEYS[3], KEYS[4], ARGV[1], tonumber(ARGV[4]))
if admitted == 1 and move_overdue(KEYS[1], KEYS[3], KEYS[4], due_first) then
  admitted = MORE_DUE
end
if admitted ~= 1 then
  if redis.call('GETBIT', KEYS[2], ARGV[2]) == 1 then
    return STORED_ALREADY
  end
  return admitted
end
local due = tonumber(ARGV[7])
if ARGV[8] == '1' then
  due = due + now_ms()
end
if redis.call('SETBIT', KEYS[2], ARGV[2], 1) == 1 then
  return STORED_ALREADY
end
redis.call('PEXPIRE', KEYS[2], ARGV[3])
schedule(KEYS[1], KEYS[3], KEYS[4], KEYS[5], due, ARGV[5], ARGV[6])
return 1
