"""What a workload measures with: the server, the counters, a producer and a worker of any contestant."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .adapters.common import SLOT, SLOTS, STAMP
from .processes import ROOT, BenchmarkFailed, log_of, running, wait_for

ADAPTERS = Path(__file__).resolve().parent / "adapters"
START_TIMEOUT_S = 60.0

Figures = dict[str, float]


@dataclass(frozen=True)
class Contestant:
    """A program that takes part. ``python`` is that of its virtual environment, or ours."""

    name: str
    adapter: str
    title: str
    python: str = sys.executable
    peer: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    """Told to its adapter in all workloads, with those of the entry."""

    def argv(self, *words: object) -> list[str]:
        return [self.python, str(ADAPTERS / f"{self.adapter}.py"), *map(str, words)]


@dataclass(frozen=True)
class Entry:
    """A contestant in one workload. ``label`` is what its figures are called by."""

    contestant: Contestant
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1
    concurrency: int = 0


@dataclass(frozen=True)
class Producer:
    """Talks to ``adapters/NAME.py produce``."""

    process: subprocess.Popen[str]
    log: Path

    def __call__(self, do: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"ended with status {self.process.wait()}"}
        if isinstance(answer, dict) and "error" in answer:
            raise BenchmarkFailed(f"{do}: {answer['error']}\n{log_of(self.log.parent, self.log.stem)}")
        return answer


@dataclass
class Bench:
    """``folder`` is the run's own; ``scale`` what the sizes are multiplied by (far below 1 in a smoke test)."""

    folder: Path
    client: Any
    scale: float = 1.0
    seconds: float = 1.0
    """How long a measurement should take."""
    rates: dict[str, float] = field(default_factory=dict)
    """How many no-op tasks per second each label drained last: what comes later is sized by it."""

    @property
    def port(self) -> int:
        return int(self.client.connection_pool.connection_kwargs["port"])

    def clear(self) -> None:
        """Nothing is left of what was measured before."""
        self.client.flushall()
        self.client.config_resetstat()
        for name in ("started", "ended"):
            (self.folder / name).write_bytes(b"")
        (self.folder / "counters").write_bytes(bytes(SLOT.size * SLOTS))

    def env(self, entry: Entry) -> dict[str, str]:
        path = [str(ADAPTERS)]
        if not entry.contestant.peer:
            path.append(str(ROOT))  # what is measured is the checkout that this file lies in
        return {
            "BENCH_URL": f"redis://127.0.0.1:{self.port}/0",
            "BENCH_FOLDER": str(self.folder),
            "TMPDIR": str(self.folder),  # who is killed leaves its files there
            "BENCH_OPTIONS": json.dumps({**entry.contestant.options, **entry.options}),
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONUNBUFFERED": "1",
        }

    @contextlib.contextmanager
    def producer(self, entry: Entry) -> Iterator[Producer]:
        name = f"{entry.label}-producer".replace(" ", "-").replace("/", "-")
        argv = entry.contestant.argv("produce")
        with running(name, argv, self.folder, self.env(entry), pipes=True) as process:
            yield Producer(process, self.folder / f"{name}.log")

    @contextlib.contextmanager
    def worker(self, entry: Entry, name: str = "worker") -> Iterator[Worker]:
        argv = entry.contestant.argv("worker", entry.processes, entry.concurrency)
        began = time.perf_counter()
        with running(name, argv, self.folder, self.env(entry)) as process:
            yield Worker(process, self.folder, name, began)

    def fill(self, entry: Entry, task: str, n: int, **more: Any) -> None:
        with self.producer(entry) as produce:
            produce("fill", task=task, n=n, **more)

    @contextlib.contextmanager
    def counters(self) -> Iterator[Counters]:
        with (
            open(self.folder / "counters", "r+b") as file,
            mmap.mmap(file.fileno(), 0) as pages,
            memoryview(pages) as raw,
            raw.cast("q") as cells,
        ):
            yield Counters(cells)

    def stamps(self, name: str) -> list[tuple[int, float]]:
        """Numbers and instants that the bodies wrote, in the order of writing."""
        data = (self.folder / name).read_bytes()
        return list(STAMP.iter_unpack(data[: len(data) // STAMP.size * STAMP.size]))


@dataclass(frozen=True)
class Counters:
    """What the bodies have counted, see ``common.claim_slot``."""

    cells: memoryview

    def total(self) -> int:
        cells = self.cells
        taken = cells[0]
        if taken >= SLOTS:
            raise BenchmarkFailed("more threads and processes than places for counters")
        return sum(cells[3 : 2 * taken + 2 : 2].tolist())

    def pids(self) -> list[int]:
        """The processes that run bodies."""
        return sorted(set(self.cells[2 : 2 * self.cells[0] + 2 : 2].tolist()))


@dataclass(frozen=True)
class Worker:
    process: subprocess.Popen[str]
    folder: Path
    name: str
    began: float
    """When it was started, by perf_counter."""

    def log(self) -> str:
        return log_of(self.folder, self.name)

    def wait_for(self, counters: Counters, count: int, timeout: float, poll: float = 0.002) -> None:
        what = f"{count} tasks to be run"
        wait_for(lambda: counters.total() >= count, timeout, what, self.process, self.log, poll)
