"""Runs a body with its context and limits, and decides what becomes of its message (``worker.ports.TaskRunner``).

The one place that runs what is not ours: bodies, hooks, the texts of exceptions, the encoding of results. Each may end in any
way, by ``sys.exit`` too; what comes out of here is an outcome that can be stored, and nothing is raised.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import threading
import traceback as tb
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from .backoff import retry_delay_s
from .clock import mono_s, wall_ms
from .errors import ConfigError, Ignore, Reject, Retry, TimeLimitExceeded
from .middleware import Middleware, overriding
from .queue.backlog import Batch
from .queue.delivery import Delivery, Kind, Outcome
from .redis import wire
from .redis.links import Prepared
from .request import Request, here, in_coroutine
from .results import FAILURE, IGNORED, REVOKED, SUCCESS, ResultStore
from .task import FINAL, Task, check_retry
from .text import MOST_LINES, counted, harmless, logger, said, short
from .worker.limits import SoftLimitWatch, call_with_alarm, within
from .worker.ports import Ended, Place, goes_on

if TYPE_CHECKING:
    from .settings import Settings

log = logger("streamtask.task")

UNKNOWN_TASK = "unknown-task"
EXHAUSTED = "exhausted"
FAILED = "failed"
REJECTED = "rejected"
EXPIRED = "expired"
TIME_LIMIT = "time-limit"
BROKEN = "broken"
MOST_DELAY_S = 100 * 365 * 86400.0
NOT_BY_THE_BODY = ("crashed", "undecodable", BROKEN)
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
        plain = {name: task for name, task in tasks.items() if self._is_plain(task)}
        self.plain: dict[str, Callable[..., Any]] = {
            name: task.function for name, task in plain.items() if not task.is_async
        }
        self.plain_async: dict[str, Callable[..., Any]] = {
            name: task.function for name, task in plain.items() if task.is_async
        }

    def _is_plain(self, task: Task[..., Any]) -> bool:
        o = task.options
        return not (
            o.bind
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

    def run(self, delivery: Delivery, place: Place) -> Ended | Coroutine[Any, Any, Ended]:
        try:
            return self._run(delivery, place)
        except BaseException as exc:
            return broken(delivery, exc), None

    async def arun(self, delivery: Delivery, place: Place) -> Ended:
        try:
            return await self._arun(delivery, place)
        except BaseException as exc:
            return broken(delivery, exc), None

    def begin(
        self,
        body: Callable[..., Coroutine[Any, Any, Any]],
        args: list[Any],
        kwargs: dict[str, Any],
        batch: Batch,
        place: Place,
        position: int,
    ) -> tuple[Coroutine[Any, Any, Any], Any]:
        in_coroutine.set((batch, place, position))
        coroutine = body(*args, **kwargs)
        return coroutine, coroutine.send(None)

    async def rest(self, delivery: Delivery, place: Place, answer: Any) -> Ended:
        return await self._rest(delivery, place, answer, mono_s())

    async def _rest(self, delivery: Delivery, place: Place, answer: Any, started: float) -> Ended:
        """Does what a body's function has returned in place of doing it. Its time began at ``started``."""
        try:
            in_coroutine.set((delivery, place))
            task, request = self._tasks[delivery.task], Request(delivery, place)
            result: Any = None
            error: BaseException | None = None
            try:
                if not hasattr(type(answer), "__await__"):
                    raise Reject(
                        "the function has returned a generator, which runs nothing: let it do the work and return, and leave "
                        "yield to a function that it calls"
                    )
                result = await self._within_limits(task, place, answer, started)
            except BaseException as exc:
                error = exc
            return self._ended(task, delivery, place, request, result, error)
        except BaseException as exc:
            return broken(delivery, exc), None

    def failed(self, delivery: Delivery, place: Place, exc: BaseException) -> Outcome:
        try:
            return self._judge(delivery, place, exc)
        except BaseException as why:
            return broken(delivery, why)

    def cancelled(self, delivery: Delivery, place: Place) -> Ended:
        outcome = self.failed(delivery, place, asyncio.CancelledError())
        try:
            return outcome, self._failure(delivery, place, outcome)
        except BaseException as why:
            return broken(delivery, why), None

    def _run(self, delivery: Delivery, place: Place) -> Ended | Coroutine[Any, Any, Ended]:
        task = self._tasks.get(delivery.task)
        refused = self._refuse(task, delivery, place)
        if refused is not None or task is None:
            return refused or (None, None)
        here.delivery, here.place = delivery, place
        request = Request(delivery, place)
        result: Any = None
        error: BaseException | None = None
        started = mono_s()
        try:
            for hook in self._before_run:
                hook(request)
            result = self._call(task, delivery, place)
            if result is not None and goes_on(result):
                return self._rest(delivery, place, result, started)
        except BaseException as exc:
            error = exc
        return self._ended(task, delivery, place, request, result, error)

    async def _arun(self, delivery: Delivery, place: Place) -> Ended:
        task = self._tasks.get(delivery.task)
        refused = self._refuse(task, delivery, place)
        if refused is not None or task is None:
            return refused or (None, None)
        in_coroutine.set((delivery, place))
        request = Request(delivery, place)
        result: Any = None
        error: BaseException | None = None
        try:
            for hook in self._before_run:
                hook(request)
            started = mono_s()
            result = await self._within_limits(task, place, task(*delivery.args, **delivery.kwargs), started)
        except BaseException as exc:
            error = exc
        return self._ended(task, delivery, place, request, result, error)

    def _refuse(
        self, task: Task[..., Any] | None, delivery: Delivery, place: Place
    ) -> tuple[Outcome | None, Prepared | None] | None:
        """What becomes of a message that is not to run now, or None if it is to run. An expired one that is dropped has
        no outcome, as after success: it is finished, and counted as such."""
        if task is None:
            known = short(", ".join(sorted(self._tasks)) or "none")
            outcome = Outcome(
                Kind.DEAD,
                reason=UNKNOWN_TASK,
                message=f"no task is registered as {short(delivery.task, 200)!r} (registered: {known}). Deploy the code "
                "that has it, or name its module with -A, then replay the dead letter",
            )
            return outcome, self._failure(delivery, place, outcome)
        if delivery.note is not None and delivery.note.overran:
            limit = task.options.time_limit
            said = f"its process was ended at its time_limit{f' of {limit:g} s' if limit else ''}"
            outcome = self._judge(delivery, place, TimeLimitExceeded(said))
            return outcome, self._failure(delivery, place, outcome)
        headers = delivery.headers
        if headers is not None:
            expires = headers.get(wire.H_EXPIRES)
            if expires is not None and wall_ms() > expires:
                log.info("expired task=%s id=%s", delivery.task, wire.id_text(delivery.id))
                stored = self._store(delivery, place, task, REVOKED, error="expired before it ran")
                if self._settings.on_expired == "dead":
                    return Outcome(Kind.DEAD, reason=EXPIRED, message="expired before it ran"), stored
                return None, stored
        rate = task.options.rate_per_s() if task.options.rate_limit else None
        if rate is not None:
            wait = self._rate_wait(task.name, rate)
            if wait > 0:
                return Outcome(Kind.LATER, delay_s=wait), None
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

    async def _within_limits(self, task: Task[..., Any], place: Place, body: Awaitable[Any], started: float) -> Any:
        options = task.options
        if options.time_limit:
            place.set_deadline(started + options.time_limit)
        try:
            return await (within(options.soft_time_limit, body, started) if options.soft_time_limit else body)
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
    ) -> tuple[Outcome | None, Prepared | None]:
        for hook in self._after_run:
            _quietly(hook, request, result, error)
        if error is None:
            return None, self._store(delivery, place, task, SUCCESS, result)
        if isinstance(error, Ignore):
            return None, self._store(delivery, place, task, IGNORED)
        outcome = self.failed(delivery, place, error)
        return outcome, self._failure(delivery, place, outcome)

    def _judge(self, delivery: Delivery, place: Place, exc: BaseException) -> Outcome:
        """Retry or dead letter, by the task's options; see ``TaskOptions``."""
        task = self._tasks[delivery.task]
        options = task.options
        attempt = delivery.note.attempt if delivery.note else 0
        if isinstance(exc, Ignore):
            return Outcome(Kind.IGNORED)
        if isinstance(exc, Reject):
            if exc.requeue:
                return Outcome(Kind.AGAIN)
            return Outcome(Kind.DEAD, reason=REJECTED, message=_reason(exc.reason), traceback=_text(exc))
        limit, cause, delay = options.max_retries, exc, None
        if isinstance(exc, Retry):
            try:
                check_retry(exc)
            except ConfigError as wrong:
                return Outcome(Kind.DEAD, reason=FAILED, message=_brief(wrong), traceback=_text(exc))
            limit = exc.max_retries if exc.max_retries is not None else limit
            cause = exc if exc.exc is None else exc.exc
            delay = _asked_delay_s(exc)
        elif isinstance(exc, ConfigError) and exc.__dict__.get(FINAL):  # of a retry that was asked for wrongly
            return Outcome(Kind.DEAD, reason=FAILED, message=_brief(exc), traceback=_text(exc))
        elif exc.__dict__.get(FINAL):
            limit = 0
        elif (
            isinstance(exc, options.dont_autoretry_for)
            or (options.autoretry_for is not None and not isinstance(exc, options.autoretry_for))
            # A cancelled coroutine has failed as others have: something that it waited for was cancelled.
            or (options.autoretry_for is None and not isinstance(exc, Exception | asyncio.CancelledError))
        ):
            reason = TIME_LIMIT if isinstance(exc, TimeLimitExceeded) else FAILED
            return Outcome(Kind.DEAD, reason=reason, message=_brief(exc), traceback=_text(exc))
        if limit is not None and attempt >= limit:
            reason = TIME_LIMIT if isinstance(exc, TimeLimitExceeded) else EXHAUSTED
            message = f"{_brief(cause)} (after {counted(attempt, 'retry', 'retries')})"
            return Outcome(Kind.DEAD, reason=reason, message=message, traceback=_text(exc))
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
        return Outcome(Kind.RETRY, delay_s=delay, message=_brief(cause))

    def dead(self, delivery: Delivery, place: Place, outcome: Outcome) -> Prepared | None:
        """Told of each dead letter once it is stored; answers the result to store, if the body did not."""
        if self._on_dead:
            request = Request(delivery, place)
            for hook in self._on_dead:
                copy_context().run(_after_death, delivery, place, hook, request, outcome)
        return self._failure(delivery, place, outcome) if outcome.reason in NOT_BY_THE_BODY else None

    def revoked(self, delivery: Delivery, place: Place) -> Prepared | None:
        return self._store(delivery, place, self._tasks.get(delivery.task), REVOKED, error="revoked")

    def _failure(self, delivery: Delivery, place: Place, outcome: Outcome) -> Prepared | None:
        if outcome.kind is not Kind.DEAD:
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
    ) -> Prepared | None:
        if self._results is None or (task is not None and task.options.ignore_result):
            return None
        origin = (place.queue, str(place.shard), delivery.entry_id)
        return self._results.pack(wire.id_text(delivery.id), origin, state, result, error=error, traceback=traceback)


