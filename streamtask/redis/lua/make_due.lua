-- Makes all delayed messages of a shard due now, in the order of their produce calls: members begin with a sequence number.
-- KEYS[1] state    hash
-- KEYS[2] delayed  sorted set
-- Returns: how many there are
--- @include delayed
local number = redis.call('ZUNIONSTORE', KEYS[2], 1, KEYS[2], 'WEIGHTS', 0)
note_due(KEYS[1], KEYS[2])
return number
