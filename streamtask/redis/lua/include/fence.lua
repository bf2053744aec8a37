-- Whether (token, incarnation) own the lease. First statement of every script that changes a group's state.
-- Expiry is not asked: an owner may settle late as long as nobody took the lease.
local function owns(lease, token, incarnation)
  local record = redis.call('HMGET', lease, 'token', 'owner')
  return record[1] == token and record[2] == incarnation
end
