"""The executor of a process that runs several bodies at once: functions in threads, coroutines on one event loop.

What is handed out lies in one place, and whoever is free takes the next: short bodies follow each other in one thread, without
a wake-up for each, and nothing waits behind a long one while a thread is free.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Coroutine
from contextvars import Context, copy_context
from queue import SimpleQueue
from typing import Any

from ..clock import mono_s
from ..coordination.shared import Slot
from ..queue.backlog import Backlog, Batch
from ..queue.delivery import Delivery, Outcome
from .coroutines import Coroutines, Drivers
from .ending import start_thread
from .ports import Ended, Place, TaskRunner, goes_on, no_limit
from .running import EXIT_FORKED, REVOKED, UNSTARTED, Running, Work, plain_call

LONG_S = 0.0005
"""A body that takes longer than that takes long: other threads are called to run what waits."""
OF_BODIES = 16
SLOW = 0.1
"""Where no more of the last bodies took long, one thread runs what waits, and another watches."""
WATCH_S = 0.0005
"""How often the watcher looks whether the other gets on."""


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
        self._slow = 1.0  # the share of bodies, of the last some, that took long; none is known yet
        self._watcher: threading.Lock | None = None  # the gate of the thread that watches
        self._last: Work | None = None  # what was begun last
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
        while self._running.idle:
            self._call_one()
        for thread in self._threads:
            thread.join()
        if self._coroutines is not None:
            self._coroutines.end()

    # Threads

    def _call(self, count: int) -> None:
        """So many functions more wait: calls threads."""
        if self._slow > SLOW:
            while count > 0 and self._call_one():
                count -= 1
        elif count > 0:
            if self._idle() >= len(self._threads):
                self._call_one()
            self._watch()

    def _idle(self) -> int:
        """How many threads run nothing."""
        return len(self._running.idle) + (self._watcher is not None)

    def _call_one(self) -> bool:
        """Wakes a thread, or starts one. False if all run already."""
        try:
            self._running.idle.pop().release()
            return True
        except IndexError:
            with self._starting:
                number = len(self._threads)
                if number >= self._concurrency or self._closed:
                    return False
                run = functools.partial(self._run_thread, threading.Lock())
                self._threads.append(start_thread(f"streamtask-{number}", "a thread that runs bodies", run))
            return True

    def _watch(self) -> None:
        """Has a thread watch, if none does and something waits."""
        if self._watcher is None and self._running.functions and self._running.slots:
            try:
                gate = self._running.idle.pop()
            except IndexError:
                self._call_one()
                return
            self._watcher = gate
            gate.release()

    def _watch_on(self, gate: threading.Lock) -> None:
        """The watcher's time: until nothing waits, or nothing has begun for a while. Then a body takes long, and it has to run
        what waits behind it, while another thread watches."""
        running = self._running
        while running.functions and running.slots and not self._closed:
            last = self._last
            if gate.acquire(timeout=WATCH_S) or self._last is last:
                break
        self._watcher = None
        self._watch()

    def _run_thread(self, gate: threading.Lock) -> None:
        gate.acquire()
        running, runner, fresh = self._running, self._runner, self._fresh_context
        slots, functions, coroutines = running.slots, running.functions, running.coroutines
        trusted, plain, here, mono, end = running.trusted, runner.plain, runner.here, mono_s, running.end
        known: Batch | None = None
        while not self._closed:
            try:
                slot = slots.pop()
                try:
                    work = functions.popleft()
                except IndexError:
                    slots.append(slot)
                    if coroutines:
                        running.freed()  # which have come meanwhile, and found no slot
                    raise
            except IndexError:
                here.batch = here.delivery = known = None
                self._wait(gate)
                continue
            self._last = work
            batch, position = work
            backlog = batch.backlog
            outcome: Outcome | None = None
            began = mono()
            if backlog.halted or began >= trusted[backlog.number]:
                backlog.halted = True
                outcome = UNSTARTED
            elif backlog.revoked and batch.delivery(position).id in backlog.revoked:
                outcome = REVOKED
            else:
                slot.begin(backlog.number, (batch.ids[position],))
                if batch is not known:
                    known = here.batch = batch
                    here.place = Place(backlog.queue, backlog.shard, backlog.lease.token, no_limit, False)
                here.cells = (position,)
                body, args, kwargs = plain_call(batch.items[position], plain)
                context = fresh()
                if body is None:
                    outcome = self._run(batch, position, slot, context)
                    known = None
                else:
                    try:
                        answer = context.run(body, *args, **kwargs)
                        if answer is not None and goes_on(answer):
                            outcome = context.run(self._go_on, batch.delivery(position), here.place, answer)
                    except BaseException as exc:
                        outcome = fresh().run(runner.failed, batch.delivery(position), here.place, exc)
                if self._forked:
                    os._exit(EXIT_FORKED)
            end(batch, position, slot, outcome)
            if coroutines:
                running.freed()
            if mono() - began > LONG_S:
                self._slow += (1.0 - self._slow) / OF_BODIES
                if self._slow <= SLOW and self._idle() + 1 < len(self._threads):
                    here.batch = here.delivery = known = None
                    self._wait(gate, behind=True)
            else:
                self._slow -= self._slow / OF_BODIES

    def _wait(self, gate: threading.Lock, behind: bool = False) -> None:
        """Until this thread is called. ``behind`` another one, which has taken its place while its body took long."""
        running = self._running
        running.idle.append(gate)
        if behind:
            self._watch()
        # Who brings something looks for somebody idle afterwards: one of both sees the other.
        if self._closed or (running.functions and running.slots and not behind):
            try:
                running.idle.remove(gate)
                return
            except ValueError:
                pass  # called already
        gate.acquire()
        if self._watcher is gate:
            self._watch_on(gate)

    def _run(self, batch: Batch, position: int, slot: Slot, context: Context) -> Outcome | None:
        """Runs what needs the runner."""
        delivery, backlog, runner = batch.delivery(position), batch.backlog, self._runner
        place = Place(backlog.queue, backlog.shard, backlog.lease.token, slot.set_deadline, False)
        runner.here.place = place
        ended = context.run(runner.run, delivery, place)
        outcome, result = ended if isinstance(ended, tuple) else context.run(self._await, delivery, place, ended)
        if result is not None:
            batch.results.append((delivery, result))
        return outcome

    def _go_on(self, delivery: Delivery, place: Place, answer: Any) -> Outcome | None:
        """Of a plain body that has returned what ``goes_on``. Plain ones have no results."""
        return self._await(delivery, place, self._runner.rest(delivery, place, answer))[0]

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
            self._call_one()
        if running.coroutines and self.drivers is not None:
            self.drivers.begin_soon()