def broken(delivery: Delivery, exc: BaseException) -> Outcome:
    """What becomes of a message when what stands around its body raises: a repetition would, too."""
    log.error("a message can't be run task=%s id=%s", delivery.task, wire.id_text(delivery.id), exc_info=exc)
    return Outcome(Kind.DEAD, reason=BROKEN, message=short(f"it can't be run: {_brief(exc)}"), traceback=_text(exc))


def _asked_delay_s(exc: Retry) -> float | None:
    asked = exc.countdown
    if exc.eta is not None:
        asked = (exc.eta - dt.datetime.now(dt.timezone.utc)).total_seconds()
    elif isinstance(asked, dt.timedelta):
        asked = asked.total_seconds()
    return None if asked is None else min(max(0.0, asked), MOST_DELAY_S)


def _reason(given: object) -> str:
    """What a message was rejected for: text, or an exception, as in Celery."""
    if isinstance(given, BaseException):
        return _brief(given)
    return short(given.decode("utf-8", "backslashreplace") if isinstance(given, bytes) else said(given))


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
    except BaseException:  # also where its text, or that of its cause, can't be had
        return _brief(exc)


def _after_death(
    delivery: Delivery, place: Place, hook: Callable[..., None], request: Request, outcome: Outcome
) -> None:
    in_coroutine.set(
        (delivery, place)
    )  # in this thread the next body may be about to begin, and what is logged is not its own
    _quietly(hook, request, outcome.reason, outcome.message)


def _quietly(hook: Callable[..., None], *args: Any) -> None:
    try:
        hook(*args)
    except BaseException:
        log.exception("a middleware's hook raised: %r", hook)
