"""A Celery worker on our transport beside the same worker on kombu's redis transport, and on its memory transport, in which no
message leaves the process; keyed tasks beside plain ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..bench import Bench, Contestant, Entry, Figures
from . import Workload, called, each, enqueue, everybody, latency
from .drain import drain

TASKS = 3000
"""Some seconds' worth, the same number for all."""
SMOKE_TASKS = 200

LATE = {"late": True}
KEYED = {"keyed": True}


def with_keyed(contestants: Sequence[Contestant]) -> list[Entry]:
    found = [entry for entry in everybody(contestants) if entry.contestant.name != "memory"]
    return found + [Entry(one, "keyed", KEYED) for one in called(contestants, "streamtask")]


def drain_entries(processes: int) -> Callable[[Sequence[Contestant]], list[Entry]]:
    """Each beside what it is compared with. Keyed tasks are always acknowledged late, so the plain ones are here, too."""

    def entries(contestants: Sequence[Contestant]) -> list[Entry]:
        found = [Entry(one, one.name, processes=processes) for one in contestants]
        found += [Entry(one, f"{one.name}, late", LATE, processes) for one in contestants if one.name != "memory"]
        return found + [Entry(one, "keyed", KEYED, processes) for one in called(contestants, "streamtask")]

    return entries


def noop(bench: Bench, entry: Entry) -> Figures:
    n = max(SMOKE_TASKS, int(TASKS * bench.scale))
    # The first ones find a worker whose modules are still being imported, and shards that are still being taken.
    return drain(bench, entry, n, warm_up=n // 10)


WORKLOADS = (
    Workload("celery_enqueue", "Celery: delay(), calls/s", with_keyed, enqueue.run),
    Workload("celery_1", "Celery: draining no-op tasks, prefork -c 1", drain_entries(1), each(noop)),
    Workload("celery_4", "Celery: draining no-op tasks, prefork -c 4", drain_entries(4), each(noop)),
    Workload("celery_latency", "Celery: latency at rest, ms", with_keyed, each(latency.at_rest)),
)
