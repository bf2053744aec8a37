-- Forgets a kombu queue of a former epoch, when nothing is left of it.
-- KEYS[1] meta         hash
-- KEYS[2] members      sorted set
-- KEYS[3] member info  hash
-- ARGV[1] epoch
-- Returns: how many keys were there; 0 where meta is of another epoch
if (redis.call('HGET', KEYS[1], 'epoch') or '0') ~= ARGV[1] then
  return 0
end
return redis.call('UNLINK', KEYS[1], KEYS[2], KEYS[3])
