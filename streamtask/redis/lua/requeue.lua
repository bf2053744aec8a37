-- Puts pending entries of a shared stream on offer to every consumer, at the head. Repeating it changes nothing.
-- KEYS[1] lease      hash of the consumer that gives them back
-- KEYS[2] stream     stream
-- KEYS[3] requeued   sorted set of entry ids
-- KEYS[4] wake       stream
-- ARGV[1] token
-- ARGV[2] incarnation
-- ARGV[3] group
-- ARGV[4] how often calls were made void under the lease, as the caller knows; '' where it has taken no entry back since
-- ARGV[5...] entry ids
-- Returns: how many were pending with this consumer, or LEASE_LOST, also where the call comes late, over a connection that broke
-- for the caller: it has taken the entries back meanwhile, and may run them
--- @include codes
--- @include fence
--- @include pending
--- @include requeued
if not owns(KEYS[1], ARGV[1], ARGV[2]) then
  return LEASE_LOST
end
if ARGV[4] ~= '' and tonumber(redis.call('HGET', KEYS[1], 'voided') or '0') > tonumber(ARGV[4]) then
  return LEASE_LOST
end
local count = 0
for i = 5, #ARGV do
  if #pending_of(KEYS[2], ARGV[3], ARGV[i], ARGV[i], 1, ARGV[2]) > 0 then
    -- XCLAIM first: Redis allows it above maxmemory, and with it what follows.
    redis.call('XCLAIM', KEYS[2], ARGV[3], ARGV[2], 0, ARGV[i], 'JUSTID')
    requeue(KEYS[3], ARGV[i])
    count = count + 1
  end
end
if count > 0 then
  redis.call('XADD', KEYS[4], 'MAXLEN', '1', '*', 'w', 'requeued')
end
return count
