"""Workers under test: an app in a module of its own, run by the real command line, and what its bodies wrote down.

Fixture ``site``: ``site(server, source, ...)`` writes the module, and gives an app to send with and pods to run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from streamtask import StreamTask
from streamtask.redis import wire
from streamtask.redis.keys import SHARED, QueueKeys
from streamtask.sharding import canonical, shard_of
from tests.chaos.checker import END, START, Event, Report, check
from tests.fix_proxy import Proxy
from tests.fix_redis import RedisServer
from tests.helpers import ROOT, Record, Spawned, is_alive, spawn, wait_until

HEAD = """
import asyncio, ctypes, json, os, signal, sys, threading, time
import streamtask
from streamtask import Dedupe, Ignore, Middleware, Reject, Retry, SoftTimeLimitExceeded, StreamTask
from streamtask.request import current

_fd = os.open(os.environ["LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

def note(kind, key, n, **more):
    r = current()
    line = [kind, time.monotonic(), os.getpid(), key, n, r.attempt, r.fencing_token, r.shard, r.id, more]
    os.write(_fd, json.dumps(line).encode() + b"\\n")

def make_app(**more):
    return StreamTask("t", broker=os.environ["B"], **{**json.loads(os.environ["OPTIONS"]), **more})
"""

TASKS = """
app = make_app()

def body(key, n, ms, fail):
    note("S", key, n)
    if ms:
        time.sleep(ms / 1000)
    if current().attempt < fail:
        note("F", key, n)
        raise ValueError(f"fails {fail} times")
    note("E", key, n)

@app.task(name="put", shard_key="k", retry_backoff=0.02, retry_jitter=False)
def put(k, n, ms=0, fail=0):
    body(k, n, ms, fail)

@app.task(name="gated", shard_key="k", retry_backoff=0.02, retry_jitter=False)
def gated(k, n):
    # Waits for a file of the test, for this process or for any; its text is the outcome.
    note("S", k, n)
    gates = [f"gate-{n}-{os.getpid()}", f"gate-{n}"]
    while not (there := [gate for gate in gates if os.path.exists(gate)]):
        time.sleep(0.005)
    with open(there[0]) as file:
        outcome = file.read()
    note("E" if outcome == "ok" else "F", k, n)
    if outcome == "fail":
        raise ValueError("as the gate says")
    if outcome == "reject":
        raise Reject("as the gate says")

@app.task(name="free", retry_backoff=0.02, retry_jitter=False)
def free(n, ms=0, fail=0):
    body(None, n, ms, fail)
"""


def keys_on(shard: int, count: int, shards: int = 8) -> list[str]:
    """So many shard keys that lie on one shard."""
    found: list[str] = []
    i = 0
    while len(found) < count:
        if shard_of(canonical(f"k{i}"), shards) == shard:
            found.append(f"k{i}")
        i += 1
    return found


def judge_log(spawned: Spawned) -> None:
    """The oracle of every test with workers: what only the audit has found was overlooked before."""
    log = spawned.stderr
    print(f"--- pod {spawned.pid}\n{log}")  # pytest shows it with a failure
    assert "found by the audit" not in log


class Pod:
    """One ``streamtask worker``: a supervisor with its processes."""

    def __init__(self, site: Site, spawned: Spawned) -> None:
        self._site = site
        self.spawned = spawned
        self.pid = spawned.pid

    def children(self) -> list[int]:
        """Pids of its worker processes, oldest first."""
        found = []
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for thread in os.listdir(f"/proc/{self.pid}/task"):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    found += [int(pid) for pid in Path(f"/proc/{self.pid}/task/{thread}/children").read_text().split()]
        return sorted(pid for pid in found if is_alive(pid))

    def kill_child(self, pid: int, number: int = signal.SIGKILL) -> None:
        self._site.killed[pid] = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def kill(self) -> None:
        """kill -9 of the supervisor; its children are to follow it."""
        now = time.monotonic()
        self._site.killed.update(dict.fromkeys(self.children(), now))
        self.spawned.kill()

    def kill_all(self) -> None:
        """kill -9 of all its processes at once."""
        self._site.killed.update(dict.fromkeys(self.children(), time.monotonic()))
        self.spawned.kill_group()

    def stop(self, timeout: float = 20) -> float:
        """SIGTERM, and waits for the end; how long it took."""
        began = time.monotonic()
        self.spawned.signal(signal.SIGTERM)
        status = self.spawned.wait(timeout)
        assert status == 0, str(self.spawned)
        return time.monotonic() - began

    @property
    def log(self) -> str:
        return self.spawned.stderr


class Site:
    """An app under test on a server: sends, starts pods, and looks into Redis."""

    def __init__(
        self, server: RedisServer, folder: Path, source: str, stack: contextlib.ExitStack, number: int, **options: Any
    ) -> None:
        self.server = server
        self.folder = folder
        self.options: dict[str, Any] = {"lease": 2.0, **options}
        self.shards = int(self.options.get("shards", 8))
        self.log = folder / f"log{number}"
        self._record = Record(self.log, Event, lambda event: event.kind == END and (event.key, event.n))
        self.killed: dict[int, float] = {}
        """When each process was killed, on the monotonic clock."""
        self.produced: dict[str | None, list[int]] = defaultdict(list)
        """What ``send`` has sent: the numbers by key."""
        self.audit_s = max(0.5, self.shards / 50)  # a process with many shards must not do that alone
        self._stack = stack
        self._module = f"sut{number}"
        (folder / f"{self._module}.py").write_text(HEAD + source)
        self.redis: redis.Redis = server.client()
        self.keys = QueueKeys("streamtask", "t", "default")
        self.app = self.load(server.url)

    def _env(self, url: str, **options: Any) -> dict[str, str | None]:
        return {
            "B": url,
            "STREAMTASK_AUDIT_S": str(self.audit_s),
            "LOG": str(self.log),
            "OPTIONS": json.dumps({**self.options, **options}),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(self.folder)]),
        }

    def load(self, url: str, **options: Any) -> StreamTask:
        """The app in this process, to send with; closed at the end of the test."""
        spec = importlib.util.spec_from_file_location(self._module, self.folder / f"{self._module}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        before = dict(os.environ)
        os.environ.update({name: value for name, value in self._env(url, **options).items() if value is not None})
        try:
            spec.loader.exec_module(module)
        finally:
            os.environ.clear()
            os.environ.update(before)
        app: StreamTask = module.app
        self._stack.callback(app.close)
        self._stack.callback(os.close, module._fd)
        return app

    def task(self, name: str) -> Any:
        return self.app.tasks[name]

    def send(self, key: str | None, numbers: list[int] | range, **more: Any) -> None:
        """Sends ``put`` (or ``free`` without a key) with these numbers, in bulk, and remembers them."""
        if key is None:
            self.task("free").send_many([{"n": n, **more} for n in numbers])
        else:
            self.task("put").send_many([{"k": key, "n": n, **more} for n in numbers])
        self.produced[key] += numbers

    def send_gated(self, key: str, n: int) -> None:
        """Sends ``gated``, whose body runs until ``open_gate``."""
        self.task("gated").delay(k=key, n=n)
        self.produced[key].append(n)

    def open_gate(self, n: int, pid: int | None = None, outcome: str = "ok") -> None:
        """Ends the bodies of ``gated`` number n, in one process or in all: ``ok``, ``fail`` or ``reject``."""
        gate = self.folder / (f"gate-{n}" if pid is None else f"gate-{n}-{pid}")
        written = self.folder / "gate-being-written"
        written.write_text(outcome)
        written.rename(gate)

    # Pods

    def pod(self, processes: int = 1, concurrency: int = 1, *, via: Proxy | None = None, **options: Any) -> Pod:
        """Starts ``streamtask worker``; it ends with the test. ``via``: a proxy that it reaches Redis through."""
        url = via.url if via else self.server.url
        spawned = self._stack.enter_context(
            spawn(
                "-m", "streamtask", "-A", f"{self._module}:app",
                "worker", "-p", str(processes), "-c", str(concurrency),
                env=self._env(url, **options), cwd=self.folder,
            )
        )  # fmt: skip
        self._stack.callback(judge_log, spawned)
        return Pod(self, spawned)

    def command(self, *args: str) -> contextlib.AbstractContextManager[Spawned]:
        """Starts another ``streamtask`` command."""
        argv = ["-m", "streamtask", "-A", f"{self._module}:app", *args]
        return spawn(*argv, env=self._env(self.server.url), cwd=self.folder)

    def ready(self, processes: int, timeout: float = 15) -> dict[str, list[int]]:
        """Waits until so many processes live and hold all shards, evenly; the shards by incarnation."""

        def balanced() -> dict[str, list[int]] | None:
            owned = self.owned()
            counts = [len(shards) for shards in owned.values()]
            if len(owned) == processes and sum(counts) == self.shards and max(counts) - min(counts) <= 1:
                return owned
            return None

        found = wait_until(balanced, timeout, lambda: f"{processes} processes share the shards: {self.owned()}")
        assert found is not None
        return found

    # What Redis holds

    def members(self) -> dict[str, dict[str, Any]]:
        """The live worker processes: incarnation to what it said of itself."""
        now = self.now_ms()
        live = self.redis.zrangebyscore(self.keys.members("workers"), now, "+inf")
        info = self.redis.hgetall(self.keys.member_info("workers"))
        return {one.decode(): json.loads(info[one]) for one in live if one in info}

    def now_ms(self) -> int:
        seconds, micros = self.redis.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def lease(self, shard: int) -> dict[str, str]:
        found = self.redis.hgetall(self.keys.shard(0, shard).lease("workers"))
        return {name.decode(): value.decode() for name, value in found.items()}

    def leases(self) -> dict[int, tuple[str, int]]:
        """Owner and token of each shard whose lease has not expired."""
        now = self.now_ms()
        found = {shard: self.lease(shard) for shard in range(self.shards)}
        return {
            shard: (lease["owner"], int(lease["token"]))
            for shard, lease in found.items()
            if lease.get("owner") and int(lease["expires_at"]) > now
        }

    def owned(self) -> dict[str, list[int]]:
        """The shards of each live worker process."""
        found: dict[str, list[int]] = {member: [] for member in self.members()}
        for shard, (owner, _) in self.leases().items():
            if owner in found:
                found[owner].append(shard)
        return found

    def pid_of(self, shard: int) -> int:
        """The process that owns a shard."""
        owner = self.leases()[shard][0]
        return int(self.members()[owner]["pid"])

    def stream(self, shard: int | str) -> str:
        return self.keys.shard(0, shard).stream

    def all_shards(self) -> list[int | str]:
        return [*range(self.shards), SHARED]

    def left(self) -> dict[int | str, str]:
        """The shards on which something is still stored, and what."""
        found: dict[int | str, str] = {}
        for shard in self.all_shards():
            keys = self.keys.shard(0, shard)
            length, delayed = self.redis.xlen(keys.stream), self.redis.zcard(keys.delayed)
            notes, requeued = self.redis.hlen(keys.notes("workers")), self.redis.zcard(keys.requeued("workers"))
            if length or delayed or notes or requeued:
                found[shard] = f"{length} entries, {delayed} delayed, {notes} notes, {requeued} requeued"
        return found

    def pending(self, shard: int | str) -> list[dict[str, Any]]:
        return self.redis.xpending_range(self.stream(shard), "workers", "-", "+", 100_000)

    def consumers(self) -> dict[int | str, list[str]]:
        found: dict[int | str, list[str]] = {}
        for shard in self.all_shards():
            with contextlib.suppress(redis.ResponseError):  # no such group, or stream
                rows = self.redis.xinfo_consumers(self.stream(shard), "workers")
                found[shard] = [row["name"].decode() for row in rows]
        return found

    def stale_consumers(self) -> list[str]:
        """Consumers that no live process stands behind."""
        live = set(self.members())
        found = []
        for shard, names in self.consumers().items():
            if shard == SHARED:
                found += [f"shared: {name}" for name in names if name not in live]
            elif len(names) > 1:
                found.append(f"{shard}: {names}")
        return found

    def dead(self) -> list[dict[str, Any]]:
        """The dead letters: what the error says, and ``task``, ``key``, ``args``, ``kwargs`` and ``fields``."""
        found = []
        for shard in self.all_shards():
            for entry_id, fields in self.redis.xrange(self.keys.shard(0, shard).dlq):
                row: dict[str, Any] = {"shard": shard, "dlq_id": entry_id.decode(), "fields": fields}
                row |= json.loads(fields[b"error"])
                row["held"] = fields[b"held"] == b"1"
                with contextlib.suppress(Exception):
                    envelope = wire.decode([b"m", fields[b"m"]])
                    row |= dict(zip(("task", "key", "id", "args", "kwargs", "headers"), envelope, strict=True))
                found.append(row)
        return found

    # What the bodies wrote

    def events(self) -> list[Event]:
        return self._record.events()

    def of(self, kind: str, key: str | None = None, n: int | None = None) -> list[Event]:
        found = (event for event in self.events() if event.kind == kind)
        return [event for event in found if key in (None, event.key) and n in (None, event.n)]

    def started(self, key: str | None = None) -> list[int]:
        return [event.n for event in self.of(START, key)]

    def ended(self) -> int:
        """How many different messages have ended."""
        return len(self._record.ended())

    def wait_started(self, key: str | None = None, n: int | None = None, count: int = 1, timeout: float = 15) -> Event:
        found = wait_until(
            lambda: (seen := self.of(START, key, n)) and len(seen) >= count and seen,
            timeout, lambda: f"start {count} of {key}/{n}; {self}",
        )  # fmt: skip
        return found[count - 1]

    def wait_ended(self, count: int | None = None, timeout: float = 30) -> None:
        """Waits until so many different messages have ended; all that ``send`` has sent by default."""
        total = sum(map(len, self.produced.values())) if count is None else count
        wait_until(
            lambda: self.ended() >= total, timeout, lambda: f"{total} ended: {self}", poll=0.02, progress=self.ended
        )

    def wait_empty(self, timeout: float = 10) -> None:
        """Waits until nothing is stored any more but dead letters."""
        wait_until(lambda: not self.left(), timeout, lambda: f"nothing left: {self}", poll=0.02, progress=self.left)

    def check(self, **options: Any) -> Report:
        """The checker's judgement on all that ``send`` has sent."""
        options.setdefault("killed", self.killed)
        return check(self.events(), self.produced, **options)

    def __str__(self) -> str:
        last = [tuple(event[:7]) for event in self.events()[-5:]]
        return f"{self.ended()} ended, left {self.left()}, owned {self.owned()}, last events {last}"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """``site(server, source=TASKS, **settings)`` makes a Site; its pods end with the test, also a failed one."""
    with contextlib.ExitStack() as stack:
        made = 0

        def make(server: RedisServer, source: str = TASKS, **settings: Any) -> Site:
            nonlocal made
            made += 1
            return Site(server, tmp_path, source, stack, made, **settings)

        yield make
