"""Who runs the control loop of a process that runs one body at a time: its main thread, between bodies.

Quick bodies then cost no change of threads and no fight for the GIL. While a body takes long, a second thread, the
stand-in, runs the loop instead, so that what has ended is acknowledged, the next messages are there when it ends, and
the supervisor's orders are obeyed. Never both: whoever runs the loop holds ``_loop``.
"""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue

from .control import Control
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
