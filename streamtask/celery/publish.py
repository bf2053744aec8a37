"""Publishing: the headers that a call's message gets, by ``Celery.send_task`` or when it reaches the transport."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

from celery.exceptions import Reject
from kombu.compression import decompress
from kombu.serialization import loads, prepare_accept_content
from kombu.utils.uuid import uuid

from ..errors import BrokerUnavailable, ShardKeyError
from ..sharding import canonical
from ..transport.message import DELIVERY, KEY, ORDERED, PRIVATE, REPLACES, check_compressed
from . import internals
from .brokers import look_at_broker
from .keys import OPTION, Rule, key_of, rule_by_name, rule_of


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
        found = None if rule is None else key_of(rule, call.name, call.args, call.kwargs)
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
    running = internals.running_task()
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


def with_key(original: Callable[..., Any]) -> Callable[..., Any]:
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
        rule = rule_by_name(app, name) if task is None else rule_of(task)
        headers = options.get("headers")
        if rule is not None or headers or OPTION in options or options.get("retries"):
            inherited = headers or {}
            option, retries = options.pop(OPTION, None), options.get("retries") or 0
            call = Call(name, options.get("task_id"), args or (), kwargs or {}, retries, option, inherited)
            private = private_headers(rule, call)
            if private:
                look_at_broker(app, [name])
            if private or not inherited.keys().isdisjoint(PRIVATE):
                options["headers"] = {k: v for k, v in inherited.items() if k not in PRIVATE} | private
        if not rest and not options.get("task_id"):
            options["task_id"] = uuid()
        token = _calling.set((app, options.get("task_id")))
        try:
            return original(app, name, args, kwargs, *rest, **options)
        finally:
            _calling.reset(token)

    return send_task


_calling: ContextVar[tuple[Any, str | None] | None] = ContextVar("streamtask_calling", default=None)
"""The app and the id of the call that is on its way to the transport."""


def with_retry_kept(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Task.retry``: where Redis can't be reached and the retry is not published, the message goes back and runs again.
    Celery rejects it for good, so that an outage of a second would make dead letters of what is retried just then."""

    @functools.wraps(original)
    def retry(task: Any, *args: Any, **options: Any) -> Any:
        try:
            return original(task, *args, **options)
        except Reject as exc:
            if isinstance(exc.reason, BrokerUnavailable) or isinstance(
                getattr(exc.reason, "__cause__", None), BrokerUnavailable
            ):
                exc.requeue = True
            raise

    return retry


def stamp_missed(message: dict[str, Any]) -> None:
    """Gives a message its key that was on its way already when this module was imported. The transport calls it."""
    headers, properties = message["headers"], message["properties"]
    if KEY in headers and DELIVERY not in headers:
        return
    calling = _calling.get()
    if calling is not None and properties.get("correlation_id") == calling[1]:
        return  # ``with_key`` has found that it has none
    name = headers.get("task")
    if isinstance(name, str) and name in _plain and DELIVERY not in headers and OPTION not in properties:
        return
    if name is None:
        apps = [app for app in _apps() if _speaks_protocol_1(app)]
        try:
            said = _decoded(message, apps) if apps else None
        except Exception:
            return
        if not isinstance(said, dict) or not isinstance(said.get("task"), str):
            return
        name, args, kwargs = said["task"], said.get("args") or (), said.get("kwargs") or {}
        rule, _ = _rule_anywhere(name)
    elif isinstance(name, str):
        rule, apps = _rule_anywhere(name)
        if rule is None and OPTION not in properties and DELIVERY not in headers:
            return
        said, args, kwargs = headers, (), {}
        if rule is not None and OPTION not in properties:
            args, kwargs = _arguments(message, name, rule, apps)
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


def _apps() -> list[Any]:
    """Those whose message it may be, as the message itself does not say it."""
    calling = _calling.get()
    return internals.active_apps() if calling is None else [calling[0]]


def _rule_anywhere(name: str) -> tuple[Rule | None, list[Any]]:
    """The first rule that an app has for tasks of this name, and all apps that have one."""
    apps = _apps()
    found = [(rule, app) for app in apps if (rule := rule_by_name(app, name)) is not None]
    if found:
        return found[0][0], [app for _, app in found]
    for app in apps:
        task = internals.known_task(app, name)
        if task is not None:
            _plain[name] = task
    return None, []


def _speaks_protocol_1(app: Any) -> bool:
    """Whether an app's message without a task header may be a task all the same: protocol 1 has all in the body."""
    made = vars(app.__dict__.get("amqp", app)).get("create_task_message")  # kept there at the first task sent
    return made is not None and made == app.amqp.as_task_v1


def _arguments(message: dict[str, Any], name: str, rule: Rule, apps: Sequence[Any]) -> tuple[Any, Any]:
    try:
        args, kwargs, *_ = _decoded(message, apps)
    except Exception as exc:
        raise ShardKeyError(
            f"task {name}: its shard key ({rule.shown}) is in a body that can't be looked into: {exc}. Set accept_content, or "
            f"give the key itself, in the header {KEY!r}"
        ) from None
    return args, kwargs


def _decoded(message: dict[str, Any], apps: Sequence[Any]) -> Any:
    """The body of a message, which may have come from anywhere: only what all of these apps accept is loaded."""
    body, compression = message["body"], message["headers"].get("compression")
    if compression:
        check_compressed(body, compression)
        body = decompress(body, compression)
    accepted = [prepare_accept_content(app.conf.accept_content or ("json",)) for app in apps]
    return loads(body, message.get("content-type"), message.get("content-encoding"), accept=set.intersection(*accepted))
