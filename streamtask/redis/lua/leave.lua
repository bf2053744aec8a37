-- Takes worker processes out of the members at once.
-- KEYS[1] members      sorted set
-- KEYS[2] member info  hash
-- ARGV[1...] incarnations
-- Returns: how many were members
local removed = 0
for i = 1, #ARGV do
  removed = removed + redis.call('ZREM', KEYS[1], ARGV[i])
  redis.call('HDEL', KEYS[2], ARGV[i])
end
return removed
