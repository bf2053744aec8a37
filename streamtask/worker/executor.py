"""Executors run deliveries and say which have ended. They never talk to Redis.

``SequentialExecutor`` (concurrency 1) runs batches in the process's main thread, one delivery after the other, the
synchronous and the asynchronous ones. ``ParallelExecutor`` runs single deliveries of different lanes side by side:
functions in threads, coroutines on an event loop.

Before each body the executor checks that its lease is still to be trusted; what it does not start goes back. Each body runs in
a context of its own, so that none sees another's context variables. The runner lets nothing out; should a thread die all the
same, its process ends.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Hashable
from contextvars import copy_context
from queue import Empty, SimpleQueue
from typing import Any

from ..clock import mono_s
from ..coordination.shared import SharedMemory, Slot
from ..queue.backlog import Backlog, Batch
from ..queue.delivery import CLOSES, Delivery, Outcome
from ..text import logger
from .ending import end_process, start_thread
from .ports import Ended, Place, TaskRunner, goes_on

log = logger("streamtask.executor")

SKIPPED = Outcome("skipped")
UNSTARTED = Outcome("unstarted")
REVOKED = Outcome("revoked")
EXIT_FORKED = 70
"""Exit status of a process that a body has forked, and that came back out of the body."""


class Coroutines:
    """Runs async bodies on an event loop, which goes on whatever they do to it."""

    def __init__(self, runner: TaskRunner, *, interruptible: bool = False) -> None:
        """``interruptible``: ``KeyboardInterrupt`` may be somebody's Ctrl-C."""
        self._runner = runner
        self._goes_on_after = SystemExit if interruptible else (SystemExit, KeyboardInterrupt)
        self.loop = asyncio.new_event_loop()
        self._over = False
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio itself keeps only weak references

    def start(
        self, delivery: Delivery, place: Place, body: Coroutine[Any, Any, Ended], ended: Callable[[Ended], None]
    ) -> None:
        """Starts a body, in the loop's thread. ``ended`` is called there, in any case."""
        found: list[Ended] = []

        async def run() -> None:
            found.append(await body)

        def end(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            body.close()  # if it was never begun
            # A task that was cancelled before its first step has run nothing.
            ended(found[0] if found else self._runner.cancelled(delivery, place))

        # Not by the loop's factory, which a body may have set.
        task = asyncio.Task(run(), loop=self.loop)
        self._tasks.add(task)
        task.add_done_callback(end)

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Runs the loop, on and on: bodies may stop it, and an exit of what a body has started there comes out of it."""
        while not (self._over or until()):
            try:
                self.loop.run_forever()
            except self._goes_on_after:
                log.exception("what a body has left in the event loop wanted to end the process")

    def end(self) -> None:
        """Lets ``run`` return, from another thread."""
        self._over = True
        self.loop.call_soon_threadsafe(self.loop.stop)

    def run_one(self, delivery: Delivery, place: Place, body: Coroutine[Any, Any, Ended]) -> Ended:
        """Runs the loop until this body has ended."""
        found: list[Ended] = []

        def end(ended: Ended) -> None:
            found.append(ended)
            self.loop.stop()

        self.start(delivery, place, body, end)
        self.run(lambda: bool(found))
        return found[0]


class SequentialExecutor:
    """Runs batches in order, in the thread that calls ``run_batch``."""

    capacity = 1  # batches: the control loop is run between two, by the same thread (``turns.py``)

    def __init__(
        self,
        runner: TaskRunner,
        memory: SharedMemory,
        between: Callable[[], None] = lambda: None,
        *,
        interruptible: bool = False,
    ) -> None:
        """``between``: called between two bodies, every ``signal_after_s``: what has ended may be acknowledged."""
        self._runner = runner
        self._memory = memory
        self._slot = memory.slot(0)
        self.between = between
        self._next: Batch | None = None
        self._failed: dict[Backlog, set[Hashable]] = {}
        self._coroutines: Coroutines | None = None
        self._interruptible = interruptible
        self._fresh_context = copy_context().copy
        self.ended: deque[Batch] = deque()
        self.out: deque[Batch] = deque()  # handed over and not ended, in order
        self.signal_after_s = 0.005
        self._forked = False

    def submit(self, batch: Batch) -> None:
        self.out.append(batch)
        self._next = batch

    def next(self) -> Batch | None:
        """The batch to run now, once."""
        batch, self._next = self._next, None
        return batch

    def has_next(self) -> bool:
        return self._next is not None

    def forked(self) -> None:
        """In a child that a body has forked: it ends when it comes back out of the body, and its request stays what it
        was, whatever the parent runs next. The memory that says what runs is its parent's."""
        self._forked = True
        here = self._runner.here
        if here.batch is not None:
            here.delivery, here.batch = here.batch.delivery(here.cells[0]), None

    def position(self, batch: Batch) -> int:
        """How many of a batch have ended; only the first of ``out`` runs."""
        return self._slot.cells[0] if batch.slot is self._slot else 0

    def cut(self, batch: Batch) -> int | None:
        """Ends a batch that runs behind the body that runs. From which position on nothing begins any more; None where nothing
        was left, or one has begun meanwhile: then what is left comes back with the batch, as unstarted."""
        cells = self._slot.cells
        if batch.slot is not self._slot:
            return None
        end = cells[0] + 1
        if end >= cells[1]:
            return None
        # Who runs the batch says what it begins, and then looks where to end: one of both sees what the other wrote.
        batch.end = end
        if cells[0] >= end:
            return None  # its body is seen to run until it has ended
        cells[1] = end
        return end

    def withdraw(self, backlog: Backlog) -> None:
        """Nothing waits here: a batch that runs gives back what it has not started between two bodies."""

    def forget(self, backlog: Backlog) -> None:
        self._failed.pop(backlog, None)

    def close(self) -> None:
        """Ends the event loop, if there was one."""
        if self._coroutines is not None:
            asyncio.set_event_loop(None)
            self._coroutines.loop.close()
            self._coroutines = None

    def run_batch(self, batch: Batch) -> None:
        backlog, items, slot = batch.backlog, batch.items, self._slot
        lease = backlog.number
        failed = self._failed.setdefault(backlog, set())
        if failed:
            failed.difference_update(batch.reopened)
        in_main_thread = threading.current_thread() is threading.main_thread()
        place = Place(backlog.queue, backlog.shard, backlog.lease.token, slot.set_deadline, in_main_thread)
        trusted, cells, runner, mono = self._memory.trusted, slot.cells, self._runner, mono_s
        plain, here, outcomes, fresh = runner.plain, runner.here, batch.outcomes, self._fresh_context
        slot.begin(lease, batch.ids)
        batch.slot = slot
        # Whoever asks for the request finds the delivery by the cell that says which one runs.
        here.place, here.batch, here.cells = place, batch, cells
        signal_at = mono() + self.signal_after_s
        index = 0
        for index, item in enumerate(items):
            now = mono()
            if now >= trusted[lease] or backlog.halted:
                backlog.halted = True
                outcomes.extend((i, UNSTARTED) for i in range(index, len(items)))
                break
            if now >= signal_at and index:
                cells[0] = index
                self.between()
                signal_at = mono() + self.signal_after_s
            cells[0] = index
            if batch.end <= index:  # looked at after that is written, see ``cut``
                outcomes.extend((i, UNSTARTED) for i in range(index, len(items)))
                break
            outcome: Outcome | None = None
            if type(item) is list and not failed and not backlog.revoked:
                task, _, _, args, kwargs, _ = item[1]
                body = plain.get(task)
                if body is not None:
                    context = fresh()
                    try:
                        answer = context.run(body, *args, **kwargs)
                        if answer is None or not goes_on(answer):
                            continue
                        outcome = context.run(self._go_on, batch, index, place, answer)
                    except BaseException as exc:
                        outcome = fresh().run(runner.failed, batch.delivery(index), place, exc)
                else:
                    outcome = self._run(batch, batch.delivery(index), place)
            else:
                delivery = batch.delivery(index)
                if failed and delivery.lane in failed and delivery.lane is not None:
                    outcome = SKIPPED
                elif delivery.id in backlog.revoked:
                    outcome = REVOKED
                else:
                    outcome = self._run(batch, delivery, place)
            if outcome is not None:
                outcomes.append((index, outcome))
                if outcome.kind in CLOSES and (lane := batch.delivery(index).lane) is not None:
                    failed.add(lane)
        if self._forked:
            os._exit(EXIT_FORKED)
        # In this order: whoever sees that the batch has ended sees all its outcomes.
        slot.end()
        here.batch = here.delivery = None
        self.ended.append(batch)

    def _run(self, batch: Batch, delivery: Delivery, place: Place) -> Outcome | None:
        context = self._fresh_context()
        answer: Ended | Coroutine[Any, Any, Ended]
        if self._runner.is_async(delivery.task):
            answer = self._runner.arun(delivery, place)
        else:
            answer = context.run(self._runner.run, delivery, place)
        if not isinstance(answer, tuple):
            answer = context.run(self._await, delivery, place, answer)
        outcome, result = answer
        if result is not None:
            batch.results.append((delivery, result))
        return outcome

    def _go_on(self, batch: Batch, index: int, place: Place, answer: Any) -> Outcome | None:
        """Of a plain body that has returned what ``goes_on``. Plain ones have no results."""
        delivery = batch.delivery(index)
        return self._await(delivery, place, self._runner.rest(delivery, place, answer))[0]

    def _await(self, delivery: Delivery, place: Place, body: Coroutine[Any, Any, Ended]) -> Ended:
        if self._coroutines is None or self._coroutines.loop.is_closed():  # as a body can that is no coroutine
            self._coroutines = Coroutines(self._runner, interruptible=self._interruptible)
            asyncio.set_event_loop(self._coroutines.loop)
        return self._coroutines.run_one(delivery, place, body)


class ParallelExecutor:
    """Runs up to ``concurrency`` batches of one delivery at once, in threads or on one event loop."""

    def __init__(
        self,
        concurrency: int,
        runner: TaskRunner,
        memory: SharedMemory,
        wake: Callable[[], None],
    ) -> None:
        # Threads find their next delivery waiting; coroutines start as soon as they are handed over.
        self.capacity = concurrency if runner.has_async else 2 * concurrency
        self._concurrency = concurrency
        self._runner = runner
        self._memory = memory
        self._wake = wake
        self._inbox: SimpleQueue[Batch | None] = SimpleQueue()  # None: a thread ends
        self._slots: SimpleQueue[Slot] = SimpleQueue()
        for number in range(concurrency):
            self._slots.put(memory.slot(number))
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._starting = threading.Lock()
        self._coroutines: Coroutines | None = None
        self.ended: deque[Batch] = deque()
        self.out: deque[Batch] = deque()
        self._forked = False

    def submit(self, batch: Batch) -> None:
        self.out.append(batch)
        if self._runner.is_async(batch.delivery(0).task):
            self._event_loop().call_soon_threadsafe(self._start_async, batch)
            return
        if len(self._threads) < self._concurrency and self._inbox.qsize() >= self._idle:
            name = f"streamtask-{len(self._threads)}"
            self._threads.append(start_thread(name, "a thread that runs bodies", self._run_thread))
        self._inbox.put(batch)

    def forked(self) -> None:
        """See ``SequentialExecutor``."""
        self._forked = True

    def position(self, batch: Batch) -> int:
        return 0

    def cut(self, batch: Batch) -> int | None:
        """A batch is one message here."""
        return None

    def withdraw(self, backlog: Backlog) -> None:
        """Gives back what waits for a thread: the hand-over of its shard must not wait for bodies of others."""
        waiting = []
        try:
            while True:
                waiting.append(self._inbox.get_nowait())
        except Empty:
            pass
        for batch in waiting:
            if batch is not None and batch.backlog is backlog:
                batch.outcomes.append((0, UNSTARTED))
                self.ended.append(batch)
            else:
                self._inbox.put(batch)

    def forget(self, backlog: Backlog) -> None:
        pass

    def close(self) -> None:
        """Ends the threads and the event loop, where nothing runs any more."""
        for _ in self._threads:
            self._inbox.put(None)
        for thread in self._threads:
            thread.join()
        if self._coroutines is not None:
            self._coroutines.end()

    def _run_thread(self) -> None:
        get, runner, fresh = self._inbox.get, self._runner, copy_context().copy
        while True:
            self._idle += 1
            batch = get()
            self._idle -= 1
            if batch is None:
                return
            slot = self._slots.get()
            outcome: Outcome | None = UNSTARTED
            place = self._begin(batch, slot)
            if place is not None:
                outcome = fresh().run(self._run, batch, batch.delivery(0), place)
            runner.here.delivery = None
            self._end(batch, slot, outcome)

    def _run(self, batch: Batch, delivery: Delivery, place: Place) -> Outcome | None:
        runner = self._runner
        body = runner.plain.get(delivery.task)
        if body is None or delivery.headers is not None or delivery.note is not None:
            ended = runner.run(delivery, place)
            outcome, result = ended if isinstance(ended, tuple) else self._await(delivery, place, ended)
            if result is not None:
                batch.results.append((delivery, result))
            return outcome
        runner.here.delivery, runner.here.place = delivery, place
        try:
            answer = body(*delivery.args, **delivery.kwargs)
        except BaseException as exc:
            return runner.failed(delivery, place, exc)
        if answer is None or not goes_on(answer):
            return None
        return self._await(delivery, place, runner.rest(delivery, place, answer))[0]

    def _await(self, delivery: Delivery, place: Place, body: Coroutine[Any, Any, Ended]) -> Ended:
        """Waits in a thread for what the event loop does."""
        ended: SimpleQueue[Ended] = SimpleQueue()
        loop = self._event_loop()
        assert self._coroutines is not None
        loop.call_soon_threadsafe(self._coroutines.start, delivery, place, body, ended.put)
        return ended.get()

    def _begin(self, batch: Batch, slot: Slot) -> Place | None:
        """Writes down that the body starts; None if the lease is not to be trusted any more."""
        backlog = batch.backlog
        lease = backlog.number
        if backlog.halted or mono_s() >= self._memory.trusted[lease]:
            backlog.halted = True
            return None
        slot.begin(lease, [batch.delivery(0).entry_id])
        return Place(backlog.queue, backlog.shard, backlog.lease.token, slot.set_deadline, False)

    def _end(self, batch: Batch, slot: Slot, outcome: Outcome | None) -> None:
        if self._forked:
            os._exit(EXIT_FORKED)
        slot.clear()
        self._slots.put(slot)
        if outcome is not None:
            batch.outcomes.append((0, outcome))
        self.ended.append(batch)
        self._wake()

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        with self._starting:
            if self._coroutines is None:
                self._coroutines = Coroutines(self._runner)
                start_thread("streamtask-async", "the event loop's thread", self._coroutines.run)
        return self._coroutines.loop

    def _start_async(self, batch: Batch) -> None:
        assert self._coroutines is not None
        try:
            slot = self._slots.get()
            place = self._begin(batch, slot)
            if place is None:
                self._end(batch, slot, UNSTARTED)
            else:
                delivery = batch.delivery(0)
                body = self._runner.arun(delivery, place)
                self._coroutines.start(delivery, place, body, functools.partial(self._end_async, batch, slot))
        except BaseException:
            end_process("the start of a coroutine")  # the event loop would go on, and never end this message

    def _end_async(self, batch: Batch, slot: Slot, ended: Ended) -> None:
        try:
            outcome, result = ended
            if result is not None:
                batch.results.append((batch.delivery(0), result))
            self._end(batch, slot, outcome)
        except BaseException:
            end_process("the end of a coroutine")
