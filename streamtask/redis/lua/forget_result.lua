-- Removes the result of a message that is to run again.
-- KEYS[1] result   string
-- ARGV[1] the pair that a payload ends with which is this message's
-- Returns: 1, or 0 where there is no result, or another message's
local mine = ARGV[1]
local there = redis.pcall('GET', KEYS[1])
if type(there) ~= 'string' or there:sub(-#mine) ~= mine then
  return 0
end
return redis.call('DEL', KEYS[1])
