-- The dedupe middleware: remembers which entry first carried each id, and answers who did.
-- KEYS[1] lease    hash
-- KEYS[2] seen record  hash
-- KEYS[3...] small hashes: for each id one per generation, the newest first
-- ARGV[1] token
-- ARGV[2] incarnation
-- ARGV[3] name of the set in the record
-- ARGV[4] life of an id, ms
-- ARGV[5] the layout of generations that the keys were made from
-- ARGV[6] most ids to remember; beyond, ids are looked up but not added
-- ARGV[7...] id (16 bytes), mark of its entry (a number)
-- Returns: for each id 1 if this entry runs, 0 if another entry has the id; or {SEEN_LAYOUT, layout}, or LEASE_LOST
--- @include codes
--- @include fence
--- @include now
--- @include seen
if not owns(KEYS[1], ARGV[1], ARGV[2]) then
  return LEASE_LOST
end
-- A write that Redis allows above maxmemory lets the next ones through: a full Redis must be drained.
redis.call('HDEL', KEYS[2], '')
local ttl = tonumber(ARGV[4])
local layout, held = seen_layout(KEYS[2], ARGV[3], now_ms(), ttl)
if layout ~= ARGV[5] then
  return { SEEN_LAYOUT, layout }
end
local count = (#ARGV - 6) / 2
local generations = (#KEYS - 2) / count
local answers = {}
for i = 0, count - 1 do
  local id, mark = ARGV[7 + 2 * i], ARGV[8 + 2 * i]
  local holder = false
  for g = 1, generations do
    holder = redis.call('HGET', KEYS[2 + i * generations + g], id)
    if holder then
      break
    end
  end
  if not holder and held < tonumber(ARGV[6]) then
    seen_add(KEYS[2], ARGV[3], KEYS[3 + i * generations], id, mark, ttl)
    held = held + 1
  end
  answers[i + 1] = (not holder or holder == mark) and 1 or 0
end
return answers
