-- The fields of an entry as few enough values for one call of XADD: many of them become one field, which the readers
-- of messages (redis/wire.py) know. Lua's stack takes some 8,000 values, and a foreign producer may have sent more.
local function narrow(fields)
  if #fields <= 2000 then
    return fields
  end
  return { 'packed', cmsgpack.pack(fields) }
end
