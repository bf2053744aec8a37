"""Celery under test: a real server, worker processes of the real command line, and what their bodies wrote down.

Fixture ``site``: ``site(server, ...)`` gives an app to publish with and starts workers, which end with the test.
``CELERY_TEST_SCHEME=redis`` runs the same tests on kombu's own transport, to see what they show of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.celery import app as sut
from tests.celery.checker import END, FINAL, START, Event, Report, check
from tests.fix_redis import RedisServer
from tests.helpers import Record, Spawned, is_alive, our_processes, spawn, wait_until

SCHEME = os.environ.get("CELERY_TEST_SCHEME", "streamtask")
LEASE = 1.0


def broker_url(port: int, db: int = 0) -> str:
    return f"{SCHEME}://127.0.0.1:{port}/{db}"


class Worker:
    """One ``celery worker``: a main process, and with the prefork pool its children."""

    def __init__(self, site: Site, spawned: Spawned, name: str) -> None:
        self._site = site
        self.spawned = spawned
        self.name = name
        self.pid = spawned.pid

    def children(self) -> list[int]:
        """Pids of the pool's processes (and of whatever else it has started)."""
        found: list[int] = []
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for thread in os.listdir(f"/proc/{self.pid}/task"):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    found += [int(pid) for pid in Path(f"/proc/{self.pid}/task/{thread}/children").read_text().split()]
        return sorted(pid for pid in found if is_alive(pid))

    def wait_ready(self, timeout: float = 20) -> Worker:
        def ready() -> bool:
            if self.spawned.returncode is not None:
                raise RuntimeError(f"the worker ended\n{self.spawned}")
            return any(event.kind == "W" and event.main == self.pid for event in self._site.events())

        wait_until(ready, timeout, lambda: f"worker {self.name} is ready\n{self.spawned}", poll=0.02)
        return self

    def kill(self) -> None:
        """kill -9 of the main process alone; those of its pool are to follow it at once, or they are not excused."""
        children = self.children()
        now = self._site.killed[self.pid] = time.monotonic()
        self.spawned.kill()
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not any(is_alive(pid) for pid in children), LEASE / 2)
        self._site.killed.update({pid: now for pid in children if not is_alive(pid)})

    def kill_all(self) -> None:
        """kill -9 of all its processes at once, as when a pod goes."""
        pids = [self.pid, *self.children()]
        self._site.killed.update(dict.fromkeys(pids, time.monotonic()))
        self.spawned.kill_group()

    def kill_child(self, pid: int) -> None:
        self._site.killed[pid] = time.monotonic()
        os.kill(pid, signal.SIGKILL)

    def wait_killed(self, timeout: float = 15) -> None:
        """Waits for the end of a worker that one of its own bodies kills (``deadly``)."""
        self.spawned.wait(timeout)
        at = next(event for event in reversed(self._site.events()) if event.kind == "K" and event.main == self.pid)
        self._site.killed.update({self.pid: at.at, at.pid: at.at})

    def pause(self) -> None:
        """SIGSTOP of the main process; those of its pool go on."""
        self._site.paused[self.pid] = time.monotonic()
        self.spawned.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.spawned.signal(signal.SIGCONT)

    def terminate(self) -> None:
        self.spawned.signal(signal.SIGTERM)

    def stop(self, timeout: float = 20) -> None:
        """A warm shutdown, as a deployment does it."""
        self.terminate()
        status = self.spawned.wait(timeout)
        assert status == 0, str(self.spawned)

    @property
    def log(self) -> str:
        return log_of(self.spawned)


