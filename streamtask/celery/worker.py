"""A worker's side: late acknowledgements for what came out of a shard, and no body whose message was given back."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from billiard.einfo import ExceptionWithTraceback
from celery.app.trace import ExceptionInfo
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.exceptions import Reject, TimeLimitExceeded, WorkerLostError
from celery.local import Proxy
from celery.worker import state

from ..clock import mono_s
from ..errors import StreamTaskError
from ..text import logger
from ..transport import sessions
from ..transport.message import DELIVERY
from . import internals
from .brokers import is_ours
from .pools import consumers, given_back, hear_pools, running_kept

log = logger("streamtask.celery")


class LateTask(Proxy):  # type: ignore[misc]
    """A task as the request of a keyed message sees it."""

    acks_late = True
    reject_on_worker_lost = True


class _Overlaid:
    """An object with some attributes of its own."""

    def __init__(self, inner: Any, **own: Any) -> None:
        self.__dict__.update(own, _inner=inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _guarded(consumer: Any, late: bool) -> Any:
    """A consumer as the strategy of a task sees it: with a pool that starts no body whose message was given back, and a timer
    that nobody's key waits for."""
    if not is_ours(type(consumer.connection.transport)):
        return consumer
    pool = consumer.pool
    consumers.add(consumer)
    prefork = isinstance(pool, PreforkPool)
    timer = _Overlaid(consumer.timer, call_at=functools.partial(_call_at, consumer))
    if not late and prefork:
        return _Overlaid(
            consumer, timer=timer
        )  # such a message is acknowledged when its process says that it has begun
    hold = not (late and consumer.app.conf.worker_cancel_long_running_tasks_on_connection_loss)

    def apply_async(target: Any, args: Sequence[Any] = (), kwargs: Any = None, **options: Any) -> Any:
        tag = (args[2].get("properties") or {}).get("delivery_tag") if prefork else None
        ours = tag is None or sessions.begin(tag, False, False)
        seen = (ours, os.getpid(), *given_back, late, hold, _trusted_until(tag))
        return pool.apply_async(run_if_ours, (seen, target, *args), kwargs, **options)

    return _Overlaid(consumer, timer=timer, pool=_Overlaid(pool, apply_async=apply_async))


def _call_at(consumer: Any, eta: float, apply: Callable[..., Any], args: Sequence[Any], **options: Any) -> Any:
    """``Timer.call_at``: how Celery holds a request until its eta, unacknowledged. What waits long for that waits in Redis,
    where a producer of ours has put it; what a stranger has put into the stream, or speaks protocol 1, goes there from here."""
    message = args[0].message
    due = time.time() + (eta - time.monotonic())  # Celery reckons by its timers' clock
    if due <= message.channel.holds_until(DELIVERY in message.headers, message.delivery_tag):
        return consumer.timer.call_at(eta, apply, args, **options)
    # By the timer: Celery does not expect that a request has ended when it has just made it.
    return consumer.timer.call_after(0, _put_off, (args[0], consumer, due, apply, args), **options)


def _put_off(request: Any, consumer: Any, due: float, apply: Callable[..., Any], args: Sequence[Any]) -> None:
    try:
        if not request.message.channel.put_off(request.message.delivery_tag, due):
            apply(*args)
            return
    except StreamTaskError as exc:
        log.warning("Task %s[%s] waits for its eta in this worker: %s", request.name, request.id, exc)
        consumer.timer.call_after(AGAIN_S, _put_off, (request, consumer, due, apply, args))
        return
    log.info("Task %s[%s] is delivered again at its eta", request.name, request.id)
    request.acknowledged = True
    state.task_ready(request)
    consumer.qos.decrement_eventually()


AGAIN_S = 5.0
"""After so long it is tried again to store what waits for its eta."""


