-- Counts one crash for each entry whose body ran when its process died and that is at fault. Of one that its process was ended
-- for, at its time limit, it writes down just that: the next owner, who knows the task, counts a failed run. The others are spared:
-- that their bodies started is forgotten, lest the next owner counts it. Called by the supervisor before it frees the lease; an
-- entry is charged once per token, however often this is repeated.
-- KEYS[1] lease    hash
-- KEYS[2] stream   stream
-- KEYS[3] notes    hash entry id -> "attempt due_ms crashes mark charged held"
-- ARGV[1] token of the process that died
-- ARGV[2] incarnation of the process that died
-- ARGV[3] group
-- ARGV[4...] entry id, 0 spared, 1 at fault, 2 overran its time limit, ...
-- Returns: how many were charged, or LEASE_LOST
--- @include codes
--- @include fence
--- @include pending
if not owns(KEYS[1], ARGV[1], ARGV[2]) then
  return LEASE_LOST
end
local charged = 0
for i = 4, #ARGV, 2 do
  if is_pending(KEYS[2], ARGV[3], ARGV[i]) then
    local note = redis.call('HGET', KEYS[3], ARGV[i]) or '0 0 0 0 0 0'
    local attempt, due, crashes, mark, by, held = note:match('^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+)$')
    if not attempt then  -- what no script has written
      attempt, due, crashes, mark, by, held = '0', '0', '0', '0', '0', '0'
    end
    if ARGV[i + 1] == '0' then
      if mark ~= '0' then
        redis.call('HDEL', KEYS[3], ARGV[i])
        redis.call('HSET', KEYS[3], ARGV[i], table.concat({ attempt, due, crashes, '0', by, held }, ' '))
      end
    elseif by ~= ARGV[1] then
      if ARGV[i + 1] == '2' then
        due, held = '0', '3'
      else
        crashes = string.format('%d', tonumber(crashes) + 1)
      end
      redis.call('HDEL', KEYS[3], ARGV[i])
      redis.call('HSET', KEYS[3], ARGV[i], table.concat({ attempt, due, crashes, '0', ARGV[1], held }, ' '))
      charged = charged + 1
    end
  end
end
return charged
