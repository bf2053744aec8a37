"""Bodies that run side by side: threads and coroutines take what lies ready, and each message is one body's alone."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections import deque
from types import SimpleNamespace

import pytest

from streamtask.coordination.lease import Lease
from streamtask.coordination.shared import SharedMemory, create_file
from streamtask.queue.backlog import Backlog
from streamtask.queue.rules import ConsumerSettings
from streamtask.redis.keys import SHARED, QueueKeys
from streamtask.worker import coroutines
from streamtask.worker.coroutines import Drivers
from streamtask.worker.running import Running
from streamtask.worker.side_by_side import ParallelExecutor
from tests.helpers import wait_until

CONCURRENCY = 4


class Rig:
    """An executor without a control loop; bodies get their number."""

    def __init__(self, function=None, coroutine=None):
        def begin(body, args, kwargs, *where):
            found = body(*args, **kwargs)
            return found, found.send(None)

        here = SimpleNamespace(place=None, batch=None, cells=None, delivery=None)
        self.failed = []
        self.runner = SimpleNamespace(
            plain={"t": function} if function else {}, plain_async={"t": coroutine} if coroutine else {},
            here=here, begin=begin, has_async=coroutine is not None, is_async=lambda task: coroutine is not None,
            failed=lambda delivery, place, exc: self.failed.append((delivery.args[0], exc)),
        )  # fmt: skip
        fd = create_file(CONCURRENCY)
        self.memory = SharedMemory(fd, CONCURRENCY)
        os.close(fd)
        self.memory.trusted[0] = float("inf")
        keys = QueueKeys("streamtask", "a", "q").shard(0, SHARED)
        self.backlog = Backlog(Lease(keys, "g", "i", 1000, True, 1, 0.0), "q", SHARED, ConsumerSettings())
        self.backlog.number = 0
        self.running = Running(self.memory, CONCURRENCY, lambda: None)
        self.executor = ParallelExecutor(CONCURRENCY, self.runner, self.running)
        self.sent = 0

    def submit(self, count):
        self.backlog.buffer.extend(
            [b"%d-0" % n, ["t", None, b"", [n], {}, None]] for n in range(self.sent, self.sent + count)
        )
        self.sent += count
        batch = self.backlog.hand_free(self.backlog.choose_free(count))
        self.executor.submit(batch)
        return batch


def run_loop(rig, until):
    """Runs the event loop of the drivers for as long as that."""
    drivers = rig.executor.drivers
    drivers.loop.call_soon(drivers.begin)

    deadline, over = time.monotonic() + 20, []

    def watch():
        over[:] = [until()]
        if over[0] or time.monotonic() > deadline:
            drivers.end()
        else:
            drivers.loop.call_later(0.001, watch)

    drivers.loop.call_soon(watch)
    drivers.run()
    drivers.loop.close()
    assert over[0], "not within its time"


@pytest.mark.parametrize("known", [0, 200], ids=["new", "quick so far"])
def test_nothing_waits_behind_a_long_body_while_a_thread_is_free(known):
    gate, ran = threading.Event(), []

    def body(n):
        if n >= known and (n - known) % 10 == 0 and n - known < 10 * (CONCURRENCY - 1):
            assert gate.wait(60)
        ran.append(n)

    rig = Rig(body)
    while rig.sent < known:
        rig.submit(20)
        wait_until(lambda: len(ran) == rig.sent, 20)
    rig.submit(50)
    held = set(range(known, known + 10 * (CONCURRENCY - 1), 10))
    try:
        wait_until(lambda: set(ran) >= set(range(known, known + 50)) - held, 20, lambda: str(sorted(ran)[-50:]))
        assert not held & set(ran)
        assert len(rig.memory.running()) == len(held), "the supervisor sees which bodies run"
    finally:
        gate.set()
    wait_until(lambda: len(ran) == rig.sent, 20)
    rig.executor.close()
    assert rig.memory.running() == []


def test_short_bodies_follow_each_other_in_few_threads():
    threads = []
    rig = Rig(lambda n: threads.append(threading.get_ident()))
    for _ in range(100):
        rig.submit(50)
        wait_until(lambda: len(threads) == rig.sent, 20)
    late = threads[-2000:]
    changes = sum(one != other for one, other in itertools.pairwise(late))
    assert changes < len(late) / 10
    rig.executor.close()


def test_what_is_withdrawn_has_run_or_comes_back_once():
    ran = []

    def body(n):
        ran.append(n)
        time.sleep(0.0002)

    rig = Rig(body)
    batches = []
    for _ in range(40):
        batches.append(rig.submit(30))
        rig.executor.withdraw(rig.backlog)
    wait_until(lambda: all(len(batch.ended) == 30 for batch in batches), 20)
    back = sum(len(batch.odd) for batch in batches)
    assert len(ran) + back == rig.sent
    assert len(set(ran)) == len(ran)
    assert back, "none came back"
    for batch in batches:
        assert sorted(batch.ended) == list(range(30))
        rig.backlog.collect_free(batch)
    assert len(rig.backlog.buffer) == back
    assert len(rig.backlog.finished) == len(ran)
    rig.executor.close()


def test_coroutines_that_do_not_wait_share_a_task_and_those_that_do_have_their_own(monkeypatch):
    monkeypatch.setattr(coroutines, "PASS_S", 60)  # else a loaded machine's driver lets the loop go on
    tasks = {}

    async def body(n):
        if n == 5:
            await asyncio.sleep(0.01)
        tasks[n] = asyncio.current_task().get_name()

    rig = Rig(coroutine=body)
    batch = rig.submit(20)
    run_loop(rig, lambda: len(batch.ended) == 20)
    assert len({tasks[n] for n in range(5)}) == 1
    assert rig.failed == []
    assert len(rig.running.slots) == CONCURRENCY


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("how", ["kept", "cancelled", "later"])
def test_no_other_body_feels_what_one_has_done_to_its_task(how, waits):
    kept = []

    async def body(n):
        if n % 3 == 0:
            if how == "kept":
                kept.append(asyncio.current_task())
            elif how == "cancelled":
                asyncio.current_task().cancel()
            else:
                asyncio.get_running_loop().call_later(0.002, asyncio.current_task().cancel)
        for task in kept if n % 3 == 1 else ():
            task.cancel()  # of bodies that have ended, or will have
        if waits and n % 3:
            await asyncio.sleep(0.005)

    rig = Rig(coroutine=body)
    batch = rig.submit(60)
    run_loop(rig, lambda: len(batch.ended) == 60)
    assert rig.failed == []


def test_a_coroutine_never_has_the_context_of_another():
    from contextvars import ContextVar

    var, seen = ContextVar("var", default=None), []

    async def body(n):
        seen.append(var.get())
        var.set(n)
        await asyncio.sleep(0.001 if n % 2 else 0)
        seen.append(var.get() == n)

    rig = Rig(coroutine=body)
    batch = rig.submit(40)
    run_loop(rig, lambda: len(batch.ended) == 40)
    assert rig.failed == []
    assert seen.count(None) == seen.count(True) == 40


def test_drivers_that_others_cancel_leave_what_they_have_not_begun():
    ran = []

    async def body(n):
        ran.append(n)
        await asyncio.sleep(0)

    rig = Rig(coroutine=body)
    drivers = rig.executor.drivers
    batch = rig.submit(40)

    def cancel_all():
        for task in asyncio.all_tasks(drivers.loop):
            if "_drive" in repr(task):
                task.cancel()

    drivers.loop.call_soon(drivers.begin)
    drivers.loop.call_soon(cancel_all)
    run_loop(rig, lambda: len(batch.ended) == 40)
    assert sorted(ran) == list(range(40))
    assert isinstance(drivers, Drivers)


class Watched(deque):
    """A deque that says where somebody finds nothing in it, before they know."""

    on_empty = None

    def popleft(self):
        if not self and self.on_empty is not None:
            call, self.on_empty = self.on_empty, None
            call()
        return super().popleft()


@pytest.mark.parametrize("late", ["function", "coroutine"])
def test_a_slot_that_somebody_holds_while_nothing_is_found_to_run_is_seen_by_the_other_kind(late, monkeypatch):
    """The last free one: what is brought just then begins once it is given back."""
    monkeypatch.setattr(coroutines, "PASS_S", 60)  # else a loaded machine's driver ends before it has looked
    gate, ran, kinds = threading.Event(), [], []

    def function(n):
        ran.append(n)
        assert n >= CONCURRENCY - 1 or gate.wait(60)

    async def coroutine(n):
        ran.append(n)

    rig = Rig(function, coroutine)
    running, drivers = rig.running, rig.executor.drivers
    running.functions, running.coroutines = Watched(), Watched()
    rig.runner.is_async = lambda task: kinds[-1] == "coroutine"

    def bring(kind, count=1):
        kinds.append(kind)
        rig.submit(count)
        if kind == "coroutine":
            drivers.begin_soon()

    def bring_late():
        bring(late)
        time.sleep(0.1)  # whoever is called finds no slot

    early, seen = ("coroutine", running.coroutines) if late == "function" else ("function", running.functions)
    loop = threading.Thread(target=drivers.run)
    loop.start()
    try:
        bring("function", CONCURRENCY - 1)
        wait_until(lambda: len(ran) == CONCURRENCY - 1 and len(running.slots) == 1, 20)
        seen.on_empty = bring_late
        bring(early)
        wait_until(lambda: len(ran) == CONCURRENCY + 1, 5, lambda: f"{kinds}: {ran}")
    finally:
        gate.set()
        wait_until(lambda: len(running.slots) == CONCURRENCY, 20)
        rig.executor.close()
        loop.join()
        drivers.loop.close()
