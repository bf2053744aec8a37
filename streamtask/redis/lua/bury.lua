-- Appends a dead letter of a message that is in no stream any more, also above maxmemory.
-- KEYS[1] state    hash
-- KEYS[2] dlq      stream
-- ARGV[1...] its fields and their values: four pairs of ours, then those of the message
-- Returns: the dead letter's id
--- @include narrow
local message = {}
for i = 9, #ARGV do
  message[i - 8] = ARGV[i]
end
message = narrow(message)
local fields = {}
for i = 1, 8 do
  fields[i] = ARGV[i]
end
for i = 1, #message do
  fields[8 + i] = message[i]
end
-- A write that Redis allows above maxmemory lets the next one through.
redis.call('HDEL', KEYS[1], '')
return redis.call('XADD', KEYS[2], '*', unpack(fields))
