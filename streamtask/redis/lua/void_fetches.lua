-- Lets each fetch fail that was sent under this lease before: a transaction watches the guard, and the script knows how often
-- this was called. Nothing else changes.
-- KEYS[1] lease    hash
-- KEYS[2] guard    the token, a counter; of a shared stream the lease itself
-- ARGV[1] token
-- ARGV[2] incarnation
-- Returns: how often it was called under this lease, or LEASE_LOST
--- @include codes
--- @include fence
if not owns(KEYS[1], ARGV[1], ARGV[2]) then
  return LEASE_LOST
end
-- A write that Redis allows above maxmemory lets the next ones through: a full Redis must be drained.
redis.call('HDEL', KEYS[1], '')
if KEYS[1] ~= KEYS[2] then
  local last = redis.call('GET', KEYS[2])
  if last then
    redis.call('SET', KEYS[2], last)
  end
end
return redis.call('HINCRBY', KEYS[1], 'voided', 1)
