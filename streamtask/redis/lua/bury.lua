-- Appends a dead letter of a message that is in no stream any more, also above maxmemory.
-- KEYS[1] state    hash
-- KEYS[2] dlq      stream
-- ARGV[1...] its fields and their values
-- Returns: the dead letter's id
-- A write that Redis allows above maxmemory lets the next one through.
redis.call('HDEL', KEYS[1], '')
return redis.call('XADD', KEYS[2], '*', unpack(ARGV))
