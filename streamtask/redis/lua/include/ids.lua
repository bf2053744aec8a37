-- Ids of entries by their digits: a number of Lua's has 53 bits, and an id, which its producer may have chosen, twice 64.
local function number_lt(a, b)
  return #a < #b or (#a == #b and a < b)
end

local function id_le(a, b)
  local a_ms, a_seq = a:match('^(%d+)-(%d+)$')
  local b_ms, b_seq = b:match('^(%d+)-(%d+)$')
  return number_lt(a_ms, b_ms) or (a_ms == b_ms and not number_lt(b_seq, a_seq))
end
