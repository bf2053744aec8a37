-- Counts a stream's entries behind an id, without shipping them. Reads only.
-- KEYS[1] stream   stream
-- ARGV[1] id to start behind
-- ARGV[2] most to count in this call
-- Returns: {count, id of the last one counted}
local entries = redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', ARGV[2])
if #entries == 0 then
  return { 0, ARGV[1] }
end
return { #entries, entries[#entries][1] }
