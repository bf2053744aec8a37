"""What a worker uses that has nothing to do: CPU, and commands that it sends."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..bench import START_TIMEOUT_S, Bench, Contestant, Entry, Figures
from ..processes import exact_cpu_seconds, tree
from . import Workload, each, frameworks

SETTLE_S = 3.0
IDLE_S = 10.0


def entries(contestants: Sequence[Contestant]) -> list[Entry]:
    return [Entry(one, one.name) for one in frameworks(contestants)]


def idle(bench: Bench, entry: Entry) -> Figures:
    bench.clear()
    share = min(1, 10 * bench.scale)
    with bench.counters() as counters, bench.worker(entry) as worker:
        bench.fill(entry, "noop", 1)
        worker.wait_for(counters, 1, START_TIMEOUT_S)
        time.sleep(SETTLE_S * share)
        pids = tree(worker.process.pid)
        with bench.client.monitor() as monitor:
            cpu, began = exact_cpu_seconds(pids), time.perf_counter()
            time.sleep(IDLE_S * share)
            cpu, seconds = exact_cpu_seconds(pids) - cpu, time.perf_counter() - began
            bench.client.echo("end of the idle time")
            sent, inner = 0, 0
            for command in monitor.listen():
                if "end of the idle time" in command["command"]:
                    break
                if command["client_type"] == "lua":
                    inner += 1
                else:
                    sent += 1
    return {
        "cpu_percent": 100 * cpu / seconds,
        "commands_per_s": sent / seconds,
        "per_process": sent / seconds / len(pids),
        "inner_per_s": inner / seconds,
    }


WORKLOAD = Workload("idle", "a worker without work", entries, each(idle), rounds=0)
