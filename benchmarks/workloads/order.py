"""Calls for one user in a row, and four worker processes: how many start before an earlier call of their user?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..adapters.common import ROW, arguments
from ..bench import START_TIMEOUT_S, Bench, Contestant, Entry, Figures
from ..processes import BenchmarkFailed
from . import Workload, each, everybody
from .drain import DRAIN_TIMEOUT_S

MESSAGES = 10_000
PROCESSES = 4


def entries(contestants: Sequence[Contestant]) -> list[Entry]:
    """The bare programs too: they are what one writes by hand."""
    return [replace(one, processes=PROCESSES) for one in everybody(contestants)]


def order(bench: Bench, entry: Entry) -> Figures:
    bench.clear()
    n = max(500, int(MESSAGES * bench.scale))
    with bench.counters() as counters, bench.worker(entry) as worker, bench.producer(entry) as produce:
        # All processes are to be there when the calls come, or one would do all the work.
        produce("fill", task="noop", n=200)
        worker.wait_for(counters, 200, START_TIMEOUT_S)
        produce("fill", task="stamp", n=n, row=ROW)
        worker.wait_for(counters, 200 + n, DRAIN_TIMEOUT_S)
        busy = len(counters.pids())
    started: dict[int, float] = {}
    for number, instant in bench.stamps("started"):
        started.setdefault(number, instant)
    if len(started) < n:
        raise BenchmarkFailed(f"{n - len(started)} of {n} calls were not run")
    last: dict[int, int] = {}
    pairs = wrong = 0
    for number, (user, *_) in enumerate(arguments("stamp", 0, n, row=ROW)):
        if user in last:
            pairs += 1
            wrong += started[number] < started[last[user]]
        last[user] = number
    return {"out_of_order": wrong, "pairs": pairs, "processes": busy}


WORKLOAD = Workload("order", "calls of one user, four processes", entries, each(order), rounds=0)
