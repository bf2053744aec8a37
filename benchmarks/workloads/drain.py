"""Queued tasks per second of a worker that is started on them, and what it uses meanwhile.

All that is looked at comes from outside: the bodies count themselves in shared memory, the kernel knows the processes,
Redis its own work. The rate is that from the first body that has ended to the last, so that start-up is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ..bench import START_TIMEOUT_S, Bench, Contestant, Counters, Entry, Figures, Worker
from ..processes import BenchmarkFailed, cpu_seconds, peak_rss, tree
from ..server import commands_of, cpu_of
from . import Workload, called, each, everybody, frameworks

LEAST, MOST = 400, 300_000
DRAIN_TIMEOUT_S = 120.0
POLL_S = 0.001


class TooQuick(BenchmarkFailed):
    """There were too few tasks to measure anything."""


def drain(
    bench: Bench,
    entry: Entry,
    n: int,
    task: str = "noop",
    ms: float = 0.0,
    window: tuple[int, int] | None = None,
    warm_up: int = 1,
) -> Figures:
    """The rate is that of all tasks after the first WARM_UP; the window is one within these."""
    bench.clear()
    bench.fill(entry, task, n, ms=ms)
    client = bench.client
    with bench.counters() as counters, bench.worker(entry) as worker:
        worker.wait_for(counters, 1, START_TIMEOUT_S, POLL_S)
        started = time.perf_counter()
        worker.wait_for(counters, warm_up, DRAIN_TIMEOUT_S, POLL_S)
        first, began = counters.total(), time.perf_counter()
        pids = tree(worker.process.pid)
        cpu, redis_cpu, commands = cpu_seconds(pids), cpu_of(client), commands_of(client)
        looked = counters.total()
        figures: Figures = _window(counters, *window, worker) if window else {}
        worker.wait_for(counters, n, DRAIN_TIMEOUT_S, POLL_S)
        ended = time.perf_counter()
        redis_cpu, commands = cpu_of(client) - redis_cpu, commands_of(client) - commands - 1
        pids = tree(worker.process.pid)
        cpu = cpu_seconds(pids) - cpu
        memory = {pid: peak_rss(pid) for pid in pids}
        runners = [memory.get(pid, 0) for pid in counters.pids()]
        if first >= n:
            raise TooQuick(f"all {n} were run between two looks: take more")
        figures |= {
            "rate": (n - first) / (ended - began),
            "startup_s": started - worker.began,
            "n": n,
            "seconds": ended - began,
            "rss": float(sum(memory.values())),
            "rss_runner": float(max(runners, default=0)),
        }
        if looked < n:
            # Worth something only where most was still to be done.
            figures |= {
                "cpu_us_per_task": 1e6 * cpu / (n - looked),
                "redis_cpu_us_per_task": 1e6 * redis_cpu / (n - looked),
                "commands_per_task": commands / (n - looked),
            }
    return figures


def _window(counters: Counters, first: int, last: int, worker: Worker) -> Figures:
    """The rate between two counts. Looks without a pause: these are some hundredths of a second."""
    looks = []
    for count in (first, last):
        worker.wait_for(counters, count, DRAIN_TIMEOUT_S, poll=0.0002)
        looks.append((counters.total(), time.perf_counter()))
    (low, began), (high, ended) = looks
    return {"window_rate": (high - low) / (ended - began)} if high > low else {}


def sized(bench: Bench, entry: Entry) -> int:
    """How many no-op tasks take as long as a measurement should; small drains tell, the first time."""
    if bench.scale < 1:
        return 200 if entry.contestant.peer else int(MOST * bench.scale)
    n = LEAST
    while entry.label not in bench.rates:
        try:
            figures = drain(bench, entry, n)
            # The first moments are slow, or quick: what is too short says too little.
            if figures["seconds"] > 0.2 or n * 20 > MOST:
                bench.rates[entry.label] = figures["rate"]
        except TooQuick:
            pass
        n *= 20
    return int(min(MOST, max(LEAST, bench.rates[entry.label] * bench.seconds)))


def noop(bench: Bench, entry: Entry) -> Figures:
    figures = drain(bench, entry, sized(bench, entry))
    bench.rates[entry.label] = figures["rate"]
    return figures


def each_entries(contestants: Sequence[Contestant]) -> list[Entry]:
    return [Entry(one, "streamtask", {"ack": "each"}) for one in called(contestants, "streamtask")] + [
        Entry(one, "bare", {"batch": 1}) for one in called(contestants, "bare")
    ]


def noop_each(bench: Bench, entry: Entry) -> Figures:
    return drain(bench, entry, int(30_000 * bench.seconds * min(1, 10 * bench.scale)))


def two_entries(contestants: Sequence[Contestant]) -> list[Entry]:
    """Two processes, each at its best; and streamtask with as many shards as processes."""
    found = [Entry(one, one.name, processes=2) for one in frameworks(contestants)]
    for one in called(contestants, "streamtask"):
        found.append(Entry(one, "streamtask, 1 shard, 1 process", {"shards": 1}))
        found.append(Entry(one, "streamtask, 2 shards, 2 processes", {"shards": 2}, processes=2))
    return found


def noop_two(bench: Bench, entry: Entry) -> Figures:
    return drain(bench, entry, sized(bench, Entry(entry.contestant, entry.contestant.name)))


CONCURRENCY = 16


def alone(bench: Bench, entry: Entry, way: str, task: str, n: int, ms: float = 0.0) -> Figures:
    """What Python does by itself, in one of the ways of ``adapters/alone.py``."""
    bench.clear()
    with bench.producer(entry) as produce:
        answer = produce(way, task=task, n=n, width=entry.concurrency, ms=ms)
    return {"rate": answer["n"] / answer["seconds"], "n": answer["n"], "seconds": answer["seconds"]}


def sleep_entries(contestants: Sequence[Contestant]) -> list[Entry]:
    # The bare loops have no concurrency.
    some = frameworks(contestants) + called(contestants, "alone")
    return [Entry(one, one.name, concurrency=CONCURRENCY) for one in some]


def sleeping(ms: float, way: str = "threads") -> Callable[[Bench, Entry], Figures]:
    """Tasks that wait: how much of what so many at once could do is done. ``way``: see ``alone``."""

    def measure(bench: Bench, entry: Entry) -> Figures:
        most = entry.concurrency * 1000 / ms  # per second
        rate = min(most, bench.rates.get(entry.label, most / 2))
        n = max(4 * entry.concurrency, int(rate * bench.seconds * min(1, 20 * bench.scale)))
        if entry.contestant.name == "alone":
            figures = alone(bench, entry, way, "sleep", n, ms)
        else:
            figures = drain(bench, entry, n, "sleep", ms)
        return {"efficiency": figures["rate"] / most, **figures}

    return measure


DRAIN = Workload("drain", "draining no-op tasks, one process", everybody, each(noop))
EACH = Workload("each", "acknowledging each", each_entries, each(noop_each))
TWO = Workload("two", "draining no-op tasks, two processes", two_entries, each(noop_two))
SLEEP1 = Workload("sleep1", "tasks of 1 ms, sixteen at once", sleep_entries, each(sleeping(1)), rounds=0.6)
SLEEP10 = Workload("sleep10", "tasks of 10 ms, sixteen at once", sleep_entries, each(sleeping(10)), rounds=0.6)
