"""The lowest layer: connections, key names, Lua scripts and the wire format. Only this package imports redis-py."""
