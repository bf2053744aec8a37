-- Gives a lease back. The token stays, so that the next owner's is larger.
-- KEYS[1] lease    hash
-- ARGV[1] token
-- ARGV[2] incarnation
-- Returns: 1, or LEASE_LOST
--- @include codes
--- @include fence
if not owns(KEYS[1], ARGV[1], ARGV[2]) then
  return LEASE_LOST
end
-- HDEL first: a write that Redis allows above maxmemory lets the next one through.
redis.call('HDEL', KEYS[1], 'expires_at')
redis.call('HSET', KEYS[1], 'owner', '')
return 1
