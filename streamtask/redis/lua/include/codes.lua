-- What a script answers instead of doing its work: `Code` in redis/scripts.py. Each caller says what it means to it.
local STORED_ALREADY = 0
local LEASE_LOST = -1
local NO_STATE = -2 -- the shard's state is not there: never opened, or flushed
local SEALED = -3 -- the shard takes no more messages, or is of another epoch
local FULL = -4 -- the backlog limit is reached
local SEEN_LAYOUT = -5 -- the caller's picture of the id set is out of date
local IDS_FULL = -6 -- as many dedupe ids are remembered as the setting allows
local MORE_DUE = -7 -- delayed messages that are due go first, and are on their way: call again
