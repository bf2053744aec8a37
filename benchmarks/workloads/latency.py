"""Milliseconds from before the produce call to the first statement of the body: at rest, and at half load."""

from __future__ import annotations

from ..bench import START_TIMEOUT_S, Bench, Entry, Figures
from ..processes import BenchmarkFailed
from . import Workload, each, everybody
from .drain import sized

AT_REST = 250
SPACING_S = 0.01
MOST_PER_S = 5000


def at_rest(bench: Bench, entry: Entry) -> Figures:
    return latency(bench, entry, max(20, int(AT_REST * min(1, 10 * bench.scale))), SPACING_S)


def half_load(bench: Bench, entry: Entry) -> Figures:
    sized(bench, entry)
    rate = min(MOST_PER_S, bench.rates.get(entry.label, 2000) / 2)
    return latency(bench, entry, max(50, int(rate * bench.seconds * min(1, 10 * bench.scale))), 1 / rate)


def latency(bench: Bench, entry: Entry, n: int, spacing: float) -> Figures:
    bench.clear()
    warm_up = max(20, n // 10)
    with bench.counters() as counters, bench.producer(entry) as produce, bench.worker(entry) as worker:
        produce("pace", task="stamp", n=1, interval=0)
        worker.wait_for(counters, 1, START_TIMEOUT_S)  # until here the worker has been starting
        sent: list[float] = produce("pace", task="stamp", n=n + warm_up, interval=spacing, first=1)["sent"]
        worker.wait_for(counters, n + warm_up + 1, START_TIMEOUT_S)
    started = dict(bench.stamps("started"))
    if sorted(started) != list(range(n + warm_up + 1)):
        raise BenchmarkFailed(f"{len(started)} tasks of {n + warm_up + 1} were run")
    taken = sorted(1000 * (started[number + 1] - sent[number]) for number in range(warm_up, n + warm_up))
    return {
        "p50_ms": taken[n // 2],
        "p99_ms": taken[min(n - 1, n * 99 // 100)],
        "offered_per_s": (n - 1) / (sent[-1] - sent[-n]),
    }


REST = Workload("latency", "latency at rest, ms", everybody, each(at_rest))
LOAD = Workload("load", "latency at half load, ms", everybody, each(half_load), rounds=0.6)