def with_keyed_strategy(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Task.start_strategy``: how a worker makes requests of the task's messages. Keyed ones get a strategy of their own."""

    @functools.wraps(original)
    def start_strategy(task: Any, app: Any, consumer: Any, **options: Any) -> Any:
        plain = original(task, app, _guarded(consumer, bool(task.acks_late)), **options)
        keyed = None

        def handle(message: Any, body: Any, ack: Any, reject: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal keyed
            if getattr(message.channel, "acks_from_any_thread", False):
                ack.fun = reject.fun = _settle_now
            if DELIVERY not in message.headers:
                return plain(message, body, ack, reject, *args, **kwargs)
            if keyed is None:
                keyed = original(LateTask(lambda: task), app, _guarded(consumer, True), **options)
            return keyed(message, body, ack, reject, *args, **kwargs)

        return handle

    return start_strategy


_refused = threading.local()
"""``tag``: what this thread has last found to have been given back, when it was to be acknowledged before its body."""


def _settle_now(settle: Callable[..., Any], *args: Any) -> None:
    """In place of ``Consumer.call_soon``, which hands an acknowledgement or rejection to the loop: there it may lie while the
    connection breaks, and what has ended would be given back."""
    tag = settle.__self__.delivery_tag  # type: ignore[attr-defined]  # a method of the message
    if not sessions.begin(tag, True, False):
        _refused.tag = tag
    settle(*args)


Seen = tuple[bool, int, int, int, bool, bool, float]
"""What the worker knew when it gave a message to the pool: whether it was its own, its pid, ``given_back``, whether the message
is acknowledged late and stays its own when the connection is lost, and until when its shard was vouched for."""


def _trusted_until(tag: str | None) -> float:
    return 0.0 if tag is None else sessions.trusted_until(tag)


def run_if_ours(
    seen: Seen,
    trace: Callable[..., Any],
    name: str,
    task_id: str,
    request: Mapping[str, Any],
    *args: Any,
) -> Any:
    """Runs Celery's trace of a message in the pool, or nothing if it is no longer this worker's.

    It answers as a trace does: failed, the exception, seconds. A rejected message leaves no result behind; where the
    transport still knows its delivery it comes again, and else the rejection means nothing to it.
    """
    try:
        if _may_start(seen, request):
            return trace(name, task_id, request, *args)
    except Exception:
        if os.getpid() != seen[1]:
            raise
        return 1, ExceptionInfo(internal=True), 0.0  # a pool in its worker's process tells nobody
    log.info("Task %s[%s] is not started: its message was or is given back, and comes again", name, task_id)
    try:
        raise Reject("the message has been given back", requeue=True)
    except Reject:
        return 1, ExceptionInfo(internal=True), 0.0


def _may_start(seen: Seen, request: Mapping[str, Any]) -> bool:
    ours, receiver, returned, mark, late, hold, until = seen
    if not ours:
        return False
    delivery = request.get(DELIVERY) or (request.get("headers") or {}).get(DELIVERY)
    if os.getpid() == receiver:
        tag = (request.get("properties") or {}).get("delivery_tag")
        if not late:
            # Its acknowledgement came just before, from this very thread.
            return tag is None or getattr(_refused, "tag", None) != tag
        if tag is not None and not sessions.begin(tag, hold, True):
            return False
        until = _trusted_until(tag)
    elif given_back[1] == mark and given_back[0] != returned:
        # A pool process says that it begins before it comes here: either its worker has heard that, or it stops here.
        return False
    if delivery is None or mono_s() < until:
        return True
    # The worker was paused or cut off beyond its lease, its keeper is away, or it hands the shard over.
    return sessions.still_owned(delivery)


def with_hearing(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Consumer.on_close``: what Celery knows of no pool process it takes for not begun, and forgets."""

    @functools.wraps(original)
    def on_close(consumer: Any) -> Any:
        if consumer not in consumers:
            return original(consumer)
        hear_pools()
        sessions.withdraw()  # at a warm shutdown: other workers need not wait
        with running_kept(consumer):
            return original(consumer)

    return on_close


def on_shutting_down(**_: Any) -> None:
    """A signal's handler interrupts the main thread anywhere, also in a call to Redis: what has to be written is another's."""
    if sessions.active():
        threading.Thread(target=sessions.shutting_down, name="streamtask-shutting-down", daemon=True).start()


def keep_active(tags: Collection[str]) -> Collection[str]:
    """Of a closing channel's deliveries those whose body runs: Celery lets these go on and drops all others."""
    if not _tags_of(state.requests.values).intersection(tags):
        return ()  # not the channel of Celery's own consumer
    hear_pools()
    return active(tags)


def not_begun(tags: Collection[str]) -> Collection[str]:
    """Of these delivery tags those whose requests wait for the pool."""
    waiting = _tags_of(lambda: state.reserved_requests) - _tags_of(lambda: state.active_requests)
    return waiting.intersection(tags)


def active(tags: Collection[str]) -> Collection[str]:
    """Of these delivery tags those whose body runs."""
    # Celery stops the bodies of late requests if it is told to, and leaves their messages to be delivered again.
    return _tags_of(
        lambda: state.active_requests,
        lambda request: (
            not (request.app.conf.worker_cancel_long_running_tasks_on_connection_loss and request.task.acks_late)
        ),
    ).intersection(tags)


def _tags_of(requests: Callable[[], Iterable[Any]], which: Callable[[Any], bool] = lambda request: True) -> set[str]:
    """The delivery tags of some of Celery's requests."""
    while True:
        try:
            found = tuple(requests())
            break
        except RuntimeError:
            continue  # a thread of the pool has changed it meanwhile
    return {request.message.delivery_tag for request in found if which(request)}


class _GivenUpTask(Proxy):  # type: ignore[misc]
    """A task as the request of a message sees it that has taken its pool process down too often: it fails, and the message,
    which lies among the dead letters by then, is not asked for again."""

    acks_late = True
    reject_on_worker_lost = retry_on_worker_lost = False
    acks_on_failure = acks_on_timeout = acks_on_failure_or_timeout = True


def with_crash_count(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Request.on_failure``: a message that takes its pool process down again and again, or whose body has to be ended with
    it, fails for good, and goes to the dead letters. Celery would deliver it for ever."""

    @functools.wraps(original)
    def on_failure(request: Any, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        exc = exc_info.exception
        if isinstance(exc, ExceptionWithTraceback):
            exc = exc.exc
        if _comes_again(request, exc):
            _charge(request, exc)
        return original(request, exc_info, *args, **kwargs)

    return on_failure


def with_overruns_counted(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Request.on_timeout``, which is all that is called in a pool without processes."""

    @functools.wraps(original)
    def on_timeout(request: Any, soft: bool, timeout: float) -> Any:
        exc = TimeLimitExceeded(timeout)
        if not soft and _comes_again(request, exc):
            _charge(request, exc)
        return original(request, soft, timeout)

    return on_timeout


def _charge(request: Any, exc: BaseException) -> None:
    channel, tag = request.message.channel, request.message.delivery_tag
    given_up = channel.charge(tag)
    if given_up:
        overran = isinstance(exc, TimeLimitExceeded)
        channel.refuse(tag, f"its body overran its time limit of {exc.args[0]} s" if overran else "")
        task = request.task
        internals.replace_task(request, _GivenUpTask(lambda: task))
    if given_up or isinstance(exc, MemoryError):
        # For what is given up this only tells Celery. For a MemoryError it ends the worker, or does not hear of it in a thread,
        # and leaves the message as it is.
        request.reject(requeue=not given_up)


def _comes_again(request: Any, exc: Any) -> bool:
    """Whether Celery is about to have a message delivered again because of what it did to its process."""
    if request.acknowledged or not hasattr(request.message.channel, "charge"):
        return False
    task = request.task
    if not task.acks_late:
        return False
    if isinstance(exc, TimeLimitExceeded):
        return not (state.should_terminate or getattr(task, "acks_on_timeout", task.acks_on_failure_or_timeout))
    if not isinstance(exc, WorkerLostError | SystemExit | KeyboardInterrupt | MemoryError):
        return False
    if state.should_stop is not None or state.should_terminate is not None:
        return False  # the worker ends, and takes its pool with it
    if internals.was_ended(request):
        return False
    if isinstance(exc, MemoryError):
        return True
    return task.reject_on_worker_lost and not getattr(task, "retry_on_worker_lost", False)
