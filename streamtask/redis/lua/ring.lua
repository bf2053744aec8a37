-- Tells who waits for a shard that something about it has changed, also above maxmemory.
-- KEYS[1] wake     stream
-- ARGV[1] what
-- Returns: the new entry's id
-- A write that Redis allows above maxmemory lets the next one through.
redis.call('XDEL', KEYS[1], '0-1')
return redis.call('XADD', KEYS[1], 'MAXLEN', '1', '*', 'w', ARGV[1])
