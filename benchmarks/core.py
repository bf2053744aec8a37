"""Measures streamtask against bare redis-py loops that have no framework, and prints the ratios.

Both contestants run on one private redis-server (TCP on the loopback, no persistence) and take turns: A B, then B A,
and so on. A single figure of a machine means little; the ratio of two that were taken side by side means more.
``benchmarks/README.md`` says what each line measures.

This file is three programs: the benchmark, the module of the app that the worker imports, and the bare consumer. The
latter gets no import of streamtask, whose objects would make its garbage collection slower.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import redis

ROOT = Path(__file__).resolve().parents[1]
# What is measured is the checkout that this file lies in.
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from streamtask import StreamTask

ENV_URL = "BENCHMARK_URL"
ENV_STAMPS = "BENCHMARK_STAMPS"
STAMP = struct.Struct("=qd")
GROUP = "bare"
STREAM = "bare:stream"
FIELD = "m"
USERS = 1000
PAYLOAD = "x" * 200
PIPELINE = 250
FETCH = 200
POLL_S = 0.005
START_TIMEOUT_S = 60.0
DRAIN_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 20.0

Figures = dict[str, float]


# --- the tasks, of both contestants


def noop(user_id: int, payload: str) -> None:
    """Does nothing."""


def stamp(user_id: int, payload: str, number: int) -> None:
    """Writes down when it started."""
    now = time.monotonic()
    global _stamps
    if _stamps < 0:
        _stamps = os.open(os.environ[ENV_STAMPS], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(_stamps, STAMP.pack(number, now))


_stamps = -1
TASKS: dict[str, Callable[..., None]] = {"bench.noop": noop, "bench.stamp": stamp}


def build(url: str) -> StreamTask:
    """The app, with default settings."""
    from streamtask import StreamTask

    app = StreamTask("bench", broker=url)
    for name, function in TASKS.items():
        app.task(name=name, shard_key="user_id")(function)
    return app


# What the worker's -A names.
worker_app = build(os.environ[ENV_URL]) if ENV_URL in os.environ else None


# --- the bare consumer


def consume(port: int) -> None:
    """Reads, decodes, calls and acknowledges in batches, until it is terminated."""
    client = redis.Redis(port=port)  # with redis-py's defaults, as whoever writes such a loop has them
    unpack, tasks = msgpack.unpackb, TASKS
    while True:
        reply: Any = client.xreadgroup(GROUP, "one", {STREAM: ">"}, count=FETCH, block=1000)
        if not reply:
            continue
        # RESP3 answers with a map of lists of lists, RESP2 with a list of pairs.
        entries = reply[STREAM.encode()][0] if isinstance(reply, dict) else reply[0][1]
        done = []
        for entry_id, fields in entries:
            task, _, _, args, kwargs, _ = unpack(fields[b"m"])
            tasks[task](*args, **kwargs)
            done.append(entry_id)
        client.xack(STREAM, GROUP, *done)


# --- what runs beside us


stopped: list[int] = []


def stop(signum: int, frame: object) -> None:
    """Ends the run by an exception, so that what was started is ended."""
    stopped.append(signum)
    sys.exit(128 + signum)


class BenchmarkFailed(Exception):
    """Something did not start, ended early or was too slow: the figures would be wrong."""


@dataclass(frozen=True, slots=True)
class Sizes:
    drain: int = 100_000
    single: int = 5_000
    block: int = 500
    bulk: int = 50_000
    latency: int = 300
    ids: int = 20_000


QUICK = Sizes(drain=20_000, single=1_000, block=250, bulk=5_000, latency=100, ids=4_000)


class Bench:
    """The private server, its client, and the processes that are started beside it."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.folder = folder
        self.sizes = sizes
        self.port = 0
        self.client: Any = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @contextlib.contextmanager
    def app(self) -> Iterator[StreamTask]:
        with contextlib.closing(build(self.url)) as app:
            yield app

    @contextlib.contextmanager
    def server(self, binary: str) -> Iterator[None]:
        for _ in range(5):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
            argv = [binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
            with self.running("redis", [*argv, "--save", "", "--appendonly", "no"]) as process:
                self.client = redis.Redis(port=self.port)
                # Between our look and its bind, another process may have taken the port.
                if not self._answers(process):
                    continue
                try:
                    yield
                finally:
                    self.client.close()
                return
        raise BenchmarkFailed(f"the redis-server {binary} did not start\n{self.log('redis')}")

    def _answers(self, process: subprocess.Popen[bytes]) -> bool:
        deadline = time.monotonic() + START_TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(redis.ConnectionError):
                return int(self.client.info("server")["process_id"]) == process.pid
            time.sleep(0.01)
        return False

    @contextlib.contextmanager
    def worker(self, stamps: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
        """Ours: a real ``streamtask worker`` with one process."""
        argv = [sys.executable, "-m", "streamtask", "--log-level", "warning", "-A", "core:worker_app", "worker"]
        with self.running("worker", [*argv, "-p", "1"], {ENV_URL: self.url, ENV_STAMPS: str(stamps)}) as process:
            yield process

    @contextlib.contextmanager
    def bare(self, stamps: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
        """The bare consumer; its group is made already."""
        argv = [sys.executable, str(Path(__file__).resolve()), "--consume", str(self.port)]
        with self.running("bare", argv, {ENV_STAMPS: str(stamps)}) as process:
            yield process

    @contextlib.contextmanager
    def running(
        self, name: str, argv: Sequence[str], env: dict[str, str] | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A process that is ended with the block, together with its children."""
        path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]))
        with open(self.folder / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                argv,
                env={**os.environ, "PYTHONPATH": path, **(env or {})},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is for us, who then stop it
                preexec_fn=_die_with_parent if _prctl is not None else None,
            )
        try:
            # An exception that a signal raises in the hooks around a fork is dropped by Python: ask again.
            if stopped:
                sys.exit(128 + signal.SIGTERM)
            yield process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-3000:]

    def check(self, process: subprocess.Popen[bytes], name: str, deadline: float, what: str) -> None:
        """Raises if the process has ended or the time is over."""
        if process.poll() is not None:
            raise BenchmarkFailed(f"the {name} process ended with status {process.returncode}\n{self.log(name)}")
        if time.monotonic() > deadline:
            raise BenchmarkFailed(f"waited in vain for {what}\n{self.log(name)}")


# Looked up here: between fork and exec little is safe to do.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
_parent = os.getpid()


def _die_with_parent() -> None:
    """In a child before its exec: the kernel kills it when the benchmark dies, also by kill -9."""
    if _prctl is not None:
        _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != _parent:
            os._exit(1)


# --- messages


def user(number: int) -> int:
    """Neighbours are of different users."""
    return number * 7919 % USERS


def bodies(count: int, task: str = "bench.noop", first: int = 0, numbered: bool = False) -> list[bytes]:
    """The envelopes that our own produce calls make, ready to be sent."""
    from streamtask.queue.producer import new_id
    from streamtask.redis.wire import encode

    made = []
    for number in range(first, first + count):
        args = (user(number), PAYLOAD, number) if numbered else (user(number), PAYLOAD)
        made.append(encode(task, str(user(number)).encode(), new_id(), args, {}))
    return made


def calls(count: int) -> list[tuple[tuple[int, str], dict[str, Any]]]:
    return [((user(number), PAYLOAD), {}) for number in range(count)]


def pipelined_xadd(client: Any, messages: Sequence[bytes]) -> None:
    for start in range(0, len(messages), PIPELINE):
        pipe = client.pipeline(transaction=False)
        for body in messages[start : start + PIPELINE]:
            pipe.xadd(STREAM, {FIELD: body})
        pipe.execute()


def streams(app: StreamTask) -> list[str]:
    queue = app.queue("default")
    return [queue.shard_keys(shard).stream for shard in range(queue.shards)]


def check_same_bytes(bench: Bench) -> None:
    """The bare contestant's messages must be what ours sends."""
    bench.client.flushall()
    with bench.app() as app:
        app.tasks["bench.noop"].delay(user(1), PAYLOAD)
        entries = [entry for stream in streams(app) for entry in bench.client.xrange(stream)]
    (_, fields), (bare,) = entries[0], bodies(1, first=1)
    if len(entries) != 1 or list(fields) != [FIELD.encode()] or _without_id(fields[b"m"]) != _without_id(bare):
        raise BenchmarkFailed(f"our message {fields!r} is not the bare one {bare!r}: bring bodies() up to date")


def _without_id(body: bytes) -> list[Any]:
    task, key, message_id, args, kwargs, headers = msgpack.unpackb(body)
    return [len(body), task, key, len(message_id), args, kwargs, headers]


# --- a. drain


def drain(bench: Bench, turn: int) -> Figures:
    """Messages per second, from the first that is seen to be finished to the last."""
    return {who: run(bench) for who, run in ordered(turn, ours=_drain_ours, bare=_drain_bare)}


def _drain_ours(bench: Bench) -> float:
    bench.client.flushall()
    total = bench.sizes.drain
    with bench.app() as app:
        for start in range(0, total, 10_000):
            app.tasks["bench.noop"].send_many(calls(min(10_000, total - start)))
        names = streams(app)
        dead = [app.queue("default").shard_keys(shard).dlq for shard in range(len(names))]
    with bench.worker() as process:
        rate = _follow(bench, "worker", process, total, lambda pipe: [pipe.xlen(name) for name in names], sum)
    if lost := bench.client.exists(*dead):
        raise BenchmarkFailed(f"{lost} shards have dead letters: the tasks failed\n{bench.log('worker')}")
    return rate


def _drain_bare(bench: Bench) -> float:
    bench.client.flushall()
    total = bench.sizes.drain
    # Ids of our own, of the usual form, tell from outside how far the consumer is: it removes nothing.
    base = int(time.time() * 1000)
    messages = bodies(total)
    for start in range(0, total, PIPELINE):
        pipe = bench.client.pipeline(transaction=False)
        for number in range(start, min(start + PIPELINE, total)):
            pipe.xadd(STREAM, {FIELD: messages[number]}, id=f"{base}-{number + 1}")
        pipe.execute()
    bench.client.xgroup_create(STREAM, GROUP, id="0")
    del messages

    def left(replies: list[Any]) -> int:
        group = replies[-1][0]
        last = int(group["last-delivered-id"].split(b"-")[1])
        return total - last + int(group["pending"])

    def ask(pipe: Any) -> None:
        # As many questions as ours is asked.
        for _ in range(7):
            pipe.xlen(STREAM)
        pipe.xinfo_groups(STREAM)

    with bench.bare() as process:
        return _follow(bench, "bare", process, total, ask, left)


def _follow(
    bench: Bench,
    name: str,
    process: subprocess.Popen[bytes],
    total: int,
    ask: Callable[[Any], object],
    left_of: Callable[[list[Any]], int],
) -> float:
    deadline = time.monotonic() + DRAIN_TIMEOUT_S
    first_left, first_at = total, 0.0
    while True:
        pipe = bench.client.pipeline(transaction=False)
        ask(pipe)
        left, now = left_of(pipe.execute()), time.perf_counter()
        if first_left == total and left < total:
            first_left, first_at = left, now
        if left == 0:
            if first_left == 0:
                raise BenchmarkFailed("all was drained between two looks: take more messages")
            return first_left / (now - first_at)
        bench.check(process, name, deadline, f"{left} of {total} messages to be worked on")
        time.sleep(POLL_S)


# --- b, c. produce


def single(bench: Bench, turn: int) -> Figures:
    """Messages per second, one call after the other; the contestants take turns in blocks."""
    bench.client.flushall()
    sizes = bench.sizes
    messages = bodies(sizes.single)
    spent = {"ours": 0.0, "bare": 0.0}
    with bench.app() as app:
        delay, xadd, clock = app.tasks["bench.noop"].delay, bench.client.xadd, time.perf_counter

        def ours(start: int) -> float:
            began = clock()
            for number in range(start, start + sizes.block):
                delay(number * 7919 % USERS, PAYLOAD)
            return clock() - began

        def bare(start: int) -> float:
            began = clock()
            for number in range(start, start + sizes.block):
                xadd(STREAM, {FIELD: messages[number]})
            return clock() - began

        # What only the first call does: it opens the shards, connects, and loads the script.
        for number in range(20):
            delay(user(number), PAYLOAD)
            xadd(STREAM, {FIELD: messages[number]})
        for index, start in enumerate(range(0, sizes.single, sizes.block)):
            for who, run in ordered(turn + index, ours=ours, bare=bare):
                spent[who] += run(start)
    return {who: sizes.single / seconds for who, seconds in spent.items()}


def bulk(bench: Bench, turn: int) -> Figures:
    """Messages per second, many with one call."""
    count = bench.sizes.bulk
    messages, arguments = bodies(count), calls(count)
    with bench.app() as app:
        send_many = app.tasks["bench.noop"].send_many

        def ours() -> None:
            send_many(arguments)

        def bare() -> None:
            pipelined_xadd(bench.client, messages)

        figures = {}
        for who, run in ordered(turn, ours=ours, bare=bare):
            bench.client.flushall()
            send_many(arguments[:20])
            pipelined_xadd(bench.client, messages[:20])
            began = time.perf_counter()
            run()
            figures[who] = count / (time.perf_counter() - began)
    return figures


# --- d. latency


def latency(bench: Bench, turn: int) -> Figures:
    """Milliseconds from before the produce call to the start of the body, while nothing else waits."""
    figures: Figures = {}
    for who, run in ordered(turn, ours=_latency_ours, bare=_latency_bare):
        taken = sorted(run(bench))
        figures[f"{who} p50"] = 1000 * taken[len(taken) // 2]
        figures[f"{who} p99"] = 1000 * taken[min(len(taken) - 1, len(taken) * 99 // 100)]
    return figures


def _latency_ours(bench: Bench) -> list[float]:
    bench.client.flushall()
    stamps = _new_stamps(bench)
    with bench.app() as app, bench.worker(stamps) as process:
        delay = app.tasks["bench.stamp"].delay
        return _at_rest(bench, "worker", process, stamps, lambda number: delay(user(number), PAYLOAD, number))


def _latency_bare(bench: Bench) -> list[float]:
    bench.client.flushall()
    stamps = _new_stamps(bench)
    messages = bodies(bench.sizes.latency + WARM_UP, "bench.stamp", numbered=True)
    bench.client.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
    xadd = bench.client.xadd
    with bench.bare(stamps) as process:
        return _at_rest(bench, "bare", process, stamps, lambda number: xadd(STREAM, {FIELD: messages[number]}))


WARM_UP = 20
SPACING_S = 0.01


def _new_stamps(bench: Bench) -> Path:
    path = bench.folder / "stamps"
    path.write_bytes(b"")
    return path


def _at_rest(
    bench: Bench, name: str, process: subprocess.Popen[bytes], stamps: Path, send: Callable[[int], object]
) -> list[float]:
    def wait_for(count: int) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while stamps.stat().st_size < count * STAMP.size:
            bench.check(process, name, deadline, f"the start of message {count}")
            time.sleep(0.01)

    total = WARM_UP + bench.sizes.latency
    sent = [0.0] * total
    clock = time.monotonic
    for number in range(total):
        if number == 1:
            wait_for(1)  # until here the consumer has been starting
            began = clock()
        if number:
            time.sleep(max(0.0, began + number * SPACING_S - clock()))
        sent[number] = clock()
        send(number)
    wait_for(total)
    started = dict(STAMP.iter_unpack(stamps.read_bytes()))
    if sorted(started) != list(range(total)):
        raise BenchmarkFailed(f"{len(started)} messages of {total} were run")
    return [started[number] - sent[number] for number in range(WARM_UP, total)]


# --- e. memory


def memory(bench: Bench) -> list[dict[str, Any]]:
    """Bytes by MEMORY USAGE, exactly: they do not vary from run to run."""
    client, count = bench.client, bench.sizes.ids

    def used(names: Sequence[Any]) -> int:
        return sum(client.memory_usage(name, samples=0) for name in names)

    def plain_keys() -> float:
        client.flushall()
        pipe = client.pipeline(transaction=False)
        for _ in range(count):
            pipe.set(os.urandom(16), 1, ex=120)
        pipe.execute()
        return used(client.keys()) / count

    a_key = plain_keys()
    rows = []
    client.flushall()
    with bench.app() as app:
        task = app.tasks["bench.noop"]
        for number in range(count):
            task.delay(user(number), PAYLOAD)
        rows.append(_row("produce id, bytes", used(client.keys("*:seen:p*")) / count, a_key, "SET id 1 EX"))
        names = streams(app)
        # The same entries again, by XADD alone.
        pipe = client.pipeline(transaction=False)
        for name in names:
            for entry_id, fields in client.xrange(name):
                pipe.xadd(f"bare:{name}", fields, id=entry_id)
        pipe.execute()
        ours, bare = used(names), used([f"bare:{name}" for name in names])
        rows.append(_row("queued message, bytes in the stream", ours / count, bare / count, "XADD, same ids"))

        client.flushall()
        for number in range(count):
            task.apply_async((user(number), PAYLOAD), dedupe_id=f"order-{number}")
        rows.insert(1, _row("dedupe id, bytes", used(client.keys("*:seen:d*")) / count, a_key, "SET id 1 EX"))
    return rows


def _row(what: str, ours: float, bare: float, against: str) -> dict[str, Any]:
    ratio = ours / bare
    return {"what": what, "against": against, "ours": ours, "bare": bare, "ratio": ratio, "low": ratio, "high": ratio}


# --- the run


def ordered(turn: int, **contestants: Callable[..., Any]) -> list[tuple[str, Callable[..., Any]]]:
    """A B in even turns, B A in odd ones."""
    items = list(contestants.items())
    return items[::-1] if turn % 2 else items


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    run: Callable[[Bench, int], Figures]
    lines: tuple[tuple[str, str, str], ...]
    """What is shown: title, suffix of the figures' names, what is bare."""


PARTS = (
    Part("drain", drain, (("drain no-op tasks, messages/s", "", "XREADGROUP, decode, call, XACK"),)),
    Part("single", single, (("delay() one by one, messages/s", "", "Redis.xadd"),)),
    Part("bulk", bulk, (("send_many, messages/s", "", "pipelined XADD"),)),
    Part(
        "latency",
        latency,
        (
            ("latency at rest, p50 ms", " p50", "blocking XREADGROUP"),
            ("latency at rest, p99 ms", " p99", "blocking XREADGROUP"),
        ),
    ),
)


def measure(bench: Bench, rounds: int) -> dict[str, Any]:
    check_same_bytes(bench)
    raw: dict[str, list[Figures]] = {part.name: [] for part in PARTS}
    for turn in range(rounds):
        for part in PARTS:
            progress(f"round {turn + 1} of {rounds}: {part.name}")
            raw[part.name].append(part.run(bench, turn))
    progress("memory")
    rows = []
    for part in PARTS:
        for title, suffix, against in part.lines:
            ours = [figures["ours" + suffix] for figures in raw[part.name]]
            bare = [figures["bare" + suffix] for figures in raw[part.name]]
            ratios = [a / b for a, b in zip(ours, bare, strict=True)]
            row = _row(title, statistics.median(ours), statistics.median(bare), against)
            rows.append({**row, "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)})
    return {"rows": rows + memory(bench), "rounds": raw}


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [["", "streamtask", "bare", "ratio", "range", "bare is"]]
    for row in rows:
        span = "" if row["low"] == row["high"] else f"{row['low']:.2f} - {row['high']:.2f}"
        lines.append([row["what"], _number(row["ours"]), _number(row["bare"]), f"{row['ratio']:.2f}", span])
        lines[-1].append(row["against"])
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    out = []
    for line in lines:
        middle = "  ".join(line[column].rjust(widths[column]) for column in range(1, 5))
        out.append(f"{line[0].ljust(widths[0])}  {middle}  {line[5]}".rstrip())
    out.insert(1, "-" * max(map(len, out)))
    return "\n".join(out)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


@contextlib.contextmanager
def awake_cpus() -> Iterator[str]:
    """Keeps idle CPUs from halting, where that is allowed; says whether it is."""
    try:
        # Unbuffered: the kernel keeps the request as long as the file is open.
        file = open("/dev/cpu_dma_latency", "wb", buffering=0)  # noqa: SIM115 - closed below
    except OSError as error:
        yield f"may halt (/dev/cpu_dma_latency: {error.strerror})"
        return
    with file:
        try:
            file.write(struct.pack("=i", 0))
        except OSError as error:
            held = f"may halt (/dev/cpu_dma_latency: {error.strerror})"
        else:
            held = "kept awake (/dev/cpu_dma_latency held at 0)"
        yield held


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures streamtask against bare redis-py loops.")
    parser.add_argument("--rounds", type=int, help="how often each pair is measured (5; 2 with --quick)")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works, not how fast it is")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures to this file")
    parser.add_argument("--redis-server", metavar="PATH", help="which server to start (default: as embedded://)")
    parser.add_argument("--consume", metavar="PORT", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.consume:
        consume(options.consume)
    rounds = options.rounds if options.rounds is not None else 2 if options.quick else 5
    if rounds < 1:
        parser.error("--rounds must be at least 1")

    from streamtask.errors import EmbeddedServerError
    from streamtask.redis.embedded import find_server

    if options.redis_server:
        os.environ["STREAMTASK_REDIS_SERVER"] = options.redis_server
    try:
        binary, server_version = find_server()
    except EmbeddedServerError as error:
        parser.error(str(error))
    sizes = QUICK if options.quick else Sizes()
    signal.signal(signal.SIGTERM, stop)
    folder = Path(tempfile.mkdtemp(prefix="streamtask-bench-"))
    bench = Bench(folder, sizes)
    try:
        with awake_cpus() as idle, bench.server(binary):
            cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            versions = {
                "python": platform.python_version(),
                **{name: version(name) for name in ("redis", "hiredis", "msgpack")},
                "redis-server": server_version,
            }
            began = time.monotonic()
            measured = measure(bench, rounds)
            elapsed = time.monotonic() - began
    except BenchmarkFailed as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    progress("")
    about = {
        "versions": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": cpus,
        "idle_cpus": idle,
        "rounds": rounds,
        "quick": options.quick,
        "sizes": asdict(sizes),
        "seconds": round(elapsed, 1),
    }
    names = {"python": "Python", "redis": "redis-py"}
    print(", ".join(f"{names.get(name, name)} {number}" for name, number in versions.items()))
    print(f"{about['system']}, {cpus} CPUs; idle CPUs {idle}")
    print(f"{rounds} rounds in {elapsed:.0f} s, one redis-server on 127.0.0.1, no persistence")
    if options.quick:
        print("quick: these sizes are too small for conclusions")
    print(f"\n{table(measured['rows'])}\n")
    print("Medians; ratio: median of the rounds' ratios, streamtask / bare (rates: more is better; others: less).")
    if options.json:
        options.json.write_text(json.dumps({**about, **measured}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
