"""The event loop that runs async bodies."""

from __future__ import annotations

import asyncio
import operator
import os
import sys
import threading
import types
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, copy_context
from typing import Any

from ..clock import mono_s
from ..queue.backlog import Batch
from ..queue.delivery import Delivery, Outcome
from ..text import logger
from .ending import end_process
from .ports import Ended, Place, TaskRunner, no_limit
from .running import EXIT_FORKED, REVOKED, UNSTARTED, Running, plain_call

log = logger("streamtask.executor")


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


MANY = 1 << 30
PASS_S = 0.005
"""How long bodies that never wait follow each other in one pass of the event loop: what waits there has its turn, too. Others
may bring more and more of them meanwhile."""

is_cancelled: Callable[[asyncio.Task[None]], Any] = (
    getattr(asyncio.Task, "cancelling", None) or operator.attrgetter("_must_cancel")  # before Python 3.11
)


class Drivers(Coroutines):
    """Runs what waits in ``running.coroutines``, as long as there are slots.

    A driver is an asyncio task that runs one body after the other. A body that never waits costs no task of its own; one that
    does has its driver's until it has ended, while other drivers run the rest. Who asks asyncio for the current task is told
    the driver, so it must be this body's alone: where a body has kept its task, or left it cancelled, the driver ends, too. So
    it does where its bodies have held up the loop for a while: the next pass has another.
    """

    def __init__(self, runner: TaskRunner, running: Running) -> None:
        super().__init__(runner)
        self._running = running
        self._to_begin: set[asyncio.Task[None]] = set()  # drivers that have not begun
        self._most = 1  # drivers to begin at once: as many as there are messages, where the last bodies have waited
        self._until = 0.0  # when drivers are to let the loop go on; 0: none has begun since ``begin``
        self._references = MANY
        self._fresh_context = copy_context().copy
        self.forked = False
        self._thread = 0
        self._tasks.add(asyncio.Task(self._count_references(), loop=self.loop))
        self.loop.run_forever()

    async def _count_references(self) -> None:
        """How often a task is referred to that nobody has kept but ``_tasks``, as it keeps drivers."""
        task = asyncio.current_task()
        assert task is not None
        references = sys.getrefcount(task)
        await asyncio.sleep(0)
        self._references = min(references, sys.getrefcount(task))
        self._tasks.discard(task)
        self.loop.stop()

    def begin(self) -> None:
        """Has what waits begun, in the loop's thread."""
        if self.forked:
            return
        running = self._running
        self._until = 0.0
        for _ in range(min(len(running.coroutines), len(running.slots), self._most) - len(self._to_begin)):
            # Not by the loop's factory, which a body may have set.
            driver: asyncio.Task[None] = asyncio.Task(self._drive(), loop=self.loop)
            self._to_begin.add(driver)
            self._tasks.add(driver)
            driver.add_done_callback(self._end_driver)

    def begin_soon(self) -> None:
        """As ``begin``, from any thread; drivers that run see to what waits by themselves."""
        if threading.get_ident() != self._thread:
            self.loop.call_soon_threadsafe(self.begin)

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        self._thread = threading.get_ident()
        super().run(until)

    def _end_driver(self, driver: asyncio.Task[None]) -> None:
        self._tasks.discard(driver)
        self._to_begin.discard(driver)  # where somebody has cancelled it before it could
        self.begin()

    async def _drive(self) -> None:
        try:
            await self._run_bodies()
        except GeneratorExit:
            raise
        except BaseException:
            end_process("a driver of coroutines")  # the event loop would go on, and never end its message

    @types.coroutine
    def _run_bodies(self) -> Generator[Any, Any, None]:
        driver = asyncio.current_task()
        assert driver is not None
        self._to_begin.discard(driver)
        running, runner, fresh = self._running, self._runner, self._fresh_context
        slots, waiting, functions, trusted = running.slots, running.coroutines, running.functions, running.trusted
        plain, begin, end = runner.plain_async, runner.begin, running.end
        last: Batch | None = None
        getrefcount, references = sys.getrefcount, self._references
        waited = False
        while True:
            now = mono_s()
            if not self._until:
                self._until = now + PASS_S
            elif now >= self._until and not waited:
                return
            waited = False
            try:
                slot = slots.pop()
            except IndexError:
                return  # who gives one back sees to what waits
            try:
                batch, position = waiting.popleft()
            except IndexError:
                slots.append(slot)
                if functions:
                    running.freed()  # which have come meanwhile, and found no slot
                return
            backlog = batch.backlog
            outcome: Outcome | None = None
            if backlog.halted or mono_s() >= trusted[backlog.number]:
                backlog.halted = True
                outcome = UNSTARTED
            elif backlog.revoked and batch.delivery(position).id in backlog.revoked:
                outcome = REVOKED
            else:
                slot.begin(backlog.number, (batch.ids[position],))
                function, args, kwargs = plain_call(batch.items[position], plain)
                context = fresh()
                value: Any = None
                error: BaseException | None = None
                try:
                    if function is None:
                        delivery = batch.delivery(position)
                        place = Place(backlog.queue, backlog.shard, backlog.lease.token, slot.set_deadline, False)
                        body = runner.arun(delivery, place)
                        awaited = context.run(body.send, None)
                    else:
                        if batch is not last:
                            last = batch
                            shared_place = Place(backlog.queue, backlog.shard, backlog.lease.token, no_limit, False)
                        place = shared_place
                        body, awaited = context.run(begin, function, args, kwargs, batch, place, position)
                except StopIteration as ended:
                    value = ended.value
                except BaseException as exc:
                    error = exc
                else:
                    # It waits, in this task; the others' time has come.
                    waited = True
                    if self._most != MANY:
                        self._most = MANY
                        self.begin()
                    value, error = yield from _go_on(context, body, awaited)
                if error is not None:
                    outcome, error = fresh().run(runner.failed, batch.delivery(position), place, error), None
                elif function is None:
                    outcome, result = value
                    if result is not None:
                        batch.results.append((delivery, result))
                if self.forked:
                    os._exit(EXIT_FORKED)
            end(batch, position, slot, outcome)
            if functions:
                running.freed()
            if getrefcount(driver) > references or is_cancelled(driver):
                return


def _go_on(context: Context, body: Coroutine[Any, Any, Any], awaited: Any) -> Generator[Any, Any, Any]:
    """Runs what has begun to its end, in the place of its task. Answers what it has returned or raised."""
    while True:
        step: Callable[[Any], Any]
        value: Any
        try:
            value, step = (yield awaited), body.send
        except GeneratorExit:
            body.close()
            raise
        except BaseException as exc:
            value, step = exc, body.throw
        try:
            awaited = context.run(step, value)
        except StopIteration as ended:
            return ended.value, None
        except BaseException as exc:
            return None, exc
