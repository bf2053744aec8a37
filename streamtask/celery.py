"""The Celery plugin: tasks with ``shard_key`` run in order per key on stock Celery workers, over our kombu transport.

Importing this module installs it; the transport does so by itself in a process that has Celery::

    @celery_app.task(shard_key="user_id")  # a parameter, a path such as "order.user.id", or a callable
    def pay(user_id, amount): ...

    pay.apply_async(args, shard_key=7)     # the value itself; also in signatures: pay.s(...).set(shard_key=7)

What it does, and where:

- publish (``Celery.send_task``, which each call of a task goes through): the canonical key goes into the header
  ``shard_key``. A signal's handler could not refuse a call: Celery logs what it raises and publishes all the same.
  What was published before this module was imported is stamped when it reaches the transport (``stamp_missed``).
- retry: a publish that repeats the running message with one retry more carries that message's delivery, so that the
  transport puts it in the place of the old one.
- worker (``Task.start_strategy``): a message that came out of a shard is acknowledged after its body, and goes back when
  its pool process dies, whatever the configuration says: its lane opens with the acknowledgement. This depends on the
  message, not on the task, because any task may be called with ``shard_key=``; with another broker nothing changes.
- worker (``run_if_ours``): no body starts whose message another worker has been given meanwhile.

Celery itself sees to it that pool processes die with their worker (PR_SET_PDEATHSIG), so none runs beside a redelivery.
"""

from __future__ import annotations

import functools
import inspect
import logging
import mmap
import os
import secrets
import select
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from celery import signals
from celery._state import _get_active_apps, get_current_worker_task
from celery.app.base import Celery
from celery.app.task import Task
from celery.app.trace import ExceptionInfo
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.exceptions import Reject
from celery.local import Proxy
from celery.worker import state
from celery.worker.consumer import Consumer
from kombu.compression import decompress
from kombu.exceptions import KombuError
from kombu.serialization import loads

from .errors import ShardKeyError
from .sharding import canonical
from .task import TaskOptions, _compile_key
from .transport import hooks

logger = logging.getLogger(__name__)

OPTION = "shard_key"
"""The option of ``apply_async`` and of signatures, and of tasks."""

KEY = "shard_key"
ORDERED = "shard_ordered"
DELIVERY = "streamtask_delivery"
REPLACES = "streamtask_replaces"
PRIVATE = (KEY, ORDERED, DELIVERY, REPLACES)
"""The message headers that only this module and the transport write."""

RULE = "_streamtask_rule"
MAPS = {"celery.map": False, "celery.starmap": True}
"""Celery's tasks that call another task for each item of a list; whether they unpack the items."""


class Rule(NamedTuple):
    """How a task's calls get their shard key."""

    key: Callable[..., bytes | None]
    ordered: bool
    shown: str


class Call(NamedTuple):
    """What is published: a call of a task, as Celery says it."""

    name: str
    task_id: str | None
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    retries: int
    option: Any
    inherited: Mapping[str, Any]
    """Its headers; those of a retry come from the message that runs."""


# --- the key of a call -------------------------------------------------------------------------------------------------


def rule_of(task: Any) -> Rule | None:
    """How calls of this task get their key, None if they have none. Found out once per task."""
    try:
        rule: Rule | None = getattr(task, RULE)
    except AttributeError:
        rule = _make_rule(task)
        setattr(task, RULE, rule)
    return rule


def _make_rule(task: Any) -> Rule | None:
    if task.name in MAPS:
        return Rule(functools.partial(_key_of_items, task.app, MAPS[task.name]), True, "that of its items")
    declared = _declared(task)
    if declared is None:
        return None
    ordered = bool(getattr(task, "ordered", True))
    # With autoretry_for, run is a wrapper; its signature is that of the function in it.
    key = _compile_key(task.run, task.name, TaskOptions(shard_key=declared))
    shown = repr(declared) if isinstance(declared, str) else getattr(declared, "__qualname__", repr(declared))
    return Rule(key, ordered, shown)


def _declared(task: Any) -> Any:
    """The task's ``shard_key`` as it was written: a callable is no method, though Celery makes it a class attribute."""
    declared = inspect.getattr_static(task, "shard_key", None)
    return declared.__func__ if isinstance(declared, staticmethod) else declared