class Site:
    """An app on a server: publishes, starts workers, and reads what the bodies wrote down."""

    def __init__(
        self,
        server: RedisServer,
        folder: Path,
        stack: contextlib.ExitStack,
        options: dict[str, Any],
        conf: dict[str, Any],
    ) -> None:
        self.server = server
        self.folder = folder
        self.record = folder / "record"
        self._record = Record(self.record, Event, lambda event: event.kind in FINAL and (event.key, event.n))
        self.options = {"lease": LEASE, **options} if SCHEME == "streamtask" else {}
        self.conf = conf
        self.killed: dict[int, float] = {}
        self.paused: dict[int, float] = {}
        self.early: set[int] = set()
        """Numbers of messages that are acknowledged before they run."""
        self.produced: dict[str | None, list[int]] = defaultdict(list)
        """What was published: the numbers of each key, in order."""
        self.workers: list[Worker] = []
        self._stack = stack
        self._started = 0
        self._next = 0
        self._lock = threading.Lock()
        self.redis: redis.Redis = server.client()
        self.app = self.producer(server.port)

    def producer(self, port: int, **options: Any) -> Any:
        """An app in this process to publish with; closed at the end of the test."""
        app = sut.make(broker_url(port), {**self.options, **options}, **self.conf)
        self._stack.callback(close_app, app)
        return app

    def numbers(self, count: int) -> list[int]:
        """So many numbers that no message has yet."""
        with self._lock:
            first, self._next = self._next, self._next + count
        return list(range(first, first + count))

    def send(self, name: str, key: str | None = None, *, app: Any = None, n: int | None = None, **more: Any) -> int:
        """Publishes one call of a task, and remembers it; its number. ``apply`` has options of ``apply_async``."""
        number = self.numbers(1)[0] if n is None else n
        options = more.pop("apply", {})
        kwargs = {"n": number, **({"k": key} if key is not None else {}), **more}
        if name in ("early", "due"):
            self.early.add(number)
        (app or self.app).tasks[name].apply_async(kwargs=kwargs, **options)
        self.produced[key].append(number)
        return number

    def mix(self, keys: int, each: int, *, late: int = 0, early: int = 0, ms: float = 0) -> None:
        """Publishes keyed messages, round robin over the keys, with plain ones between them."""
        kinds = [("put", [f"user{i}" for _ in range(each) for i in range(keys)])]
        kinds += [(name, [None] * count) for name, count in (("late", late), ("early", early))]
        jobs = [((i + 0.5) / len(targets), name, key) for name, targets in kinds for i, key in enumerate(targets)]
        for _, name, key in sorted(jobs, key=lambda job: job[0]):
            self.send(name, key, ms=ms)

    def gate(self, n: int, main: int | None = None, outcome: str = "ok") -> None:
        """Lets the bodies of message n end, in one worker or in all."""
        gate = self.folder / (f"gate-{n}" if main is None else f"gate-{n}-{main}")
        written = self.folder / "gate-being-written"
        written.write_text(outcome)
        written.rename(gate)

    # Workers

    def environment(self, port: int | None = None, **conf: Any) -> dict[str, str | None]:
        return {
            "CELERY_TEST_BROKER": broker_url(port or self.server.port),
            "CELERY_TEST_OPTIONS": json.dumps(self.options),
            "CELERY_TEST_CONF": json.dumps({**self.conf, **conf}),
            "CELERY_TEST_RECORD": str(self.record),
        }

    def command(
        self, *words: str, port: int | None = None, env: dict[str, str] | None = None, **conf: Any
    ) -> contextlib.AbstractContextManager[Spawned]:
        """``celery -A APP WORDS`` in a process of its own."""
        env_of_app = {**self.environment(port, **conf), **(env or {})}
        return spawn("-m", "celery", "-A", "tests.celery.app", *words, env=env_of_app, cwd=self.folder)

    def start_worker(
        self, pool: str = "prefork", c: int = 8, *, port: int | None = None, words: tuple[str, ...] = (), **conf: Any
    ) -> Worker:
        """Starts a worker and does not wait; ``port`` is that of a proxy."""
        self._started += 1
        name = f"w{self._started}"
        words = words or ("--without-mingle",)
        options = ("-P", pool, "-c", str(c), "-n", f"{name}@test", "--loglevel", "INFO", *words)
        spawned = self._stack.enter_context(self.command("worker", *options, port=port, **conf))
        # pytest shows it with a failure.
        self._stack.callback(lambda: print(f"--- worker {name}, pid {spawned.pid}\n{shortened(log_of(spawned))}"))
        worker = Worker(self, spawned, f"{name}@test")
        self.workers.append(worker)
        return worker

    def worker(self, pool: str = "prefork", c: int = 8, **more: Any) -> Worker:
        return self.start_worker(pool, c, **more).wait_ready()

    def start_workers(self, count: int, **more: Any) -> list[Worker]:
        return [worker.wait_ready() for worker in [self.start_worker(**more) for _ in range(count)]]

    # What the bodies wrote

    def events(self) -> list[Event]:
        return self._record.events()

    def of(self, kind: str, key: str | None = None, n: int | None = None, main: int | None = None) -> list[Event]:
        return [
            event
            for event in self.events()
            if event.kind == kind and key in (None, event.key) and n in (None, event.n) and main in (None, event.main)
        ]

    def wait(self, kind: str, n: int | None = None, count: int = 1, timeout: float = 15, **more: Any) -> Event:
        """Waits for so many events of a kind, and gives the last."""
        found = wait_until(
            lambda: (seen := self.of(kind, n=n, **more)) and len(seen) >= count and seen,
            timeout, lambda: f"{count} times {kind} of {n} {more}; {self}", poll=0.01,
        )  # fmt: skip
        return found[count - 1]

    def ended(self) -> int:
        """How many messages have come to their end."""
        return len(self._record.ended())

    def wait_ended(self, count: int, timeout: float = 20) -> None:
        wait_until(
            lambda: self.ended() >= count, timeout, lambda: f"{count} ended; {self}", poll=0.02, progress=self.ended
        )

    def open(self) -> list[tuple[str | None, int]]:
        """The published messages that have not come to their end."""
        done = self._record.ended()
        return [(key, n) for key, numbers in self.produced.items() for n in numbers if (key, n) not in done]

    def wait_done(self, timeout: float = 20, skip: set[tuple[str | None, int]] | None = None) -> None:
        """Waits until all that was published has ended, but for early-acknowledged ones whose process was killed."""

        def done() -> bool:
            cut = {
                event.n
                for event in self.of(START)
                if event.key is None and event.n in self.early and {event.main, event.pid} & self.killed.keys()
            }
            left = [
                (key, n) for key, n in self.open() if not (key is None and n in cut) and (key, n) not in (skip or ())
            ]
            return not left

        wait_until(done, timeout, lambda: f"all ended; open {self.open()[:8]}; {self}", poll=0.02, progress=self.ended)

    def check(self, **options: Any) -> Report:
        """The checker's judgement on all that was published."""
        lease = self.options.get("lease", 0.0)
        defaults = {"killed": self.killed, "paused": self.paused, "early": self.early, "lease": lease}
        report = check(self.events(), self.produced, **{**defaults, **options})
        print(report)
        return report

    def nothing_left(self, timeout: float = 10) -> None:
        """Waits until the broker holds no message any more."""
        if SCHEME == "streamtask":
            wait_until(
                lambda: not self.stored(), timeout, lambda: f"no entries left; {self}", poll=0.05, progress=self.stored
            )

    def stored(self) -> dict[str, int]:
        """The entries of each stream of messages, those delivered and not acknowledged among them."""
        found = {}
        for key in self.redis.scan_iter("*:stream", count=1000):
            if length := self.redis.xlen(key):
                found[key.decode()] = length
        return found

    def keys(self) -> str:
        """What Redis holds, a line per key."""
        lines = []
        for key in sorted(self.redis.scan_iter("*", count=1000)):
            kind = self.redis.type(key).decode()
            text = ""
            with contextlib.suppress(redis.RedisError):
                if kind == "stream":
                    text = f"{self.redis.xlen(key)} entries"
                    for group in self.redis.xinfo_groups(key):
                        text += f", group {group['name'].decode()}: {group['pending']} pending of"
                        text += f" {[row['name'].decode() for row in self.redis.xinfo_consumers(key, group['name'])]}"
                elif kind == "hash":
                    text = str(self.redis.hgetall(key))[:300]
                elif kind == "zset":
                    text = f"{self.redis.zcard(key)} members"
                elif kind == "set":
                    text = f"{self.redis.scard(key)} members"
                elif kind == "list":
                    text = f"{self.redis.llen(key)} items"
                else:
                    text = str(self.redis.get(key))[:200]
            lines.append(f"{key.decode()} {kind} {text}")
        return "\n".join(lines)

    def unended(self) -> str:
        """The events of the messages that have not come to their end, and of those that ran twice."""
        events = self.events()
        starts = Counter((event.id, event.attempt) for event in events if event.kind == START)
        ended = {event.id for event in events if event.kind in FINAL}
        odd = {event_id for event_id, _ in starts if event_id not in ended}
        odd |= {event_id for (event_id, _), count in starts.items() if count > 1}
        return "\n".join(str(tuple(event)) for event in events if event.id in odd)

    def __str__(self) -> str:
        events = self.events()
        kinds = dict(Counter(event.kind for event in events))
        last = [f"{event.kind} {event.key}/{event.n} by {event.main}" for event in events if event.kind != "A"][-6:]
        return f"{self.ended()} of {sum(map(len, self.produced.values()))} ended, events {kinds}, last {last}"


