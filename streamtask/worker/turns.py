"""Who runs the control loop of a process whose main thread runs bodies: this thread, between them.

Quick bodies then cost no change of threads and no fight for the GIL. While a body takes long, a second thread, the
stand-in, runs the loop instead, so that what has ended is acknowledged, the next messages are there when it ends, and
the supervisor's orders are obeyed. Never both: whoever runs the loop holds ``_loop``.

``Turns`` is for one body at a time, ``LoopTurns`` for coroutines, whose event loop waits for the control loop, too. Where all
bodies run in threads, the main thread runs nothing but the control loop.
"""

from __future__ import annotations

import asyncio
import threading
import time
from queue import SimpleQueue

from ..clock import mono_s
from .control import Control
from .coroutines import Drivers
from .ending import end_process, start_thread
from .executor import SequentialExecutor

LONG_S = 0.01
"""How often the stand-in looks. A body that it sees twice is stood in for; looking costs the main thread the GIL."""
QUIET = 5
"""So many looks that see nothing run send the stand-in to sleep: waking it for each batch would cost a system call."""


class Turns:
    """See the module. ``run`` is the main thread's life."""

    def __init__(self, control: Control, executor: SequentialExecutor) -> None:
        self._control = control
        self._executor = executor
        self._loop = threading.Lock()
        self._wanted = False  # the main thread waits for the loop
        self._running = 0  # the number of the batch that runs; 0: none
        self._progress = 0  # changes whenever the main thread has run the loop
        self._watching = False
        self._calls: SimpleQueue[None] = SimpleQueue()  # wake the stand-in
        executor.between = self._between

    def run(self) -> None:
        """Runs turns and batches until the process is to end; any error that is not foreseen ends it at once."""
        stand_in = start_thread("streamtask-stand-in", "the control loop's stand-in", self._stand_in)
        control, executor = self._control, self._executor
        try:
            while not control.over:
                self._enter()
                if not (executor.has_next() or control.over):  # of which a stand-in may have heard
                    control.turn()
                self._loop.release()
                self._progress += 1
                batch = executor.next()
                if batch is not None:
                    self._running = self._progress
                    if not self._watching:
                        self._watch()
                    executor.run_batch(batch)
                    self._running = 0
            self._calls.put(None)
            stand_in.join()
        except BaseException:
            end_process("the control loop")

    def _enter(self) -> None:
        if not self._loop.acquire(blocking=False):
            self._wanted = True
            self._control.wake()
            self._loop.acquire()
            self._wanted = False

    def _between(self) -> None:
        """A turn between two bodies of a batch: a stand-in that has the loop is told that there is something to see."""
        if self._loop.acquire(blocking=False):
            self._control.turn(wait=False)
            self._loop.release()
            self._progress += 1
        else:
            self._control.wake()

    def _watch(self) -> None:
        self._watching = True
        self._calls.put(None)

    def _stand_in(self) -> None:
        while True:
            self._calls.get()
            if self._control.over:
                return
            quiet = seen = 0
            while quiet < QUIET:
                time.sleep(LONG_S)
                progress = self._progress
                quiet = 0 if self._running else quiet + 1
                if self._running and seen == progress:
                    self._turn_while(progress)
                seen = progress
            self._watching = False
            if self._running:
                self._watch()  # a batch that began just now has called nobody

    def _turn_while(self, progress: int) -> None:
        """Runs the loop until the main thread can again."""
        if self._loop.acquire(blocking=False):
            while self._running and self._progress == progress and not self._wanted:
                self._control.turn()
            self._loop.release()


class LoopTurns:
    """See the module. ``run`` is the main thread's life: the event loop calls ``_turn`` where the control loop has something to
    do, and begins what that hands out in its next pass."""

    def __init__(self, control: Control, drivers: Drivers) -> None:
        self._control = control
        self._drivers = drivers
        self._loop = threading.Lock()
        self._wanted = False  # the event loop waits for the control loop
        self._progress = 0  # changes with each turn in the event loop
        self._next_at = 0.0  # when that is to come at last
        self._timer: asyncio.TimerHandle | None = None
        self._called = False  # a turn comes in the next pass
        self._watching = False
        self._calls: SimpleQueue[None] = SimpleQueue()  # wake the stand-in
        self._thread = threading.get_ident()
        control.running.wake = self._wake

    def run(self) -> None:
        """Runs the event loop until the process is to end; any error that is not foreseen ends it at once."""
        stand_in = start_thread("streamtask-stand-in", "the control loop's stand-in", self._stand_in)
        loop = self._drivers.loop
        loop.add_reader(self._control.fileno(), self._turn)
        loop.call_soon(self._turn)
        self._drivers.run(lambda: self._control.over)
        self._calls.put(None)
        stand_in.join()

    def _wake(self) -> None:
        """What has ended is to be looked at."""
        if threading.get_ident() != self._thread:
            self._control.wake()
        elif not self._called:
            self._called = True
            self._drivers.loop.call_soon(self._turn)

    def _turn(self) -> None:
        if self._drivers.forked:
            return  # a child that a body has forked, and where it waits: the loop goes on with all that its parent had there
        try:
            self._called = False
            control, loop = self._control, self._drivers.loop
            if not self._loop.acquire(blocking=False):
                self._wanted = True
                control.wake()
                self._loop.acquire()
                self._wanted = False
            wait_s = 0.0
            if not control.over:  # of which a stand-in may have heard
                control.turn(wait=False)
                wait_s = control.rest()
            self._loop.release()
            self._progress += 1
            if self._timer is not None:
                self._timer.cancel()
            if control.over:
                loop.stop()
                return
            self._drivers.begin()
            self._next_at = mono_s() + wait_s
            self._timer = loop.call_later(wait_s, self._turn)
            if control.executor.out and not self._watching:
                self._watching = True
                self._calls.put(None)
        except BaseException:
            end_process("the control loop")

    def _stand_in(self) -> None:
        """Looks whether the event loop comes to the turns that are due: a body may block it, or what a body has left there."""
        control = self._control
        while True:
            self._calls.get()
            if control.over:
                return
            quiet = seen = 0
            while quiet < QUIET:
                time.sleep(LONG_S)
                progress = self._progress
                quiet = 0 if control.executor.out else quiet + 1
                if seen == progress and (mono_s() > self._next_at + LONG_S or control.has_events()):
                    self._turn_while(progress)
                seen = progress
            self._watching = False
            if control.executor.out and not self._watching:
                self._watching = True  # what was handed out just now has called nobody
                self._calls.put(None)

    def _turn_while(self, progress: int) -> None:
        """Runs the loop until the event loop can again."""
        if self._loop.acquire(blocking=False):
            try:
                while self._progress == progress and not (self._wanted or self._control.over):
                    self._control.turn()
            finally:
                self._loop.release()
