"""The list of all workloads, in the order in which they run."""

from __future__ import annotations

from . import Workload, drain, enqueue, latency, memory

WORKLOADS: tuple[Workload, ...] = (
    enqueue.WORKLOAD,
    drain.DRAIN,
    drain.EACH,
    drain.TWO,
    drain.SLEEP1,
    drain.SLEEP10,
    latency.REST,
    latency.LOAD,
    memory.MEMORY,
    memory.IDS,
)
