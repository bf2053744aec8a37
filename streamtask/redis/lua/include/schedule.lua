-- Puts a message among the delayed ones, or, where it is due already, at the stream's end. Wakes the owner when this one is
-- now the next to fall due.
-- needs: delayed, now
local function schedule(state, stream, delayed, wake, due_ms, field, envelope)
  if due_ms <= now_ms() then
    redis.call('XADD', stream, '*', field, envelope)
    return
  end
  local member = put_delayed(state, delayed, due_ms, field, envelope)
  if redis.call('ZRANGE', delayed, 0, 0)[1] == member then
    note_due(state, delayed)
    redis.call('XADD', wake, 'MAXLEN', '1', '*', 'w', 'due')
  end
end