def _key_of_items(app: Any, star: bool, task: Mapping[str, Any], it: Iterable[Any]) -> bytes | None:
    """The one key of a ``map`` or ``starmap`` (``chunks`` are starmaps). Its items run one after the other in one message."""
    name = task["task"]
    rule = _rule_by_name(app, name)
    if rule is None or not rule.ordered:
        return None
    keys = {_apply(rule, name, item if star else (item,), {}) for item in it}
    if len(keys) > 1:
        raise ShardKeyError(
            f"the items of this map, starmap or chunk of task {name} have {len(keys)} shard keys, and one message can keep "
            "the order of one key only: send a group of calls, or one map for each key"
        )
    return keys.pop() if keys else None


def _apply(rule: Rule, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes | None:
    advice = f"Pass it in the call, or give the key itself: apply_async(..., {OPTION}=...)"
    try:
        return rule.key(*args, **kwargs)
    except ShardKeyError as exc:
        said = str(exc)
        raise ShardKeyError(
            f"{said}. {advice}"
            if said.startswith(("task ", "the items "))
            else f"task {name}, shard_key={rule.shown}: {said}"
        ) from None
    except Exception as exc:  # arguments that don't fit the function, or the user's callable
        raise ShardKeyError(
            f"task {name}: its shard key ({rule.shown}) can't be taken from the arguments: {exc!r}. {advice}"
        ) from exc


def _rule_by_name(app: Any, name: str) -> Rule | None:
    task = app._tasks.get(name)
    if task is None and app._pending and app.autofinalize:
        # Celery makes the tasks of a module at their first use, and a call by name is none.
        app.finalize(auto=True)
        task = app._tasks.get(name)
    return None if task is None else rule_of(task)


# --- publishing --------------------------------------------------------------------------------------------------------


def private_headers(rule: Rule | None, call: Call) -> dict[str, Any]:
    """What the message of this call has to carry for the transport."""
    origin = _origin(call)
    kept = origin.get(KEY)
    if call.option is not None:
        try:
            key = canonical(call.option)
        except ShardKeyError as exc:
            raise ShardKeyError(f"{OPTION}= in a call of task {call.name}: {exc}") from None
    elif kept is not None:
        # A retry stays in the lane of its message, also with other arguments.
        key = canonical(kept)
    else:
        found = None if rule is None else _apply(rule, call.name, call.args, call.kwargs)
        if found is None:
            # Written by hand, for a task that is not known here; but not copied from the running message's headers.
            if KEY in call.inherited and DELIVERY not in call.inherited:
                return {name: call.inherited[name] for name in (KEY, ORDERED) if name in call.inherited}
            return {}
        key = found
    headers: dict[str, Any] = {KEY: _text(key)}
    if not (origin.get(ORDERED, True) if kept is not None else rule is None or rule.ordered):
        headers[ORDERED] = False
    delivery = origin.get(DELIVERY)  # it names its queue: the transport replaces nothing in another one
    if delivery and kept == headers[KEY]:
        headers[REPLACES] = delivery
    return headers


def _origin(call: Call) -> Mapping[str, Any]:
    """The headers of the message which this call retries; empty if it is no retry."""
    if not call.retries:
        return {}
    running = get_current_worker_task()
    if running is None:
        # The worker's main process sends the retry of a task whose pool process died (retry_on_worker_lost).
        return call.inherited if DELIVERY in call.inherited else {}
    request = running.request
    if request.id == call.task_id and (request.retries or 0) + 1 == call.retries:
        headers: Mapping[str, Any] = request.headers or {}
        return headers
    return {}


def _text(key: bytes) -> str | bytes:
    try:
        return key.decode()
    except UnicodeDecodeError:
        return key


def _with_key(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Celery.send_task`` with the shard key. Every call of every task comes here: what has no key is passed on quickly."""

    @functools.wraps(original)
    def send_task(
        app: Any,
        name: str,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *rest: Any,
        **options: Any,
    ) -> Any:
        task = options.get("task_type")
        rule = _rule_by_name(app, name) if task is None else rule_of(task)
        headers = options.get("headers")
        if rule is not None or headers or OPTION in options or options.get("retries"):
            inherited = headers or {}
            option, retries = options.pop(OPTION, None), options.get("retries") or 0
            call = Call(name, options.get("task_id"), args or (), kwargs or {}, retries, option, inherited)
            private = private_headers(rule, call)
            if private:
                _look_at_broker(app, [name])
            if private or not inherited.keys().isdisjoint(PRIVATE):
                options["headers"] = {k: v for k, v in inherited.items() if k not in PRIVATE} | private
        return original(app, name, args, kwargs, *rest, **options)

    return send_task


def stamp_missed(message: dict[str, Any]) -> None:
    """Gives a message its key that was on its way already when this module was imported. The transport calls it."""
    headers, properties = message["headers"], message["properties"]
    if KEY in headers and DELIVERY not in headers:
        return
    name = headers.get("task")
    if name in _plain and DELIVERY not in headers and OPTION not in properties:
        return
    if name is None and not _speaks_protocol_1():
        return
    rule = None if name is None else _rule_anywhere(name)
    if name is not None and rule is None and OPTION not in properties and DELIVERY not in headers:
        return
    try:
        body = _decoded(message)
    except KombuError:
        if name is None:
            return
        raise
    if name is not None:
        args, kwargs, said = body[0], body[1], headers
    elif isinstance(body, dict) and "task" in body:
        name, args, kwargs, said = body["task"], body.get("args") or (), body.get("kwargs") or {}, body
        rule = _rule_anywhere(name)
    else:
        return
    option = properties.pop(OPTION, None)
    private = private_headers(
        rule, Call(name, said.get("id"), args, kwargs, said.get("retries") or 0, option, dict(headers))
    )
    for header in PRIVATE:
        headers.pop(header, None)
    headers.update(private)


_plain: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
"""Tasks without a key, by their names: so that their messages are told from missed ones quickly."""


def _rule_anywhere(name: str) -> Rule | None:
    """As the message does not say which app it is of: the first app's that has a rule."""
    apps = list(_get_active_apps())
    for app in apps:
        rule = _rule_by_name(app, name)
        if rule is not None:
            return rule
    for app in apps:
        if name in app._tasks:
            _plain[name] = app._tasks[name]
    return None


def _speaks_protocol_1() -> bool:
    """Whether a message without a task header may be a task all the same: protocol 1 has all in the body."""
    for app in list(_get_active_apps()):
        made = vars(app.__dict__.get("amqp", app)).get("create_task_message")  # kept there at the first task sent
        if made is not None and made == app.amqp.as_task_v1:
            return True
    return False


def _decoded(message: dict[str, Any]) -> Any:
    body, compression = message["body"], message["headers"].get("compression")
    if compression:
        body = decompress(body, compression)
    # force: it was made by this process, so what it may contain is no question.
    return loads(body, message.get("content-type"), message.get("content-encoding"), force=True)


# --- workers -----------------------------------------------------------------------------------------------------------


class _LateTask(Proxy):  # type: ignore[misc]
    """A task as the request of a keyed message sees it."""

    acks_late = True
    reject_on_worker_lost = True


BEGIN_S = 2.0
"""How long a lost connection waits at most for idle pool processes to begin what they have been given."""

_given_back = memoryview(mmap.mmap(-1, 16)).cast("Q")
"""Shared with the pool processes that are forked from this one: how often messages were given back, and a mark that tells
this memory from that of a process which was not forked."""
_given_back[1] = secrets.randbits(63)


class _Overlaid:
    """An object with some attributes of its own."""

    def __init__(self, inner: Any, **own: Any) -> None:
        self.__dict__.update(own, _inner=inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _guarded(consumer: Any, late: bool) -> Any:
    """A consumer as the strategy of a task sees it: with a pool that starts no body whose message was given back."""
    if not _is_ours(type(consumer.connection.transport)):
        return consumer
    pool = consumer.pool
    _consumers.add(consumer)
    if not late and isinstance(pool, PreforkPool):
        return consumer  # such a message is acknowledged when its process says that it has begun
    hold = not (late and consumer.app.conf.worker_cancel_long_running_tasks_on_connection_loss)

    def apply_async(target: Any, args: Sequence[Any] = (), kwargs: Any = None, **options: Any) -> Any:
        seen = (os.getpid(), *_given_back, late, hold)
        return pool.apply_async(run_if_ours, (seen, target, *args), kwargs, **options)

    return _Overlaid(consumer, pool=_Overlaid(pool, apply_async=apply_async))


_consumers: weakref.WeakSet[Any] = weakref.WeakSet()
"""Those of Celery, each with its pool."""


def _with_keyed_strategy(original: Callable[..., Any]) -> Callable[..., Any]:
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
                keyed = original(_LateTask(lambda: task), app, _guarded(consumer, True), **options)
            return keyed(message, body, ack, reject, *args, **kwargs)

        return handle

    return start_strategy


_refused = threading.local()
"""``tag``: what this thread has last found to have been given back, when it was to be acknowledged before its body."""


def _settle_now(settle: Callable[..., Any], *args: Any) -> None:
    """In place of ``Consumer.call_soon``, which hands an acknowledgement or rejection to the loop: there it may lie while the
    connection breaks, and what has ended would be given back."""
    tag = settle.__self__.delivery_tag  # type: ignore[attr-defined]  # a method of the message
    if hooks.begin is not None and not hooks.begin(tag, True):
        _refused.tag = tag
    settle(*args)


def run_if_ours(
    seen: tuple[int, int, int, bool, bool],
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
    if _may_start(seen, request):
        return trace(name, task_id, request, *args)
    logger.warning("Task %s[%s] is not started: its message has been given back, and runs elsewhere", name, task_id)
    try:
        raise Reject("the message has been given back", requeue=True)
    except Reject:
        return 1, ExceptionInfo(internal=True), 0.0


def _may_start(seen: tuple[int, int, int, bool, bool], request: Mapping[str, Any]) -> bool:
    receiver, given_back, mark, late, hold = seen
    delivery = request.get(DELIVERY) or (request.get("headers") or {}).get(DELIVERY)
    if os.getpid() == receiver:
        tag = (request.get("properties") or {}).get("delivery_tag")
        if not late:
            # Its acknowledgement came just before, from this very thread.
            return tag is None or getattr(_refused, "tag", None) != tag
        if hooks.begin is not None and tag is not None and not hooks.begin(tag, hold):
            return False
    elif _given_back[1] == mark and _given_back[0] != given_back:
        # A pool process says that it begins before it comes here: either its worker has heard that, or it stops here.
        return False
    if delivery is None or hooks.still_owned is None or time.monotonic() < delivery["trusted"]:
        return True
    return hooks.still_owned(delivery)  # the worker may have been paused beyond its lease


def hear_pools() -> None:
    """The connection is lost, or closed: from now on no late body starts in a pool process, and which have started is known."""
    pools = []
    for consumer in tuple(_consumers):
        semaphore = getattr(consumer.controller, "semaphore", None)
        if semaphore is not None:
            semaphore.clear()  # a body that ends would let another one begin
        if isinstance(consumer.pool, PreforkPool) and consumer.pool._pool is not None:
            pools.append(consumer.pool._pool)
    until = time.monotonic() + BEGIN_S
    for pool in pools:
        _hand_over(pool, until)
    while any(map(_about_to_begin, pools)) and time.monotonic() < until:
        for pool in pools:
            _hear(pool, 0.005)
    _given_back[0] += 1
    for pool in pools:
        _hear(pool)


def _with_hearing(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Consumer.on_close``: what Celery knows of no pool process it takes for not begun, and forgets."""

    @functools.wraps(original)
    def on_close(consumer: Any) -> Any:
        if consumer in _consumers:
            hear_pools()
        return original(consumer)

    return on_close


def keep_active(tags: Collection[str]) -> Collection[str]:
    """Of a closing channel's deliveries those whose body runs: Celery lets these go on and drops all others."""
    if not {request.message.delivery_tag for request in tuple(state.requests.values())}.intersection(tags):
        return ()  # not the channel of Celery's own consumer
    hear_pools()
    return active(tags)


def active(tags: Collection[str]) -> Collection[str]:
    """Of these delivery tags those whose body runs."""
    return {
        request.message.delivery_tag
        for request in tuple(state.active_requests)
        # Celery stops the bodies of such requests, and leaves their messages to be delivered again.
        if not (request.app.conf.worker_cancel_long_running_tasks_on_connection_loss and request.task.acks_late)
    }.intersection(tags)


def _hand_over(pool: Any, until: float) -> None:
    """Writes to its end what a process of a prefork pool has been given in part."""
    for job in tuple(pool._cache.values()):
        receiver, writer = getattr(job, "_write_to", None), getattr(job, "_writer", lambda: None)()
        if receiver is None or writer is None or writer not in pool._active_writers:
            continue
        room = select.poll()
        room.register(receiver.inq._writer, select.POLLOUT)
        while time.monotonic() < until and receiver._is_alive():
            if room.poll(10):
                try:
                    next(writer)
                except (StopIteration, OSError):
                    break


def _about_to_begin(pool: Any) -> bool:
    """Whether an idle process of a prefork pool has been given a message and has not said yet that it begins."""
    given = [job for job in tuple(pool._cache.values()) if getattr(job, "_write_to", None) is not None]
    busy = {id(job._write_to) for job in given if job._accepted}
    return any(id(job._write_to) not in busy and job._write_to._is_alive() for job in given if not job._accepted)


def _hear(pool: Any, wait_s: float = 0.0) -> None:
    """Reads what the processes of a prefork pool have said so far, above all that they have begun a body."""
    hub = getattr(getattr(pool, "_result_handler", None), "_hub", None)
    if hub is None:
        return
    waiting = select.poll()
    for fd in list(pool._fileno_to_outq):
        waiting.register(fd, select.POLLIN)
    for fd, _ in waiting.poll(int(wait_s * 1000)):
        _hear_one(pool, hub, fd)


def _hear_one(pool: Any, hub: Any, fd: int) -> None:
    waiting = select.poll()
    waiting.register(fd, select.POLLIN)
    # A loop that has ended has no readers any more; one that reads a message in part has another.
    while hub.readers.get(fd, (pool.handle_result_event,))[0] == pool.handle_result_event and waiting.poll(0):
        pool.handle_result_event(fd)
        reader = hub.readers.get(fd, (None,))[0]
        try:
            while inspect.isgenerator(reader) and waiting.poll(100):
                next(reader)  # a part was read: the loop is about to forget it
        except (StopIteration, OSError):
            pass


# --- other brokers -----------------------------------------------------------------------------------------------------

_looked_at: weakref.WeakSet[Any] = weakref.WeakSet()


def _is_ours(transport: type) -> bool:
    return any(base.__module__.startswith("streamtask.transport") for base in transport.__mro__)


def _look_at_broker(app: Any, names: Sequence[str]) -> None:
    """Says once per app that its broker is not ours. Connects to nothing."""
    if app in _looked_at:
        return
    _looked_at.add(app)
    kind = app.connection_for_write().get_transport_cls()
    if not _is_ours(kind):
        logger.warning(
            "The broker of app %r does not keep the order of shard keys (%s): %s run in any order. Set broker_url to "
            "streamtask://HOST:PORT/DB, or take shard_key out",
            app.main,
            kind.__module__,
            ", ".join(names),
        )


def _on_worker_setup(instance: Any, **_: Any) -> None:
    names = sorted(name for name, task in instance.app.tasks.items() if _declared(task) is not None)
    if names:
        _look_at_broker(instance.app, names)


# --- installation ------------------------------------------------------------------------------------------------------


def _install() -> None:
    Celery.send_task = _with_key(Celery.send_task)
    Task.start_strategy = _with_keyed_strategy(Task.start_strategy)
    Consumer.on_close = _with_hearing(Consumer.on_close)
    hooks.before_publish.append(stamp_missed)
    hooks.keep_on_close.append(keep_active)
    hooks.worked_on.append(active)
    hooks.before_failure.append(hear_pools)
    signals.celeryd_after_setup.connect(_on_worker_setup, weak=False, dispatch_uid=__name__)


_install()
