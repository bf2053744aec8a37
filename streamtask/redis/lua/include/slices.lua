-- Calls a function with the elements of a list, a thousand at a time: Lua's stack takes some 8,000, and a script that
-- fails there may have written already. Returns the sum of the answers.
local function by_slices(list, call)
  local sum = 0
  for i = 1, #list, 1000 do
    sum = sum + call(unpack(list, i, math.min(i + 999, #list)))
  end
  return sum
end