def log_of(spawned: Spawned) -> str:
    return spawned.stdout + spawned.stderr


def shortened(log: str, most: int = 60_000) -> str:
    return (
        log
        if len(log) <= most
        else f"{log[: most // 3]}\n... {len(log) - most} characters ...\n{log[-2 * most // 3 :]}"
    )


def close_app(app: Any) -> None:
    with contextlib.suppress(Exception):
        app.close()
    for pool in (getattr(app, "_pool", None), getattr(app, "_producer_pool", None)):
        if pool is not None:
            with contextlib.suppress(Exception):
                pool.force_close_all()


class Load(contextlib.AbstractContextManager["Load"]):
    """A producer in a thread of its own: keyed and plain messages until the block ends."""

    def __init__(self, site: Site, keys: int = 10, pause: float = 0.005, ms: float = 5, retries: bool = False) -> None:
        self.site, self.keys, self.pause, self.ms, self.retries = site, keys, pause, ms, retries
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._app = site.producer(site.server.port)
        self._thread = threading.Thread(target=self._run, name="load")

    def _run(self) -> None:
        try:
            i = 0
            while not self._stop.wait(self.pause):
                i += 1
                fail = {"fail": 1} if self.retries and i % 13 == 0 else {}
                if i % 3:
                    self.site.send("put", f"user{i % self.keys}", app=self._app, ms=self.ms, **fail)
                else:
                    self.site.send("late", app=self._app, ms=self.ms, **fail)
        except BaseException as error:
            self._failure = error

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(60)
        if exc[0] is None:
            assert self._failure is None, self._failure


