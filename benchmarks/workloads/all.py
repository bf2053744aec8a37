"""The list of all workloads, in the order in which they run."""

from __future__ import annotations

from . import Workload, beside, celery, crash, drain, enqueue, idle, latency, memory, order, scale

WORKLOADS: tuple[Workload, ...] = (
    enqueue.WORKLOAD,
    drain.DRAIN,
    drain.EACH,
    drain.TWO,
    beside.THREADS,
    beside.COROUTINES,
    drain.SLEEP1,
    drain.SLEEP10,
    beside.ASLEEP10,
    latency.REST,
    latency.LOAD,
    order.WORKLOAD,
    crash.WORKLOAD,
    idle.WORKLOAD,
    memory.MEMORY,
    memory.IDS,
    scale.SHARDS_WORKLOAD,
    scale.BACKLOG,
)

CELERY = celery.WORKLOADS
"""What runs with --celery, instead of those."""

QUICK = ("enqueue", "drain", "each", "two", "threads", "coroutines", "latency", "idle", "memory", "ids")
"""What runs where nothing else is asked for: under five minutes, without other frameworks."""
