"""Worker processes: a supervisor keeps leases and children; each child owns shards and runs tasks."""
