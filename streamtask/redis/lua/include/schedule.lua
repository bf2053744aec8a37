-- Puts a message among the delayed ones, at the earliest for now: one that is sent late does not go before what was sent
-- ahead of it. Wakes the owner when this one is now the next to fall due.
-- needs: delayed, now
local function schedule(state, delayed, wake, due_ms, field, envelope)
  local member = put_delayed(state, delayed, math.max(due_ms, now_ms()), field, envelope)
  if redis.call('ZRANGE', delayed, 0, 0)[1] == member then
    note_due(state, delayed)
    redis.call('XADD', wake, 'MAXLEN', '1', '*', 'w', 'due')
  end
end
