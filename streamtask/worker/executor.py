"""The executor of a process that runs one body at a time. It says what has ended, and never talks to Redis.

It runs batches in the process's main thread, one delivery after the other, the synchronous and the asynchronous ones.
``side_by_side.py`` has the executor for more.

Before each body an executor checks that its lease is still to be trusted; what it does not start goes back. Each body runs in
a context of its own, so that none sees another's context variables. The runner lets nothing out; should a thread die all the
same, its process ends.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Hashable
from contextvars import copy_context
from typing import Any

from ..clock import mono_s
from ..coordination.shared import SharedMemory
from ..queue.backlog import Backlog, Batch
from ..queue.delivery import CLOSES, Delivery, Outcome
from .coroutines import Coroutines
from .ports import Ended, Place, TaskRunner, goes_on
from .running import EXIT_FORKED, REVOKED, SKIPPED, UNSTARTED


class SequentialExecutor:
    """Runs batches in order, in the thread that calls ``run_batch``."""

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

    def due(self) -> bool:
        """Whether a batch has ended: then the control loop is run, by the same thread (``turns.py``)."""
        return bool(self.ended)

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
