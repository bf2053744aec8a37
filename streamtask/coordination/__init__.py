"""Who lives, who owns what: membership, leases and assignment. Knows shards and incarnations, no messages."""
