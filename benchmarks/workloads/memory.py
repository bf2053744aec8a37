"""Bytes of Redis for a queued message, and for an id that is remembered.

Two answers each: what MEMORY USAGE says of the keys, and by how much used_memory grows. The latter is the honest one:
MEMORY USAGE leaves out a key's entry in the tables of keys and of expiry times.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..bench import Bench, Contestant, Entry, Figures
from ..processes import BenchmarkFailed
from ..server import used_memory
from . import Workload, called, each, everybody

MESSAGES = 20_000
WARM_UP = 500
TTL_S = 3600


def queued(bench: Bench, entry: Entry) -> Figures:
    """Bytes by which Redis grows with each call that waits."""
    bench.clear()
    n = max(200, int(MESSAGES * bench.scale))
    with bench.producer(entry) as produce:
        produce("fill", task="noop", n=WARM_UP)  # buffers of connections, keys that are there once
        before = used_memory(bench.client)
        produce("fill", task="noop", n=n, first=WARM_UP)
        figures = {"used_memory": (used_memory(bench.client) - before) / n}
        if entry.contestant.name == "streamtask":
            figures |= _streams(bench, produce("shard_names")["streams"], n + WARM_UP)
    return figures


def _streams(bench: Bench, names: Sequence[str], n: int) -> Figures:
    """The streams alone, and the same entries with the same ids added by XADD alone."""
    client = bench.client
    for name in names:
        pipe = client.pipeline(transaction=False)
        for entry_id, fields in client.xrange(name):
            pipe.xadd(f"again:{name}", fields, id=entry_id)
        pipe.execute()
    ours, bare = (_usage(client, [f"{prefix}{name}" for name in names]) for prefix in ("", "again:"))
    return {"stream": ours / n, "xadd": bare / n}


def _usage(client: Any, names: Sequence[Any]) -> int:
    pipe = client.pipeline(transaction=False)
    for name in names:
        pipe.memory_usage(name, samples=0)
    return sum(pipe.execute())


def ids(bench: Bench, entry: Entry) -> Figures:
    """Bytes of an id: streamtask's own of a produce call, a dedupe id, and a key for each id."""
    n = max(200, int(MESSAGES * bench.scale))
    client = bench.client
    bench.clear()
    if entry.label == "key per id":
        before = used_memory(client)
        pipe = client.pipeline(transaction=False)
        for _ in range(n):
            pipe.set(os.urandom(16), 1, ex=TTL_S)
        pipe.execute()
        grown = used_memory(client) - before
        return {"used_memory": grown / n, "memory_usage": _usage(client, client.keys()) / n}
    with bench.producer(entry) as produce:
        if entry.label == "produce id":
            produce("one", task="noop", n=n, seconds=1e9)
        else:
            produce("dedupe", n=n)
    # Only the ids, in an empty server: as the server had them, for it reads its own dumps.
    names = client.keys("*:seen:*")
    dumps = [(name, client.dump(name), max(1, client.pttl(name))) for name in names]
    if not dumps:
        raise BenchmarkFailed("no ids are remembered where they were looked for")
    usage = _usage(client, names)
    client.flushall()
    before = used_memory(client)
    pipe = client.pipeline(transaction=False)
    for name, dump, left in dumps:
        pipe.restore(name, left, dump)
    pipe.execute()
    return {"used_memory": (used_memory(client) - before) / n, "memory_usage": usage / n}


def id_entries(contestants: Sequence[Contestant]) -> list[Entry]:
    labels = ("produce id", "dedupe id", "key per id")
    return [Entry(one, label) for one in called(contestants, "streamtask") for label in labels]


MEMORY = Workload("memory", "Redis memory for a queued message, bytes", everybody, each(queued), rounds=0)
IDS = Workload("ids", "Redis memory for a remembered id, bytes", id_entries, each(ids), rounds=0)
