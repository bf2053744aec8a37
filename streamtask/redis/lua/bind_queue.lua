-- Declares a queue of the kombu transport, or binds it to an exchange. Nothing here ever expires by itself. A queue whose time
-- is over is not declared again before it was removed, with what is in it.
-- KEYS[1] queues    set of the queues' names
-- KEYS[2] expiring  sorted set queue -> when it expires unless it is used (ms)
-- KEYS[3] bound     set of the queue's bindings: exchange SEP routing key SEP pattern SEP queue
-- KEYS[4] bindings  set of the exchange's bindings: routing key SEP pattern SEP queue
-- KEYS[5] born      what was written at the first declaration ever, or since a flush
-- KEYS[6] epochs    hash queue -> epoch, and '' -> how many were deleted
-- ARGV[1] queue
-- ARGV[2] when the queue expires, ms from now; 0 for never; '' leaves that as it is
-- ARGV[3] exchange, or '' to declare only
-- ARGV[4] the binding: routing key SEP pattern SEP queue
-- ARGV[5] SEP
-- ARGV[6] what to write as born where nothing is
-- Returns: {what is born, the queue's epoch}, or 0 where the queue that is to be declared has expired
--- @include epoch
--- @include now
if ARGV[2] ~= '' and tonumber(redis.call('ZSCORE', KEYS[2], ARGV[1]) or 'inf') <= now_ms() then
  return 0
end
-- A write that Redis allows above maxmemory lets the next ones through: a consumer declares its queue before it drains it.
redis.call('ZREM', KEYS[2], '')
local epoch = epoch_of(KEYS[1], KEYS[6], ARGV[1])
if ARGV[2] ~= '' and tonumber(ARGV[2]) > 0 then
  redis.call('ZADD', KEYS[2], now_ms() + tonumber(ARGV[2]), ARGV[1])
elseif ARGV[2] == '0' then
  redis.call('ZREM', KEYS[2], ARGV[1])
end
if ARGV[3] ~= '' then
  redis.call('SADD', KEYS[4], ARGV[4])
  redis.call('SADD', KEYS[3], ARGV[3] .. ARGV[5] .. ARGV[4])
end
redis.call('SET', KEYS[5], ARGV[6], 'NX')
return { redis.call('GET', KEYS[5]), epoch }
