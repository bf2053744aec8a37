"""Many bodies at once: what a queue adds to a thread pool and to asyncio, which run the same bodies without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..bench import Bench, Contestant, Entry, Figures
from . import Workload, called, each
from .drain import CONCURRENCY, alone, drain, sized, sleeping

WIDTH = 100
ASLEEP = 500
ALONE = 100_000
"""No-ops, a second's worth or two."""

THREADED = ("celery", "dramatiq", "huey")
ASYNC = ("arq", "saq", "taskiq", "streaq", "ardiq", "docket")
PLAIN: Mapping[str, Any] = {}
IN_ASYNCIO: Mapping[str, Any] = {"async": True}


def entries(
    width: int, peers: Sequence[str], options: Mapping[str, Any]
) -> Callable[[Sequence[Contestant]], list[Entry]]:
    """streamtask with and without keys, Python alone, and the peers of this kind."""

    def found(contestants: Sequence[Contestant]) -> list[Entry]:
        ours = [
            Entry(one, label, {**options, **more}, concurrency=width)
            for one in called(contestants, "streamtask")
            for label, more in (("streamtask", {}), ("keyless", {"keyed": False}))
        ]
        others = [one for one in contestants if one.name == "alone" or one.name in peers]
        return ours + [Entry(one, one.name, concurrency=width) for one in others]

    return found


def noops(way: str) -> Callable[[Bench, Entry], Figures]:
    """``way``: that of ``adapters/alone.py``."""

    def measure(bench: Bench, entry: Entry) -> Figures:
        if entry.contestant.name == "alone":
            return alone(bench, entry, way, "noop", max(2000, int(ALONE * bench.seconds * bench.scale)))
        # It has another speed than in other workloads, where its label is the same.
        return drain(bench, entry, sized(bench, replace(entry, label=f"{entry.label}, {way}")))

    return measure


THREADS = Workload(
    "threads",
    "draining no-op functions, sixteen threads",
    entries(CONCURRENCY, THREADED, PLAIN),
    each(noops("pool")),
)
COROUTINES = Workload(
    "coroutines",
    "draining no-op coroutines, a hundred at once",
    entries(WIDTH, ASYNC, IN_ASYNCIO),
    each(noops("gather")),
)
ASLEEP10 = Workload(
    "asleep10",
    "coroutines of 10 ms, five hundred at once",
    entries(ASLEEP, ASYNC, IN_ASYNCIO),
    each(sleeping(10, "tasks")),
)
