"""What every adapter shares: the bodies of the tasks, the counters that tell how many have run, and the commands.

An adapter runs inside the virtual environment of its contestant, so this file needs the standard library alone (of
Python 3.10 on). Its one purpose is that all contestants run the same bodies, and are asked for the same things in the
same words:

    python adapters/NAME.py worker PROCESSES CONCURRENCY   becomes the worker; CONCURRENCY 0: what suits it best
    python adapters/NAME.py produce                        answers commands, one JSON object a line, see COMMANDS

The harness tells the rest through the environment: where Redis is, the folder of the run, options of a variant.
"""

from __future__ import annotations

import asyncio
import fcntl
import inspect
import json
import mmap
import os
import platform
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

CONCURRENCY = int(os.environ.get("BENCH_CONCURRENCY", "0"))
"""For workers that are told by their own settings; 0: what suits them best."""
URL = os.environ.get("BENCH_URL", "redis://127.0.0.1:6379/0")
FOLDER = os.environ.get("BENCH_FOLDER", ".")
OPTIONS: dict[str, Any] = json.loads(os.environ.get("BENCH_OPTIONS", "{}"))

USERS = 1000
PAYLOAD = "x" * 200
AT_ONCE = 50
FILL = 10_000
ROW = 5
"""Calls in a row for one user, where the order is looked at."""

STAMP = struct.Struct("=qd")
SLOT = struct.Struct("=qq")
SLOTS = 4096


# --- what the bodies do


class _Slot(threading.local):
    """This thread's own place among the counters: nobody else adds there, so no lock is needed."""

    cell: memoryview | None = None


_slot = _Slot()


def bump() -> None:
    """Counts one finished body."""
    cell = _slot.cell
    if cell is None:
        cell = _slot.cell = claim_slot()
    cell[1] += 1


def claim_slot() -> memoryview:
    """The file has rows of two numbers: in the first, how many rows are taken; in the others, a pid and its count.

    The pages are shared: a child that was forked afterwards goes on counting in its parent's row.
    """
    with open(os.path.join(FOLDER, "counters"), "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        view = memoryview(mmap.mmap(file.fileno(), 0)).cast("q")
        number = view[0] + 1
        view[0] = number
        view[2 * number] = os.getpid()
        # Closing the file would not do: the mmap keeps a duplicate of it.
        fcntl.flock(file, fcntl.LOCK_UN)
        return view[2 * number : 2 * number + 2]


_files: dict[str, int] = {}


def write_down(name: str, number: int) -> None:
    """Appends a number and this instant; the clock is one for all processes of the machine."""
    now = time.monotonic()
    file = _files.get(name)
    if file is None:
        path = os.path.join(FOLDER, name)
        file = _files[name] = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, STAMP.pack(number, now))


def noop(user_id: int, payload: str) -> None:
    """Does nothing."""
    bump()


def sleep(user_id: int, payload: str, ms: float) -> None:
    """Waits, as a body waits that asks a server."""
    time.sleep(ms / 1000)
    bump()


def stamp(user_id: int, payload: str, number: int) -> None:
    """Writes down when it started."""
    write_down("started", number)
    bump()


def mark(user_id: int, payload: str, number: int, ms: float) -> None:
    """Writes down its start and its end."""
    write_down("started", number)
    time.sleep(ms / 1000)
    write_down("ended", number)
    bump()


async def noop_async(user_id: int, payload: str) -> None:
    bump()


async def sleep_async(user_id: int, payload: str, ms: float) -> None:
    await asyncio.sleep(ms / 1000)
    bump()


async def stamp_async(user_id: int, payload: str, number: int) -> None:
    write_down("started", number)
    bump()


async def mark_async(user_id: int, payload: str, number: int, ms: float) -> None:
    write_down("started", number)
    await asyncio.sleep(ms / 1000)
    write_down("ended", number)
    bump()


BODIES: dict[str, Callable[..., None]] = {"noop": noop, "sleep": sleep, "stamp": stamp, "mark": mark}
ASYNC_BODIES: dict[str, Callable[..., Awaitable[None]]] = {
    "noop": noop_async,
    "sleep": sleep_async,
    "stamp": stamp_async,
    "mark": mark_async,
}


