-- Appends one message to a shard unless its produce id was stored before. Four inner calls where there is no limit.
-- KEYS[1] state    hash
-- KEYS[2] seen     hash of produce ids; the caller names the same one again when it repeats a call
-- KEYS[3] stream   stream
-- KEYS[4] delayed  sorted set
-- ARGV[1] epoch
-- ARGV[2] produce id, 16 bytes
-- ARGV[3] life of the id, ms
-- ARGV[4] max_backlog, 0 for none
-- ARGV[5] field of the entry: m (msgpack envelope) or j (JSON envelope)
-- ARGV[6] envelope
-- Returns: the entry id, 0 if stored already, or a code.
--- @include codes
--- @include admit
local admitted = admit(KEYS[1], KEYS[3], KEYS[4], ARGV[1], tonumber(ARGV[4]))
if admitted ~= 1 then
  if redis.call('HEXISTS', KEYS[2], ARGV[2]) == 1 then
    return STORED_ALREADY
  end
  return admitted
end
-- HSETNX is refused above maxmemory, and so guards the writes after it.
if redis.call('HSETNX', KEYS[2], ARGV[2], 1) == 0 then
  return STORED_ALREADY
end
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return redis.call('XADD', KEYS[3], '*', ARGV[5], ARGV[6])
