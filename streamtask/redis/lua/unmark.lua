-- Takes back that bodies start: no crash is to be counted for them. What else stands beside an entry, and what another
-- owner has marked, stays.
-- KEYS[1] lease    hash
-- KEYS[2] notes    hash entry id -> "attempt due_ms crashes mark charged held"
-- ARGV[1] token
-- ARGV[2] incarnation
-- ARGV[3...] entry ids
-- Returns: how many marks were there, or LEASE_LOST
--- @include codes
--- @include fence
if not owns(KEYS[1], ARGV[1], ARGV[2]) then
  return LEASE_LOST
end
local count = 0
for i = 3, #ARGV do
  local note = redis.call('HGET', KEYS[2], ARGV[i])
  if note then
    local before, mark, after = note:match('^(%d+ %d+ %d+) (%d+) (%d+ %d+)$')
    if mark == ARGV[1] then
      -- HDEL first: a write that Redis allows above maxmemory lets the next one through.
      redis.call('HDEL', KEYS[2], ARGV[i])
      redis.call('HSET', KEYS[2], ARGV[i], before .. ' 0 ' .. after)
      count = count + 1
    end
  end
end
return count
