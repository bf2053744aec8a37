-- Stores one message unless its dedupe id was stored within the time to live; now, or for later.
-- KEYS[1] state    hash
-- KEYS[2] stream   stream
-- KEYS[3] delayed  sorted set
-- KEYS[4] wake     stream
-- KEYS[5...] seen  the small hash of this id in each generation, the newest first
-- ARGV[1] epoch
-- ARGV[2] hash of the dedupe id, 16 bytes
-- ARGV[3] life of the id (dedupe_ttl), ms
-- ARGV[4] max_backlog, 0 for none
-- ARGV[5] field of the entry
-- ARGV[6] envelope
-- ARGV[7] due time: '' for now, else ms since the epoch, or ms from now when ARGV[8] is 1
-- ARGV[8] 1 if the due time counts from now
-- ARGV[9] the layout of generations that the keys were made from
-- ARGV[10] most ids to remember
-- ARGV[11] a small number that stands for this call
-- ARGV[12] 1 if this call may have been made before, with its reply lost; else 0
-- Returns: the entry id or 1 if stored, 0 if stored already, a code, or {SEEN_LAYOUT, layout}: call again with that.
--- @include codes
--- @include admit
--- @include now
--- @include delayed
--- @include overdue
--- @include schedule
--- @include seen
if redis.call('EXISTS', KEYS[1]) == 0 then
  return NO_STATE
end
local now = now_ms()
local ttl = tonumber(ARGV[3])
local layout, held = seen_layout(KEYS[1], 'seen', now, ttl)
if layout ~= ARGV[9] then
  return { SEEN_LAYOUT, layout }
end
for i = 5, #KEYS do
  local by = redis.call('HGET', KEYS[i], ARGV[2])
  if by then
    -- A call repeated after a lost reply is told that it stored the message. Two calls may have one number, so what is
    -- made for the first time never is.
    return ARGV[12] == '1' and by == ARGV[11] and 1 or STORED_ALREADY
  end
end
local admitted, due_first = admit(KEYS[1], KEYS[2], KEYS[3], ARGV[1], tonumber(ARGV[4]))
if admitted ~= 1 then
  return admitted
end
if held >= tonumber(ARGV[10]) then
  return IDS_FULL
end
if move_overdue(KEYS[1], KEYS[2], KEYS[3], due_first) then
  return MORE_DUE
end
seen_add(KEYS[1], 'seen', KEYS[5], ARGV[2], ARGV[11], ttl)
if ARGV[7] == '' then
  return redis.call('XADD', KEYS[2], '*', ARGV[5], ARGV[6])
end
local due = tonumber(ARGV[7])
if ARGV[8] == '1' then
  due = due + now
end
schedule(KEYS[1], KEYS[2], KEYS[3], KEYS[4], due, ARGV[5], ARGV[6])
return 1
