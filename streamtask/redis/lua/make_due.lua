-- Makes delayed messages of a shard due now, in the order of their produce calls: members begin with a sequence number. To be
-- repeated until fewer than asked for were not due.
-- KEYS[1] state    hash
-- KEYS[2] delayed  sorted set
-- ARGV[1] most to look at in this call
-- Returns: how many were not due yet, as far as was looked
--- @include delayed
local later = redis.call('ZRANGEBYSCORE', KEYS[2], '(0', '+inf', 'LIMIT', 0, tonumber(ARGV[1]))
for i = 1, #later do
  -- ZREM first: a write that Redis allows above maxmemory lets the next one through.
  redis.call('ZREM', KEYS[2], later[i])
  redis.call('ZADD', KEYS[2], 0, later[i])
end
note_due(KEYS[1], KEYS[2])
return #later
