"""Two workers, and one of them is killed with kill -9 in mid-run: what is lost, what is run twice, how long it takes."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Sequence

from ..bench import START_TIMEOUT_S, Bench, Contestant, Entry, Figures
from ..processes import kill
from . import Workload, each, frameworks

TASKS = 2000
TASK_MS = 5
PATIENCE_S = 60.0


def entries(contestants: Sequence[Contestant]) -> list[Entry]:
    """Not the bare programs: nobody there takes over what a dead one had read."""
    return [Entry(one, one.name) for one in frameworks(contestants)]


def crash(bench: Bench, entry: Entry) -> Figures:
    bench.clear()
    n = max(200, int(TASKS * bench.scale))
    with contextlib.ExitStack() as stack:
        counters = stack.enter_context(bench.counters())
        produce = stack.enter_context(bench.producer(entry))
        workers = [stack.enter_context(bench.worker(entry, f"worker-{number}")) for number in (1, 2)]
        # Both are to be at work before the one is killed.
        produce("fill", task="noop", n=400)
        workers[0].wait_for(counters, 400, START_TIMEOUT_S)
        time.sleep(2 if bench.scale == 1 else 0.5)
        produce("fill", task="mark", n=n, ms=TASK_MS, row=1)
        began = time.monotonic()
        workers[0].wait_for(counters, 400 + n // 4, START_TIMEOUT_S)
        killed = time.monotonic()
        kill(workers[0].process)
        left = set(range(n))
        while left and time.monotonic() < killed + PATIENCE_S * min(1, 30 * bench.scale):
            time.sleep(0.05)
            left -= {number for number, _ in bench.stamps("ended")}
        time.sleep(0.5)  # for repetitions
    ended = bench.stamps("ended")
    first_end: dict[int, float] = {}
    for number, instant in ended:
        first_end.setdefault(number, instant)
    started = Counter(number for number, _ in bench.stamps("started"))
    figures = {
        "lost": float(n - len(first_end)),
        "run_twice": float(sum(count > 1 for count in Counter(number for number, _ in ended).values())),
        "started_twice": float(sum(count > 1 for count in started.values())),
    }
    if not figures["lost"]:
        last = max(first_end.values())
        figures |= {"done_s": last - began, "recovery_s": last - killed}
    return figures


WORKLOAD = Workload("crash", "one of two workers is killed", entries, each(crash), rounds=0)
