"""Runs a body with its context and limits, and decides what becomes of its message (``worker.ports.TaskRunner``)."""

from __future__ import annotations

import asyncio
import ctypes
import datetime as dt
import signal
import threading
import time
import traceback as tb
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from .backoff import retry_delay_s
from .clock import mono_s, wall_ms
from .errors import Ignore, Reject, Retry, SoftTimeLimitExceeded
from .middleware import Middleware, overriding
from .queue.consumer import Outcome
from .queue.lanes import Delivery
from .redis import wire
from .request import Request, here, in_coroutine
from .results import FAILURE, IGNORED, REVOKED, SUCCESS, ResultStore
from .task import FINAL, Task
from .text import MOST_LINES, counted, harmless, logger, said, short
from .worker.ports import Place

if TYPE_CHECKING:
    from .settings import Settings

log = logger("streamtask.task")

R = TypeVar("R")

UNKNOWN_TASK = "unknown-task"
EXHAUSTED = "exhausted"
FAILED = "failed"
REJECTED = "rejected"
EXPIRED = "expired"
MOST_DELAY_S = 100 * 365 * 86400.0
NOT_BY_THE_BODY = ("crashed", "undecodable", "broken")
"""Reasons of dead letters whose results nobody has stored yet."""


class Runner:
    """See ``worker.ports.TaskRunner``."""

    def __init__(
        self,
        tasks: Mapping[str, Task[..., Any]],
        settings: Settings,
        results: ResultStore | None,
        middlewares: list[Middleware],
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        self._tasks = tasks
        self._settings = settings
        self._results = results
        self._before_run = overriding(middlewares, "before_run")
        self._after_run = overriding(middlewares, "after_run")[::-1]
        self._on_retry = overriding(middlewares, "on_retry")[::-1]
        self._on_dead = overriding(middlewares, "on_dead")[::-1]
        self._next_start: dict[str, float] = {}
        self._rate_lock = threading.Lock()
        self._watch: SoftLimitWatch | None = None
        self._on_start = on_start
        self.here = here
        self.has_async = any(task.is_async for task in tasks.values())
        self.plain: dict[str, Callable[..., Any]] = {
            name: task.function for name, task in tasks.items() if self._is_plain(task)
        }

    def _is_plain(self, task: Task[..., Any]) -> bool:
        o = task.options
        return not (
            task.is_async
            or o.bind
            or o.soft_time_limit
            or o.time_limit
            or o.rate_limit
            or self._before_run
            or self._after_run
            or (self._results is not None and not o.ignore_result)
        )

    def process_started(self) -> None:
        self._on_start()

    def is_async(self, task: str) -> bool:
        found = self._tasks.get(task)
        return found is not None and found.is_async

    # Running

    def run(self, delivery: Delivery, place: Place) -> tuple[Outcome | None, bytes | None]:
        task = self._tasks.get(delivery.task)
        refused = self._refuse(task, delivery, place)
        if refused is not None or task is None:
            return refused or (None, None)
        here.delivery, here.place = delivery, place
        request = Request(delivery, place)
        result: Any = None
        error: BaseException | None = None
        try:
            for hook in self._before_run:
                hook(request)
            result = self._call(task, delivery, place)
        except BaseException as exc:
            error = exc
        return self._ended(task, delivery, place, request, result, error)

    async def arun(self, delivery: Delivery, place: Place) -> tuple[Outcome | None, bytes | None]:
        task = self._tasks.get(delivery.task)
        refused = self._refuse(task, delivery, place)
        if refused is not None or task is None:
            return refused or (None, None)
        token = in_coroutine.set((delivery, place))
        request = Request(delivery, place)
        result: Any = None
        error: BaseException | None = None
        try:
            for hook in self._before_run:
                hook(request)
            result = await self._within_limits(task, delivery, place)
        except BaseException as exc:
            error = exc
        finally:
            in_coroutine.reset(token)
        return self._ended(task, delivery, place, request, result, error)

    def _refuse(
        self, task: Task[..., Any] | None, delivery: Delivery, place: Place
    ) -> tuple[Outcome | None, bytes | None] | None:
        """What becomes of a message that is not to run now, or None."""
        if task is None:
            known = short(", ".join(sorted(self._tasks)) or "none")
            outcome = Outcome(
                "dead",
                reason=UNKNOWN_TASK,
                message=f"no task is registered as {short(delivery.task, 200)!r} (registered: {known}). Deploy the code "
                "that has it, or name its module with -A, then replay the dead letter",
            )
            return outcome, self._failure(delivery, place, outcome)
        headers = delivery.headers
        if headers is not None:
            expires = headers.get(wire.H_EXPIRES)
            if expires is not None and wall_ms() > expires:
                log.info("expired task=%s id=%s", delivery.task, wire.id_text(delivery.id))
                stored = self._store(delivery, place, task, REVOKED, error="expired before it ran")
                if self._settings.on_expired == "dead":
                    return Outcome("dead", reason=EXPIRED, message="expired before it ran"), stored
                return None, stored
        rate = task.options.rate_per_s() if task.options.rate_limit else None
        if rate is not None:
            wait = self._rate_wait(task.name, rate)
            if wait > 0:
                return Outcome("requeue", delay_s=wait), None
        return None

    def _rate_wait(self, name: str, rate: float) -> float:
        with self._rate_lock:
            now = mono_s()
            start = self._next_start.get(name, 0.0)
            if start > now:
                return start - now
            self._next_start[name] = now + 1 / rate
            return 0.0

    def _call(self, task: Task[..., Any], delivery: Delivery, place: Place) -> Any:
        """Runs the body within its limits.

        No generator-based context managers here: an exception that a soft limit raises while such a block is being
        entered or left would leave the generator suspended, and what it has to put back undone.
        """
        options = task.options
        if not (options.soft_time_limit or options.time_limit):
            return task(*delivery.args, **delivery.kwargs)
        if options.time_limit:
            place.set_deadline(mono_s() + options.time_limit)
        try:
            if not options.soft_time_limit:
                return task(*delivery.args, **delivery.kwargs)

            def body() -> Any:
                return task(*delivery.args, **delivery.kwargs)

            if place.in_main_thread:
                return call_with_alarm(options.soft_time_limit, body)
            if self._watch is None:
                self._watch = SoftLimitWatch()
            return self._watch.call(options.soft_time_limit, body)
        finally:
            if options.time_limit:
                place.set_deadline(0.0)

    async def _within_limits(self, task: Task[..., Any], delivery: Delivery, place: Place) -> Any:
        options = task.options
        if options.time_limit:
            place.set_deadline(mono_s() + options.time_limit)
        try:
            body = task(*delivery.args, **delivery.kwargs)
            if not options.soft_time_limit:
                return await body
            try:
                return await asyncio.wait_for(body, options.soft_time_limit)
            except asyncio.TimeoutError:
                raise SoftTimeLimitExceeded(f"soft_time_limit of {options.soft_time_limit} s") from None
        finally:
            if options.time_limit:
                place.set_deadline(0.0)

    # Afterwards

    def _ended(
        self,
        task: Task[..., Any],
        delivery: Delivery,
        place: Place,
        request: Request,
        result: Any,
        error: BaseException | None,
    ) -> tuple[Outcome | None, bytes | None]:
        for hook in self._after_run:
            _quietly(hook, request, result, error)
        if error is None:
            return None, self._store(delivery, place, task, SUCCESS, result)
        if isinstance(error, Ignore):
            return None, self._store(delivery, place, task, IGNORED)
        outcome = self.failed(delivery, place, error)
        return outcome, self._failure(delivery, place, outcome)

    def failed(self, delivery: Delivery, place: Place, exc: BaseException) -> Outcome:
        """Retry or dead letter, by the task's options; see ``TaskOptions``."""
        task = self._tasks[delivery.task]
        options = task.options
        attempt = delivery.note.attempt if delivery.note else 0
        if isinstance(exc, Ignore):
            return Outcome("ignored")
        if isinstance(exc, Reject):
            if exc.requeue:
                return Outcome("requeue")
            return Outcome("dead", reason=REJECTED, message=short(harmless(str(exc.reason))), traceback=_text(exc))
        limit = options.max_retries
        if exc.__dict__.get(FINAL):
            limit = 0
        if isinstance(exc, Retry):
            limit = exc.max_retries if exc.max_retries is not None else limit
            cause = exc.exc or exc
            delay = _asked_delay_s(exc)
        else:
            cause, delay = exc, None
            if (
                isinstance(exc, options.dont_autoretry_for)
                or (options.autoretry_for is not None and not isinstance(exc, options.autoretry_for))
                or (options.autoretry_for is None and not isinstance(exc, Exception))
            ):
                return Outcome("dead", reason=FAILED, message=_brief(exc), traceback=_text(exc))
        if limit is not None and attempt >= limit:
            after = f"(after {counted(attempt, 'retry', 'retries')})"
            return Outcome(
                "dead",
                reason=EXHAUSTED,
                message=f"{_brief(cause)} {after}",
                traceback=_text(exc),
            )
        if delay is None:
            backoff = options.retry_backoff
            delay = 0.0
            if backoff:
                base = 1.0 if backoff is True else float(backoff)
                delay = retry_delay_s(
                    attempt, base_s=base, cap_s=options.retry_backoff_max, jitter=options.retry_jitter
                )
        log.warning(
            "retry in %.2f s task=%s id=%s attempt=%d: %s",
            delay, delivery.task, wire.id_text(delivery.id), attempt, _brief(cause),
            exc_info=None if isinstance(cause, Retry) else cause, extra=_fields(delivery, attempt, cause),
        )  # fmt: skip
        if self._on_retry:
            request = Request(delivery, place)
            for hook in self._on_retry:
                _quietly(hook, request, cause, delay)
        return Outcome("retry", delay_s=delay, message=_brief(cause))

    def dead(self, delivery: Delivery, place: Place, outcome: Outcome) -> bytes | None:
        """Told of each dead letter once it is stored; answers the result to store, if the body did not."""
        if self._on_dead:
            request = Request(delivery, place)
            for hook in self._on_dead:
                _quietly(hook, request, outcome.reason, outcome.message)
        return self._failure(delivery, place, outcome) if outcome.reason in NOT_BY_THE_BODY else None

    def revoked(self, delivery: Delivery, place: Place) -> bytes | None:
        return self._store(delivery, place, self._tasks.get(delivery.task), REVOKED, error="revoked")

    def _failure(self, delivery: Delivery, place: Place, outcome: Outcome) -> bytes | None:
        if outcome.kind != "dead":
            return None
        return self._store(
            delivery,
            place,
            self._tasks.get(delivery.task),
            FAILURE,
            error=f"{outcome.reason}: {outcome.message}",
            traceback=outcome.traceback,
        )

    def _store(
        self,
        delivery: Delivery,
        place: Place,
        task: Task[..., Any] | None,
        state: str,
        result: Any = None,
        *,
        error: str | None = None,
        traceback: str | None = None,
    ) -> bytes | None:
        if self._results is None or (task is not None and task.options.ignore_result):
            return None
        origin = (place.queue, str(place.shard), delivery.entry_id)
        return self._results.pack(wire.id_text(delivery.id), origin, state, result, error=error, traceback=traceback)


def _asked_delay_s(exc: Retry) -> float | None:
    asked = exc.countdown
    if exc.eta is not None:
        asked = (exc.eta - dt.datetime.now(dt.timezone.utc)).total_seconds()
    # A body may ask for anything: what is no number raises here, and never in the loop that stores when it is due.
    return None if asked is None else min(max(0.0, float(asked)), MOST_DELAY_S)


def _fields(delivery: Delivery, attempt: int, error: BaseException) -> dict[str, Any]:
    """What a record says beside its text of the message that it is of."""
    key = None if delivery.key is None else delivery.key.decode("utf-8", "backslashreplace")
    fields = {"task": delivery.task, "id": wire.id_text(delivery.id), "key": key}
    return {**fields, "attempt": attempt, "error": _brief(error)}


def _brief(exc: BaseException) -> str:
    return short(f"{type(exc).__name__}: {said(exc)}")


def _text(exc: BaseException) -> str:
    try:
        return harmless("".join(tb.format_exception(type(exc), exc, exc.__traceback__))[-MOST_LINES:])
    except Exception:  # also where its text, or that of its cause, can't be had
        return f"{type(exc).__name__}: {said(exc)}"


def _quietly(hook: Callable[..., None], *args: Any) -> None:
    try:
        hook(*args)
    except Exception:
        log.exception("a middleware's hook raised: %r", hook)


def call_with_alarm(seconds: float, body: Callable[[], R]) -> R:
    """Calls ``body``; raises ``SoftTimeLimitExceeded`` in it when its time is over. By SIGALRM: main thread only.

    The timer fires once, so that the exception can come once, and never after this function has returned.
    """
    inside = True

    def raise_here(signum: int, frame: object) -> None:
        if inside:
            raise SoftTimeLimitExceeded(f"soft_time_limit of {seconds} s")

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