class Wire:
    """A TCP proxy that reads the replies: it loses one that holds given bytes, and makes connections half-open.

    ``tests.fix_proxy`` chooses by the request and stops whole networks; this one chooses by the reply, and after
    ``freeze`` new connections work while the old ones hang for ever, as behind a router that forgot them.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.lost = 0
        """Replies that were lost."""
        self._marks: list[bytes] = []
        self._frozen: set[socket.socket] = set()
        self._links: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._closed = False
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def lose_reply(self, mark: bytes) -> None:
        """The next reply that holds these bytes is lost, and its connection cut."""
        with self._lock:
            self._marks.append(mark)

    def freeze(self) -> int:
        """Nothing passes any more on the connections that are open now, and none of them is closed."""
        with self._lock:
            alive = [link for link in self._links if link[0] not in self._frozen and link[0].fileno() >= 0]
            for client, server in alive:
                self._frozen |= {client, server}
        return len(alive)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target), 5)
            except OSError:
                client.close()
                continue
            for sock in (client, server):
                sock.settimeout(None)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._links.append((client, server))
            for source, sink, replies in ((client, server, False), (server, client, True)):
                thread = threading.Thread(target=self._pump, args=(source, sink, replies), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, replies: bool) -> None:
        tail = b""
        while True:
            try:
                data = source.recv(1 << 16)
            except OSError:
                data = b""
            if source in self._frozen and not self._closed:
                if not data:
                    return  # the other side never hears of it
                continue
            if data and replies:
                seen = tail + data
                tail = seen[-200:]
                with self._lock:
                    mark = next((mark for mark in self._marks if mark in seen), None)
                    if mark is not None:
                        self._marks.remove(mark)
                        self.lost += 1
                if mark is not None:
                    data = b""
            try:
                if data:
                    sink.sendall(data)
                    continue
            except OSError:
                pass
            for sock in (source, sink):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            return

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for link in self._links:
            for sock in link:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for link in self._links:
            for sock in link:
                sock.close()


@pytest.fixture
def wire() -> Iterator[Callable[[RedisServer], Wire]]:
    """``wire(server)`` makes a Wire in front of it."""
    made: list[Wire] = []

    def make(server: RedisServer) -> Wire:
        made.append(Wire(server.port))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """``site(server, conf={...}, **transport_options)`` makes a Site; its workers end with the test, also a failed one."""
    made: list[Site] = []
    with contextlib.ExitStack() as stack:

        def make(server: RedisServer, conf: dict[str, Any] | None = None, **options: Any) -> Site:
            folder = tmp_path / f"site{len(made)}"
            folder.mkdir()
            made.append(Site(server, folder, stack, options, conf or {}))
            return made[-1]

        yield make
        for one in made:
            with contextlib.suppress(redis.RedisError, OSError):
                print(f"--- what Redis holds\n{shortened(one.keys())}")
            print(f"--- events of what has not ended\n{shortened(one.unended())}")
    # A keeper gives its leases back when its worker is gone, so it must be gone before the server is.
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not any("keeper" in command for command in our_processes().values()), 3)


__all__ = ["END", "LEASE", "SCHEME", "Load", "Site", "Wire", "Worker", "site", "wire"]
