"""Soft time limits: ``SoftTimeLimitExceeded`` in a body whose time is over, and never outside of one.

By a signal in the main thread, at the next bytecode in other threads, in coroutines where they wait.
"""

from __future__ import annotations

import asyncio
import ctypes
import signal
import threading
import time
import types
from collections.abc import Awaitable, Callable, Generator
from typing import Any, TypeVar

from ..clock import mono_s
from ..errors import SoftTimeLimitExceeded

R = TypeVar("R")


def call_with_alarm(seconds: float, body: Callable[[], R]) -> R:
    """Calls ``body``; raises ``SoftTimeLimitExceeded`` in it when its time is over. By SIGALRM: main thread only.

    The timer fires once, so that the exception can come once, and never after this function has returned.
    """
    inside = True

    def raise_here(signum: int, frame: object) -> None:
        if inside:
            raise SoftTimeLimitExceeded(_text(seconds))

    before = signal.signal(signal.SIGALRM, raise_here)

    def put_back() -> None:
        nonlocal inside
        inside = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        return body()
    finally:
        try:
            put_back()
        except SoftTimeLimitExceeded:
            put_back()
            raise


class SoftLimitWatch:
    """Raises ``SoftTimeLimitExceeded`` in other threads at their next bytecode (``PyThreadState_SetAsyncExc``).

    There is no lock that the exception could leave held: whoever takes a thread's entry out of the dict, in one step,
    decides whether it is raised.
    """

    PERIOD_S = 0.02

    def __init__(self) -> None:
        self._limits: dict[int, float] = {}
        self._raised: set[int] = set()
        threading.Thread(target=self._run, name="streamtask-soft-limits", daemon=True).start()

    def call(self, seconds: float, body: Callable[[], R]) -> R:
        me = threading.get_ident()
        try:
            self._limits[me] = mono_s() + seconds
            return body()
        finally:
            # Between the body's end and here the exception would hit this very block: it is caught; and one that is
            # still to come is waited for and taken back.
            while True:
                try:
                    if self._limits.pop(me, None) is None:
                        while me not in self._raised:
                            time.sleep(0.0005)
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(me), None)
                        self._raised.discard(me)
                    break
                except SoftTimeLimitExceeded:
                    continue

    def _run(self) -> None:
        while True:
            time.sleep(self.PERIOD_S)
            now = mono_s()
            for thread, at in list(self._limits.items()):
                if at <= now and self._limits.pop(thread, None) is not None:
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(thread), ctypes.py_object(SoftTimeLimitExceeded)
                    )
                    self._raised.add(thread)


class _InCoroutine(SoftTimeLimitExceeded, asyncio.CancelledError):
    """What is raised in a coroutine is a cancellation, too: asyncio's own blocks (a ``TaskGroup``, ``wait_for``) clean up
    after nothing else."""


_InCoroutine.__name__ = _InCoroutine.__qualname__ = SoftTimeLimitExceeded.__name__
_InCoroutine.__module__ = SoftTimeLimitExceeded.__module__


@types.coroutine
def within(seconds: float, body: Awaitable[R], started: float) -> Generator[Any, Any, R]:
    """Awaits ``body``, whose time began at ``started``; where it is over, ``SoftTimeLimitExceeded`` is raised once at the place
    where it waits. What it raises by itself, a ``TimeoutError`` too, stays what it is, and it runs in no task of its own."""
    task = asyncio.current_task()
    assert task is not None
    over = False

    def end_wait() -> None:
        nonlocal over
        over = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(max(0.0, started + seconds - mono_s()), end_wait)
    steps = _awaiting(body)
    step: Callable[[Any], Any] = steps.send
    value: Any = None
    try:
        while True:
            try:
                awaited = step(value)
            except StopIteration as ended:
                result: R = ended.value
                return result
            try:
                value, step = (yield awaited), steps.send
            except BaseException as exc:
                value, step = exc, steps.throw
            if over:
                over = False
                if hasattr(task, "uncancel"):  # Python 3.11 counts who has cancelled
                    task.uncancel()
                value, step = _InCoroutine(_text(seconds)), steps.throw
    finally:
        timer.cancel()


async def _awaiting(body: Awaitable[R]) -> R:
    return await body


def _text(seconds: float) -> str:
    return f"soft_time_limit of {seconds:g} s"
