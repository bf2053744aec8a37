-- Reads new entries for an owner where Redis refuses the watched transaction: above maxmemory, before Redis 8.
-- KEYS[1] lease    hash
-- KEYS[2] stream   stream
-- ARGV[1] token
-- ARGV[2] incarnation
-- ARGV[3] group
-- ARGV[4] consumer
-- ARGV[5] most entries to read
-- Returns: entries {{id, fields}, ...}, or LEASE_LOST
--- @include codes
--- @include fence
if not owns(KEYS[1], ARGV[1], ARGV[2]) then
  return LEASE_LOST
end
local reply = redis.call('XREADGROUP', 'GROUP', ARGV[3], ARGV[4], 'COUNT', ARGV[5], 'STREAMS', KEYS[2], '>')
if not reply then
  return {}
end
return reply[1][2]
