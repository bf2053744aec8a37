-- Gives an owner what there is for it: what is due moves into the stream, then entries on offer come, the oldest first, then
-- new ones. Of a queue's shared streams, one for each priority, all at once, the most urgent first.
-- KEYS[1] lease     hash
-- KEYS[2] stream    stream
-- KEYS[3] state     hash
-- KEYS[4] notes     hash
-- KEYS[5] delayed   sorted set by due time, ms
-- KEYS[6] wake      stream
-- KEYS[7] requeued  sorted set of entry ids
-- KEYS[8...] the same of each further stream
-- ARGV[1] token
-- ARGV[2] incarnation
-- ARGV[3] group
-- ARGV[4] consumer
-- ARGV[5] most entries to give
-- ARGV[6] 1: new ones, too; 0: only those on offer
-- ARGV[7] how often fetches were made void under the lease, as the caller knows
-- ARGV[8...] token of the lease of each further stream, and how often there, ...
-- Returns: {now (ms), {last delivered id, newest wake id, when the next is due (ms) or -1, 1 if more are on offer else 0, entries
-- from there {{id, fields, note or ''}, ...}, new entries} for each stream ...}, or LEASE_LOST where any is another's, or the
-- call comes late, over a connection that broke for the caller
--- @include codes
--- @include fence
--- @include delayed
--- @include due
--- @include last_delivered
--- @include now
--- @include pending
if not owns(KEYS[1], ARGV[1], ARGV[2]) then
  return LEASE_LOST
end
local function is_late(lease, voided)
  return tonumber(redis.call('HGET', lease, 'voided') or '0') > tonumber(voided)
end
if is_late(KEYS[1], ARGV[7]) then
  return LEASE_LOST
end
local streams = (#ARGV - 7) / 2
for i = 1, streams do
  local lease = KEYS[7 * i + 1]
  if not owns(lease, ARGV[2 * i + 6], ARGV[2]) or is_late(lease, ARGV[2 * i + 7]) then
    return LEASE_LOST
  end
end
local now = now_ms()
local left = tonumber(ARGV[5])
-- Numbers that are always the same are text: Redis prints a number of Lua's with all its digits, which takes as long as a look.

local function look(stream, state, notes, delayed, wake, requeued)
  local due = note_due(state, delayed)
  if due >= 0 and due <= now then
    move_due(delayed, stream, now, 500)
    due = note_due(state, delayed)
  end
  local again, fresh = {}, {}
  local ids = left > 0 and redis.call('ZRANGE', requeued, '0', left - 1) or {}
  local more = (left <= 0 or #ids == left) and 1 or 0
  for i = 1, #ids do
    redis.call('ZREM', requeued, ids[i])
    local entry = is_pending(stream, ARGV[3], ids[i]) and redis.call('XRANGE', stream, ids[i], ids[i])[1]
    if entry then
      redis.call('XCLAIM', stream, ARGV[3], ARGV[4], 0, ids[i], 'JUSTID')
      again[#again + 1] = { entry[1], entry[2], redis.call('HGET', notes, ids[i]) or '' }
    else
      redis.call('XACK', stream, ARGV[3], ids[i])
      redis.call('HDEL', notes, ids[i])
    end
  end
  left = left - #again
  if left > 0 and ARGV[6] == '1' then
    local found = redis.call('XREADGROUP', 'GROUP', ARGV[3], ARGV[4], 'COUNT', left, 'STREAMS', stream, '>')
    fresh = found and found[1][2] or {}
    left = left - #fresh
  end
  local last = #fresh > 0 and fresh[#fresh][1] or last_delivered(stream, ARGV[3])
  local rung = redis.call('XREVRANGE', wake, '+', '-', 'COUNT', '1')[1]
  more = more == 1 and redis.call('EXISTS', requeued) or 0
  return { last, rung and rung[1] or '0-0', due, more, again, fresh }
end

local reply = { now, look(KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]) }
for i = 1, streams do
  reply[#reply + 1] = look(unpack(KEYS, 7 * i + 2, 7 * i + 7))
end
return reply
