"""One run of the demo: a server, a worker, a sender and a kill, and what came of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...app import ENV_URL, StreamTask
from ...clock import mono_s
from ...errors import StreamTaskError
from ...operations import SHARED, Inspector, scratch
from ...sharding import canonical, shard_of
from .app import ENV_JOURNAL, ENV_PARENT, ENV_SHARDS, QUEUE, RECORD, build, content_hash, key_hash
from .check import Sent, Start, Verdict, check, first_starts, percentile
from .events import Events, Key

WINDOW = 4000
"""Most messages that wait while the sender goes at full speed: as many as a healthy system has, not as many as fit."""
CHUNK = 500
CHUNK_BYTES = 2 << 20
WAVE_BYTES = 8 << 20
AT_REST = 200
AT_REST_EVERY_S = 0.01
START_TIMEOUT_S = 60.0
STALL_TIMEOUT_S = 30.0
SETTLE_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 15.0
NO_SHARD = 0xFFFF

Row = dict[str, Any]


class DemoFailed(StreamTaskError):
    """The run can't go on: the worker or its server did not start, or ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run. With ``events``, its lines are the messages."""

    messages: int = 20_000
    users: int = 1000
    events: Events | None = None
    processes: int = 4
    shards: int = 8
    kill: bool = True

    @property
    def at_rest(self) -> int:
        """How many of the messages, the last ones, are sent one by one while nothing waits."""
        return min(AT_REST, self.messages // 10)

    @property
    def keys(self) -> int:
        return len(self.events.keys) if self.events else min(self.users, self.messages)

    @property
    def without_key(self) -> int:
        return self.events.without_key if self.events else 0

    @property
    def kind(self) -> str:
        return "events" if self.events else "notifications"

    def source(self) -> Iterator[tuple[Key, str | bytes]]:
        """Keys and contents of the messages, in their order."""
        if self.events is not None:
            yield from self.events
            return
        for n in range(self.messages):
            # Neighbours in the stream are of different users, and each user gets the same number.
            user = n * 7919 % self.users if self.users % 7919 else n % self.users
            yield user + 1, f"message {n // self.users + 1} for user {user + 1}"


@dataclass(slots=True)
class Kill:
    """A kill -9 and what followed; times in seconds after it."""

    at: int
    pid: int
    incarnation: str
    shards: list[int]
    taken_over_s: float | None = None
    resumed_s: float | None = None


@dataclass(slots=True)
class State:
    """What the display shows."""

    total: int
    phase: str = "starting"
    sent: int = 0
    run: int = 0
    repeats: int = 0
    rate: float = 0.0
    rates: list[float] = field(default_factory=list)
    shards: list[Row] = field(default_factory=list)
    workers: list[Row] = field(default_factory=list)
    run_by_shard: dict[int, int] = field(default_factory=dict)
    started: float = field(default_factory=mono_s)


@dataclass(slots=True)
class Latency:
    """Milliseconds from before the produce call until the body started."""

    count: int
    p50: float | None
    p99: float | None


@dataclass(slots=True)
class Report:
    """What the end table says."""

    plan: Plan
    sent: int
    verdict: Verdict
    dead_letters: int
    tasks_per_s: float | None
    loaded: Latency
    at_rest: Latency
    registered: int
    alive: int
    kill: Kill | None
    elapsed_s: float

    def as_dict(self) -> Row:
        kill = self.kill
        return {
            "sent": self.sent,
            "run": self.verdict.run,
            "lost": self.verdict.lost,
            "out_of_order": self.verdict.out_of_order,
            "run_twice": self.verdict.run_twice,
            "dead_letters": self.dead_letters,
            "tasks_per_s": self.tasks_per_s,
            "latency_ms": {
                name: {"p50": one.p50, "p99": one.p99, "messages": one.count}
                for name, one in (("under_load", self.loaded), ("at_rest", self.at_rest))
            },
            "consumers": {"registered": self.registered, "alive": self.alive},
            "keys": self.plan.keys,
            "without_key": self.plan.without_key,
            "shards": self.plan.shards,
            "processes": self.plan.processes,
            "kill": None
            if kill is None
            else {
                "pid": kill.pid,
                "shards": kill.shards,
                "taken_over_s": kill.taken_over_s,
                "resumed_s": kill.resumed_s,
            },
            "elapsed_s": round(self.elapsed_s, 3),
            "ok": self.verdict.good,
        }


class View:
    """Where a run tells what happens; this one is silent. ``refresh`` is called some times a second."""

    def __enter__(self) -> View:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def event(self, text: str, *, bad: bool = False) -> None: ...

    def refresh(self, state: State) -> None: ...


class Journal:
    """Reads the records that the bodies append, as they come."""

    def __init__(self, folder: Path, sent: Sent, state: State) -> None:
        self._folder = folder
        self._sent = sent
        self._state = state
        self._offsets: dict[str, int] = {}
        self._seen = bytearray()
        self.starts: list[Start] = []

    def read(self) -> int:
        """Takes what has come, and answers how many messages started for the first time."""
        new = 0
        for name in os.listdir(self._folder):
            with open(self._folder / name, "rb") as file:
                offset = self._offsets.get(name, 0)
                file.seek(offset)
                data = file.read()
            whole = len(data) - len(data) % RECORD.size
            self._offsets[name] = offset + whole
            for n, content, key, produced, at in RECORD.iter_unpack(data[:whole]):
                self.starts.append(Start(at, n, content, key, produced))
                new += self._count(n)
        self._state.run += new
        return new

    def _count(self, n: int) -> int:
        if n >= len(self._seen):
            self._seen.extend(bytes(max(1024, n + 1 - len(self._seen))))
        if self._seen[n]:
            self._state.repeats += 1
            return 0
        self._seen[n] = 1
        if n < len(self._sent):
            by_shard = self._state.run_by_shard
            shard = self._sent.shards[n]
            by_shard[shard] = by_shard.get(shard, 0) + 1
        return 1


class Demo:
    """One run. ``run`` cleans up after itself, however it ends."""

    def __init__(self, plan: Plan, view: View) -> None:
        self.plan = plan
        self.view = view
        self.sent = Sent()
        self.state = State(plan.messages)
        self._folder = Path()
        self._app: StreamTask = build("embedded://", plan.shards)  # replaced when there is a folder
        self._worker: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._sender: threading.Thread | None = None
        self._error: BaseException | None = None
        self._kill: Kill | None = None
        self._loaded = plan.messages - plan.at_rest

    def run(self) -> Report:
        """Runs the plan. Raises ``DemoFailed`` and what produce calls raise."""
        try:
            with self.view:
                self._start()
                with Inspector(self._app) as inspector:
                    return self._watched(inspector)
        except BaseException:
            self._kill_worker()  # nobody waits for what still runs
            raise
        finally:
            with _signals_ignored():
                self._clean_up()

    def _watched(self, inspector: Inspector) -> Report:
        journal = Journal(self._folder / "journal", self.sent, self.state)
        self._wait_ready(inspector)
        self._sender = threading.Thread(target=self._send, name="streamtask-demo-sender", daemon=True)
        self._sender.start()
        self._follow(inspector, journal)
        self._settle(inspector)
        consumers = inspector.consumers(QUEUE)
        alive = sum(row["alive"] and _is_alive(row["pid"]) for row in consumers)
        dead = inspector.count_dead(QUEUE)[QUEUE]
        self.state.phase = "stopping"
        self.view.refresh(self.state)
        self._stop_worker()
        journal.read()
        return self._report(journal.starts, len(consumers), alive, dead)

    # Starting and stopping

    def _start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="streamtask-demo-")).resolve()
        (self._folder / "journal").mkdir()
        url = scratch.url_in(self._folder)
        self._app = build(url, self.plan.shards)
        self._app.queue(QUEUE).shape()
        version = ".".join(map(str, self._app.broker.check_version()))
        self.view.event(f"started a redis-server {version}, which only this demo uses")
        env = {
            **os.environ,
            ENV_URL: url,
            ENV_JOURNAL: str(self._folder / "journal"),
            ENV_SHARDS: str(self.plan.shards),
            ENV_PARENT: str(os.getpid()),
        }
        root = str(Path(__file__).resolve().parents[3])
        if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "streamtask", "--log-level", "warning", "-A", "streamtask.cli.demo.app:app"]
        command += ["worker", "--processes", str(self.plan.processes)]
        with open(self._folder / "worker.log", "wb") as log:
            self._worker = subprocess.Popen(
                command,
                env=env,
                cwd=self._folder,  # what lies in the user's folder is not to be imported
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is for us, who then stop it
            )

    def _stop_worker(self) -> None:
        worker = self._worker
        if worker is None:
            return
        if worker.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                worker.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(STOP_TIMEOUT_S)
        self._kill_worker()

    def _kill_worker(self) -> None:
        """Kills what is left of the worker's process group."""
        if self._worker is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._worker.pid, signal.SIGKILL)
            self._worker.wait()

    def _clean_up(self) -> None:
        self._stopping.set()
        self._kill_worker()
        if self._sender is not None:
            self._sender.join(5)
        self._app.close()
        if self._folder != Path():
            scratch.remove(self._folder, STOP_TIMEOUT_S)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _wait_ready(self, inspector: Inspector) -> None:
        deadline = mono_s() + START_TIMEOUT_S
        while not self._is_settled(inspector):
            if mono_s() > deadline:
                raise DemoFailed(f"the worker was not ready within {START_TIMEOUT_S:g} s.{self._log_tail()}")
            self.view.refresh(self.state)
            time.sleep(0.02)
        shards, processes = self.plan.shards, self.plan.processes
        self.view.event(
            f"{processes} worker process{'es' if processes > 1 else ''} own {shards} shard{'s' if shards > 1 else ''}"
            f" after {mono_s() - self.state.started:.1f} s"
        )

    def _is_settled(self, inspector: Inspector) -> bool:
        """Whether all processes live and own all shards, evenly."""
        self._look(inspector)
        keyed = [row for row in self.state.shards if row["shard"] != SHARED]
        counts = [sum(isinstance(s, int) for s in worker["shards"]) for worker in self.state.workers]
        return (
            len(counts) == self.plan.processes
            and all(row["owner"] for row in keyed)
            and sum(counts) == len(keyed)
            and max(counts) - min(counts) <= 1
            and all(SHARED in worker["shards"] for worker in self.state.workers)
        )

    def _look(self, inspector: Inspector) -> Row:
        if self._worker is not None and self._worker.poll() is not None:
            raise DemoFailed(f"the worker ended with status {self._worker.returncode}.{self._log_tail()}")
        row: Row = inspector.status(QUEUE, 0)[QUEUE]
        self.state.shards = row["shards"]
        self.state.workers = row["workers"]
        return row

    def _log_tail(self) -> str:
        try:
            lines = (self._folder / "worker.log").read_text(errors="replace").splitlines()[-15:]
        except OSError:
            return ""
        return "\nThe end of its log:\n" + "\n".join(f"  {line}" for line in lines) if lines else ""

    # Sending

    def _send(self) -> None:
        try:
            self._send_all()
        except BaseException as exc:  # the main thread raises it
            self._error = exc

    def _send_all(self) -> None:
        task = self._app.tasks["event" if self.plan.events else "notify"]
        field_name, content_name = ("key", "line") if self.plan.events else ("user_id", "text")
        unkeyed = self._app.tasks["event_without_key"]
        # Small runs, too, are sent in several chunks, so that there is a middle.
        chunk_size = max(1, min(CHUNK, self._loaded // 8))
        # The kill falls into a wave that keeps all processes busy.
        wave_size = max(1, min(WINDOW, self._loaded // 4))
        chunk: list[Row] = []
        size = 0
        self.state.phase = "sending"
        for key, content in self.plan.source():
            n = self._note(key, content)
            call: Row = {"n": n, "produced": 0, content_name: content}
            if key is not None:
                call[field_name] = key
            if n >= self._loaded:
                self._send_at_rest(call, unkeyed if key is None else task)
            else:
                chunk.append(call)
                size += len(content)
                wave = self.plan.kill and self._kill is None and self.state.sent >= (self._loaded - wave_size) // 2
                full = len(chunk) >= (wave_size if wave else chunk_size) or size >= (
                    WAVE_BYTES if wave else CHUNK_BYTES
                )
                if full or n == self._loaded - 1:
                    victim = self._choose_victim() if wave else None
                    self._send_chunk(chunk, task, unkeyed)
                    if victim is not None:
                        self._kill_now(victim)
                    chunk, size = [], 0
            if self._stopping.is_set():
                return

    def _note(self, key: Key, content: str | bytes) -> int:
        shard = NO_SHARD if key is None else shard_of(canonical(key), self.plan.shards)
        return self.sent.add(key_hash(key), content_hash(content), shard)

    def _send_chunk(self, chunk: list[Row], task: Any, unkeyed: Any) -> None:
        while self.state.sent - self.state.run + len(chunk) > WINDOW + CHUNK and not self._stopping.is_set():
            time.sleep(0.002)
        produced = time.monotonic_ns()
        for call in chunk:
            call["produced"] = produced
        name = "key" if self.plan.events else "user_id"
        keyed = [call for call in chunk if name in call]
        rest = [call for call in chunk if name not in call]
        if keyed:
            task.send_many(keyed)
        if rest:
            unkeyed.send_many(rest)
        self.state.sent += len(chunk)

    def _send_at_rest(self, call: Row, task: Any) -> None:
        if call["n"] == self._loaded:
            while self.state.run < self._loaded and not self._stopping.is_set():
                time.sleep(0.01)
            self.state.phase = "one by one"
            self.view.event(f"all run; now {self.plan.at_rest} more, one every {AT_REST_EVERY_S * 1000:.0f} ms")
        time.sleep(AT_REST_EVERY_S)
        call["produced"] = time.monotonic_ns()
        task.delay(**call)
        self.state.sent += 1

    def _choose_victim(self) -> Row:
        """The process that owns the most shards."""
        with Inspector(self._app) as inspector:
            workers = inspector.status(QUEUE, 0)[QUEUE]["workers"]
        victim: Row = max(workers, key=lambda worker: len(worker["shards"]))
        assert self._worker is not None
        if os.getsid(victim["pid"]) != self._worker.pid:
            raise DemoFailed(f"process {victim['pid']} is none of the demo's worker processes")
        return victim

    def _kill_now(self, victim: Row) -> None:
        shards = [shard for shard in victim["shards"] if isinstance(shard, int)]
        kill = Kill(time.monotonic_ns(), victim["pid"], victim["id"], shards)
        os.kill(victim["pid"], signal.SIGKILL)
        self._kill = kill
        self.view.event(f"killed -9 process {kill.pid}, the owner of {_shards(shards)}", bad=True)

    # Watching

    def _follow(self, inspector: Inspector, journal: Journal) -> None:
        """Until all is sent and has started, or nothing starts any more."""
        state = self.state
        progress = last_look = sampled = mono_s()
        sampled_run = 0
        while state.run < self.plan.messages:
            if self._error is not None:
                raise self._error
            now = mono_s()
            if journal.read() or state.sent - state.run == 0:
                progress = now
            elif now - progress > STALL_TIMEOUT_S:
                self._give_up(inspector)
                return
            taking_over = self._kill is not None and self._kill.taken_over_s is None
            if taking_over or now - last_look >= 0.25:
                self._look(inspector)
                last_look = now
                self._see_takeover()
            if now - sampled >= 0.25:
                state.rate = (state.run - sampled_run) / (now - sampled)
                state.rates.append(state.rate)
                sampled, sampled_run = now, state.run
            self.view.refresh(state)
            time.sleep(0.002 if taking_over else 0.02)

    def _give_up(self, inspector: Inspector) -> None:
        """Says what is known of messages that do not start."""
        self._look(inspector)
        pids = {worker["id"]: worker["pid"] for worker in self.state.workers}
        self.view.event(f"no message has started for {STALL_TIMEOUT_S:g} s: giving up", bad=True)
        for row in self.state.shards:
            if row["lag"] or row["pending"]:
                owner = f"process {pids.get(row['owner'], '(gone)')}" if row["owner"] else "nobody"
                self.view.event(
                    f"shard {row['shard']} of {owner}: lag {row['lag']}, pending {row['pending']}{self._log_tail()}",
                    bad=True,
                )

    def _see_takeover(self) -> None:
        kill = self._kill
        if kill is None or kill.taken_over_s is not None:
            return
        owners = {row["shard"]: row["owner"] for row in self.state.shards}
        if all(owners.get(shard) not in (None, kill.incarnation) for shard in kill.shards):
            kill.taken_over_s = (time.monotonic_ns() - kill.at) / 1e9
            self.view.event(f"{_shards(kill.shards)} taken over in {kill.taken_over_s:.2f} s")

    def _settle(self, inspector: Inspector) -> None:
        """Waits until everything is acknowledged and the killed process is replaced."""
        self.state.phase = "settling"
        deadline = mono_s() + SETTLE_TIMEOUT_S
        while not (self._is_settled(inspector) and self._look(inspector)["backlog"] == 0):
            if mono_s() > deadline:
                self.view.event(
                    f"not settled after {SETTLE_TIMEOUT_S:g} s: some shard has no owner, or a backlog", bad=True
                )
                break
            self._see_takeover()
            self.view.refresh(self.state)
            time.sleep(0.02)
        self._see_takeover()

    # The end

    def _report(self, starts: list[Start], registered: int, alive: int, dead: int) -> Report:
        kill = self._kill
        verdict = check(self.sent, starts, [kill.at] if kill else [])
        firsts = first_starts(starts)
        loaded = [start for n, start in firsts.items() if n < self._loaded]
        rate = None
        if len(loaded) > 1:
            times = [start.at for start in loaded]
            rate = round((len(loaded) - 1) / max(1e-9, (max(times) - min(times)) / 1e9), 1)
        if kill:
            kill.resumed_s = self._resumed_s(kill, starts)
        return Report(
            plan=self.plan,
            sent=self.state.sent,
            verdict=verdict,
            dead_letters=dead,
            tasks_per_s=rate,
            loaded=_latency(loaded),
            at_rest=_latency([start for n, start in firsts.items() if n >= self._loaded]),
            registered=registered,
            alive=alive,
            kill=kill,
            elapsed_s=mono_s() - self.state.started,
        )

    def _resumed_s(self, kill: Kill, starts: list[Start]) -> float | None:
        """When the last of the dead process's shards went on with a message that had been sent before the kill."""
        first: dict[int, int] = {}
        for start in starts:
            if start.at > kill.at > start.produced and start.n < len(self.sent):
                shard = self.sent.shards[start.n]
                if shard in kill.shards:
                    first[shard] = min(first.get(shard, start.at), start.at)
        return (max(first.values()) - kill.at) / 1e9 if first else None


def _latency(firsts: list[Start]) -> Latency:
    values = sorted(start.at - start.produced for start in firsts)
    p50, p99 = (percentile(values, share) for share in (0.5, 0.99))
    return Latency(len(values), None if p50 is None else p50 / 1e6, None if p99 is None else p99 / 1e6)


def _shards(shards: list[int]) -> str:
    if not shards:
        return "no shard"
    return f"shard{'s' if len(shards) > 1 else ''} {', '.join(map(str, shards))}"


def _is_alive(pid: int | None) -> bool:
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    """An impatient second Ctrl-C must not leave half of it behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
