-- Takes worker processes out of the members at once.
-- KEYS[1] members      sorted set
-- KEYS[2] member info  hash
-- ARGV[1...] incarnations
-- Returns: how many were members
local removed = redis.call('ZREM', KEYS[1], unpack(ARGV))
redis.call('HDEL', KEYS[2], unpack(ARGV))
return removed
