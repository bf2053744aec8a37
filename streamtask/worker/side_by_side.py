"""The executor of a process that runs several bodies at once: functions in threads, coroutines on one event loop.

What is handed out lies in one place, and whoever is free takes the next: short bodies follow each other in one thread, without
a wake-up for each, and nothing waits behind a long one while a thread is free.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Coroutine
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any

from ..clock import mono_s
from ..coordination.shared import Slot
from ..queue.backlog import Backlog, Batch
from ..queue.delivery import Delivery, Outcome
from .coroutines import Coroutines, Drivers
from .ending import start_thread
from .ports import Ended, Place, TaskRunner, goes_on
from .running import EXIT_FORKED, REVOKED, UNSTARTED, Running


class ParallelExecutor:
    """See the module. Where the app has coroutines, its ``drivers`` run them, and their loop runs the control loop, too
    (``turns.py``)."""

    def __init__(self, concurrency: int, runner: TaskRunner, running: Running) -> None:
        self._concurrency = concurrency
        self._runner = runner
        self._running = running
        self._threads: list[threading.Thread] = []
        self._starting = threading.Lock()
        self.drivers = Drivers(runner, running) if runner.has_async else None
        self._coroutines: Coroutines | None = self.drivers
        self.out: deque[Batch] = deque()
        self._fresh_context = copy_context().copy
        self._forked = False
        self._closed = False
        if self.drivers is not None:
            running.freed = self._freed

    def submit(self, batch: Batch) -> None:
        self.out.append(batch)
        running, items = self._running, batch.items
        if self.drivers is None:
            running.functions.extend([(batch, position) for position in range(len(items))])
            self._call(len(items))
            return
        is_async, functions = self._runner.is_async, 0
        for position, item in enumerate(items):
            if is_async(item[1][0] if type(item) is list else item.task):  # type: ignore[union-attr]
                running.coroutines.append((batch, position))
            else:
                running.functions.append((batch, position))
                functions += 1
        self._call(functions)

    def forked(self) -> None:
        """See ``SequentialExecutor``."""
        self._forked = True
        if self.drivers is not None:
            self.drivers.forked = True

    def due(self) -> bool:
        """Whether something has ended, and so much that it is to be looked at now."""
        if self._running.waiting() > self._running.low:
            return False
        return any(batch.ended is not None and len(batch.ended) > batch.collected for batch in self.out)

    def withdraw(self, backlog: Backlog) -> None:
        self._running.withdraw(backlog)

    def forget(self, backlog: Backlog) -> None:
        pass

    def close(self) -> None:
        """Ends the threads and the event loop, where nothing runs any more."""
        self._closed = True
        self._call(len(self._threads))
        for thread in self._threads:
            thread.join()
        if self._coroutines is not None:
            self._coroutines.end()

    def _call(self, count: int) -> None:
        """Wakes threads that wait, or starts them, up to so many."""
        idle = self._running.idle
        for _ in range(min(count, self._concurrency)):
            try:
                idle.pop().release()
            except IndexError:
                if len(self._threads) >= self._concurrency or self._closed:
                    return
                name = f"streamtask-{len(self._threads)}"
                self._threads.append(start_thread(name, "a thread that runs bodies", self._run_thread))

    def _run_thread(self) -> None:
        gate = threading.Lock()
        gate.acquire()
        running = self._running
        slots, functions, idle = running.slots, running.functions, running.idle
        while not self._closed:
            try:
                slot = slots.pop()
                try:
                    batch, position = functions.popleft()
                except IndexError:
                    slots.append(slot)
                    raise
            except IndexError:
                idle.append(gate)
                # Who brings something looks for somebody idle afterwards: one of both sees the other.
                if self._closed or (functions and slots):
                    try:
                        idle.remove(gate)
                        continue
                    except ValueError:
                        pass  # called already
                gate.acquire()
                continue
            running.end(batch, position, slot, self._run(batch, position, slot))

    def _run(self, batch: Batch, position: int, slot: Slot) -> Outcome | None:
        backlog, item, runner = batch.backlog, batch.items[position], self._runner
        if backlog.halted or mono_s() >= self._running.trusted[backlog.number]:
            backlog.halted = True
            return UNSTARTED
        if backlog.revoked and batch.delivery(position).id in backlog.revoked:
            return REVOKED
        slot.begin(backlog.number, (batch.ids[position],))
        here, outcome = runner.here, None
        here.place = place = Place(backlog.queue, backlog.shard, backlog.lease.token, slot.set_deadline, False)
        here.batch, here.cells = batch, (position,)
        # What is an entry still has neither headers nor notes.
        body = runner.plain.get(item[1][0]) if type(item) is list else None
        context = self._fresh_context()
        if body is None:
            delivery = batch.delivery(position)
            ended = context.run(runner.run, delivery, place)
            outcome, result = ended if isinstance(ended, tuple) else context.run(self._await, delivery, place, ended)
            if result is not None:
                batch.results.append((delivery, result))
        else:
            _, _, _, args, kwargs, _ = item[1]  # type: ignore[index]
            try:
                answer = context.run(body, *args, **kwargs)
                if answer is not None and goes_on(answer):
                    delivery = batch.delivery(position)
                    outcome = context.run(self._await, delivery, place, runner.rest(delivery, place, answer))[0]
            except BaseException as exc:
                outcome = self._fresh_context().run(runner.failed, batch.delivery(position), place, exc)
        here.batch = here.delivery = None
        if self._forked:
            os._exit(EXIT_FORKED)
        return outcome

    def _await(self, delivery: Delivery, place: Place, body: Coroutine[Any, Any, Ended]) -> Ended:
        """Waits in a thread for what the event loop does."""
        ended: SimpleQueue[Ended] = SimpleQueue()
        coroutines = self._event_loop()
        coroutines.loop.call_soon_threadsafe(coroutines.start, delivery, place, body, ended.put)
        return ended.get()

    def _event_loop(self) -> Coroutines:
        with self._starting:
            if self._coroutines is None:
                self._coroutines = Coroutines(self._runner)
                start_thread("streamtask-async", "the event loop's thread", self._coroutines.run)
        return self._coroutines

    def _freed(self) -> None:
        """A slot is free, which may be what the other kind of body waits for."""
        running = self._running
        if running.functions:
            self._call(1)
        if running.coroutines and self.drivers is not None:
            self.drivers.begin_soon()
