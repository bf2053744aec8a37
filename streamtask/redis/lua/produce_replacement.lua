-- Stores a retry in the place of the pending entry that it repeats, so that its lane stays closed until it has run. Where
-- the entry is finished it is appended like any message; where another owner has it, that one runs it again, and this
-- retry of a former owner is left out.
-- KEYS[1] state     hash
-- KEYS[2] seen      page of a producer's call numbers, a bit for each
-- KEYS[3] stream    stream
-- KEYS[4] delayed   sorted set by due time, ms
-- KEYS[5] wake      stream
-- KEYS[6] lease     hash of the shard's owner
-- KEYS[7] notes     hash entry id -> "attempt due_ms crashes mark charged held"
-- KEYS[8] replaced  hash entry id -> "generation due_ms envelope"
-- ARGV[1] epoch
-- ARGV[2] number of the call in its page
-- ARGV[3] how long the call may be repeated, ms
-- ARGV[4] field of the entry: m
-- ARGV[5] envelope
-- ARGV[6] due time: ms since the epoch, 0 for now
-- ARGV[7] group
-- ARGV[8] entry id
-- ARGV[9] token of the delivery that is repeated
-- ARGV[10] generation: how many replacements came before, and 1
-- Returns: 1 if stored as a replacement, 2 if appended, 0 if stored already or left out, or a code
--- @include codes
--- @include admit
--- @include pending
--- @include now
--- @include delayed
--- @include overdue
--- @include schedule
-- A retry ignores the backlog limit.
local admitted, due = admit(KEYS[1], KEYS[3], KEYS[4], ARGV[1], 0)
if admitted ~= 1 then
  return admitted
end
local pending = is_pending(KEYS[3], ARGV[7], ARGV[8])
if not pending and move_overdue(KEYS[1], KEYS[3], KEYS[4], due) then
  return redis.call('GETBIT', KEYS[2], ARGV[2]) == 1 and STORED_ALREADY or MORE_DUE
end
if pending then
  -- Redis allows it above maxmemory, and with it what follows: the message is there already.
  redis.call('HDEL', KEYS[7], '')
end
if redis.call('SETBIT', KEYS[2], ARGV[2], 1) == 1 then
  return STORED_ALREADY
end
redis.call('PEXPIRE', KEYS[2], ARGV[3])
if pending then
  if redis.call('HGET', KEYS[6], 'token') ~= ARGV[9] then
    return STORED_ALREADY
  end
  local there = redis.call('HGET', KEYS[8], ARGV[8])
  if there and tonumber(there:match('^%d+') or '0') >= tonumber(ARGV[10]) then
    return STORED_ALREADY
  end
  redis.call('HSET', KEYS[8], ARGV[8], ARGV[10] .. ' ' .. ARGV[6] .. ' ' .. ARGV[5])
  redis.call('HSET', KEYS[7], ARGV[8], '0 ' .. ARGV[6] .. ' 0 0 0 0')
  return 1
end
schedule(KEYS[1], KEYS[3], KEYS[4], KEYS[5], tonumber(ARGV[6]), ARGV[4], ARGV[5])
return 2
