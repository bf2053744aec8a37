-- A set of ids in generations. A generation is 2^bits small hashes, so that each keeps a few dozen fields and with it
-- Redis' compact encoding (a listpack; a ziplist on 6.2). It ends when it holds its share of ids or is as old as half
-- the time to live; an id is looked up in all generations that still live. The layout is one field of a hash,
-- "number bits started_ms count;..." from the newest to the oldest; the newest's count has a field of its own.
local SEEN_FILL = 64 -- ids a small hash holds on average when its generation ends

-- Brings the layout up to date. Returns the layout as keys are made from it, and how many ids are held.
local function seen_layout(record, name, now, ttl_ms)
  local layout = redis.call('HGET', record, name) or ''
  local count = tonumber(redis.call('HGET', record, name .. ':count') or '0')
  local newest, bits, started = layout:match('^(%d+) (%d+) (%d+)')
  bits, started = tonumber(bits), tonumber(started)
  local full = newest and count >= SEEN_FILL * 2 ^ bits
  local aged = newest and now - started >= ttl_ms / 2
  local held, kept = count, {}
  for g, b, s, c in layout:gmatch('(%d+) (%d+) (%d+) (%d+)') do
    if g == newest then
      c = count
    else
      held = held + tonumber(c)
    end
    -- The last id of a generation came at most half a time to live after its start.
    if now - tonumber(s) < ttl_ms * 1.5 then
      kept[#kept + 1] = string.format('%s %s %s %d', g, b, s, c)
    end
  end
  if newest and not full and not aged then
    return layout, held
  end
  local next_bits = 2
  if full and not aged then
    next_bits = math.min(bits + 2, 12)
  elseif aged then
    while next_bits < 12 and SEEN_FILL * 2 ^ next_bits < count do
      next_bits = next_bits + 1
    end
  end
  table.insert(kept, 1, string.format('%d %d %.0f 0', tonumber(newest or '0') + 1, next_bits, now))
  layout = table.concat(kept, ';')
  redis.call('HSET', record, name, layout, name .. ':count', 0)
  return layout, held
end

-- Remembers an id with a value in a small hash of the newest generation.
local function seen_add(record, name, hash, id, value, ttl_ms)
  redis.call('HSET', hash, id, value)
  redis.call('PEXPIRE', hash, ttl_ms)
  redis.call('HINCRBY', record, name .. ':count', 1)
end