# --- what is sent


def user(number: int) -> int:
    """Neighbours are of different users."""
    return number * 7919 % USERS


def arguments(task: str, first: int, count: int, ms: float = 0.0, row: int = 1) -> list[tuple[Any, ...]]:
    """The arguments of calls FIRST, FIRST + 1, ...; ``row`` calls after each other are of one user."""
    numbers = range(first, first + count)
    if task == "noop":
        return [(user(number // row), PAYLOAD) for number in numbers]
    if task == "sleep":
        return [(user(number // row), PAYLOAD, ms) for number in numbers]
    if task == "stamp":
        return [(user(number // row), PAYLOAD, number) for number in numbers]
    return [(user(number // row), PAYLOAD, number, ms) for number in numbers]


# --- what an adapter says of its contestant


Calls = Sequence[tuple[Any, ...]]


@dataclass(frozen=True)
class Adapter:
    """How to send to one contestant and start its worker. It has ``sender`` or ``async_sender``, or both."""

    packages: tuple[str, ...]
    settings: dict[str, str]
    """What differs from its defaults, and why that is best for it."""
    worker: Callable[[int, int], list[list[str]]] | None = None
    """Argument lists of all processes to start, for a number of processes and a concurrency."""
    consume: Callable[[], object] | None = None
    """Instead of ``worker``: this process is the worker."""
    sender: Callable[[str], Callable[..., object]] | None = None
    """For a task's name, what sends one call of it."""
    bulk_sender: Callable[[str], Callable[[Calls], object]] | None = None
    """For a task's name, what sends many calls in the contestant's own way, where it has one."""
    session: Callable[[], AbstractAsyncContextManager[object]] | None = None
    """Around all that is sent."""
    async_sender: Callable[[str], Callable[..., Awaitable[object]]] | None = None
    async_bulk_sender: Callable[[str], Callable[[Calls], Awaitable[object]]] | None = None
    prepare: Callable[[str, Calls], Calls] | None = None
    """Made beforehand of the calls' arguments, and sent instead: for yardsticks only."""
    extra: dict[str, Callable[..., object]] = field(default_factory=dict)
    """Commands of this adapter alone."""


# --- producing


class Producing:
    """The commands of ``produce``. Each answers with what is written back as JSON."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    async def about(self) -> dict[str, Any]:
        adapter = self._adapter
        versions = {"python": platform.python_version()}
        for name in adapter.packages:
            try:
                versions[name] = version(name)
            except PackageNotFoundError:
                versions[name] = "not installed"
        can = {
            "one": adapter.sender is not None or adapter.async_sender is not None,
            "bulk": adapter.bulk_sender is not None or adapter.async_bulk_sender is not None,
            "at_once": adapter.async_sender is not None,
        }
        return {"versions": versions, "settings": adapter.settings, "can": can}

    async def one(self, task: str, n: int, seconds: float, first: int = 0) -> dict[str, float]:
        """Sends one call after the other: N of them, fewer if the time is over before."""
        calls = self._prepared(task, arguments(task, first, n))
        return await self._one(task, calls, seconds)

    async def _one(self, task: str, calls: Calls, seconds: float) -> dict[str, float]:
        clock, sent = time.perf_counter, 0
        if self._adapter.sender is not None:
            send = self._adapter.sender(task)
            began = clock()
            for args in calls:
                send(*args)
                sent += 1
                if clock() - began > seconds:
                    break
        else:
            send_async = self._async_sender(task)
            began = clock()
            for args in calls:
                await send_async(*args)
                sent += 1
                if clock() - began > seconds:
                    break
        return {"n": sent, "seconds": clock() - began}

    async def at_once(self, task: str, n: int, seconds: float, width: int = AT_ONCE) -> dict[str, float]:
        """So many asyncio tasks, each of which sends one call after the other."""
        send, clock = self._async_sender(task), time.perf_counter
        calls = iter(self._prepared(task, arguments(task, 0, n)))
        sent = 0

        async def sending() -> None:
            nonlocal sent
            for args in calls:
                await send(*args)
                sent += 1
                if clock() - began > seconds:
                    return

        began = clock()
        await asyncio.gather(*(sending() for _ in range(width)))
        return {"n": sent, "seconds": clock() - began}

    async def bulk(self, task: str, n: int, first: int = 0, ms: float = 0.0, row: int = 1) -> dict[str, float]:
        """Sends many calls in the contestant's own way to do that."""
        calls = self._prepared(task, arguments(task, first, n, ms, row))
        clock = time.perf_counter
        if self._adapter.bulk_sender is not None:
            send = self._adapter.bulk_sender(task)
            began = clock()
            send(calls)
        elif self._adapter.async_bulk_sender is not None:
            send_async = self._adapter.async_bulk_sender(task)
            began = clock()
            await send_async(calls)
        else:
            raise ValueError("this contestant has no bulk call")
        return {"n": n, "seconds": clock() - began}

    async def fill(self, task: str, n: int, first: int = 0, ms: float = 0.0, row: int = 1) -> dict[str, float]:
        """Sends many calls in the fastest way there is, in their order; not for timing."""
        if self._adapter.bulk_sender is not None or self._adapter.async_bulk_sender is not None:
            for start in range(first, first + n, FILL):
                await self.bulk(task, min(FILL, first + n - start), start, ms, row)
        else:
            await self._one(task, self._prepared(task, arguments(task, first, n, ms, row)), float("inf"))
        return {"n": n}

    async def pace(self, task: str, n: int, interval: float, first: int = 0) -> dict[str, Any]:
        """Sends a call each interval, late ones at once, and answers with the instants before the calls."""
        calls = self._prepared(task, arguments(task, first, n))
        clock, sent = time.monotonic, []
        send = None if self._adapter.sender is None else self._adapter.sender(task)
        send_async = None if send is not None else self._async_sender(task)
        began = clock()
        for number, args in enumerate(calls):
            wait = began + number * interval - clock()
            if wait > 0:
                # A loop's timers are late by up to a millisecond, and nothing else is to run on this one.
                time.sleep(wait)  # noqa: ASYNC251
            sent.append(clock())
            if send is not None:
                send(*args)
            elif send_async is not None:
                await send_async(*args)
        return {"sent": sent}

    def _prepared(self, task: str, calls: Calls) -> Calls:
        prepare = self._adapter.prepare
        return calls if prepare is None else prepare(task, calls)

    def _async_sender(self, task: str) -> Callable[..., Awaitable[object]]:
        if self._adapter.async_sender is None:
            raise ValueError("this contestant has no asyncio producer")
        return self._adapter.async_sender(task)

    async def serve(self) -> None:
        """Reads commands until there are no more."""
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what a framework prints must not be taken for an answer
        async with self._adapter.session() if self._adapter.session else nullcontext():
            for line in sys.stdin:
                command = json.loads(line)
                name = command.pop("do")
                try:
                    answer = (self._adapter.extra.get(name) or getattr(self, name))(**command)
                    if inspect.isawaitable(answer):
                        answer = await answer
                except Exception as error:
                    traceback.print_exc()
                    answer = {"error": f"{type(error).__name__}: {error}"}
                answers.write(json.dumps(answer) + "\n")
                answers.flush()
            # The harness is done with us, and what a framework would tidy up is in nobody's way.
            os._exit(0)


def main(adapter: Adapter) -> None:
    verb, *rest = sys.argv[1:]
    if verb == "produce":
        asyncio.run(Producing(adapter).serve())
        return
    os.environ["BENCH_CONCURRENCY"] = rest[1]
    if adapter.consume is not None:
        # A process for each; the last one is this.
        for _ in range(int(rest[0]) - 1):
            if os.fork() == 0:
                break
        adapter.consume()
    elif adapter.worker is not None:
        *others, last = adapter.worker(int(rest[0]), int(rest[1]))
        for argv in others:
            subprocess.Popen(argv)
        os.execvp(last[0], last)


def tool(name: str) -> str:
    """The path of a command of this environment."""
    return os.path.join(os.path.dirname(sys.executable), name)
