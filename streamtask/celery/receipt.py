"""A message that breaks its worker at receipt, before any body: Celery would be given it for ever, and nothing behind it."""

from __future__ import annotations

import datetime as dt
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from celery import signals
from celery.exceptions import InvalidTaskError, WorkerShutdown, WorkerTerminate
from celery.worker import state
from kombu.exceptions import KombuError, OperationalError

from ..errors import StreamTaskError
from ..text import logger, printable, said
from .brokers import is_ours

log = logger("streamtask.celery")


def with_guard(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Consumer.create_task_handler``, whose handler takes each message as it comes: what is none of Celery's goes to the
    dead letters at once. Whatever else ends the worker there is charged to its message, also by the keeper where the process
    just vanishes; once more than ``max_crashes`` times, and it goes there, too."""

    @functools.wraps(original)
    def create_task_handler(consumer: Any, *args: Any, **kwargs: Any) -> Any:
        receive = original(consumer, *args, **kwargs)
        if not is_ours(type(consumer.connection.transport)):
            return receive

        def on_task_received(message: Any) -> Any:
            channel, tag = message.channel, message.delivery_tag
            if not channel.receive(tag):
                return None
            try:
                fault = fault_of(message)
                return receive(message) if fault is None else _refuse(consumer, message, InvalidTaskError(fault))
            except (Exception, SystemExit) as exc:
                # Not where the worker is told to stop meanwhile, or Redis is away.
                if _is_its_own(exc) and channel.charge(tag):
                    return _refuse(consumer, message, exc)
                raise
            finally:
                channel.received(tag)

        return on_task_received

    return create_task_handler


def with_refusal(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Consumer.on_decode_error``: what can't be decoded goes to the dead letters. Celery acknowledges it."""

    @functools.wraps(original)
    def on_decode_error(consumer: Any, message: Any, exc: BaseException) -> Any:
        if not is_ours(type(consumer.connection.transport)):
            return original(consumer, message, exc)
        return _refuse(consumer, message, exc)

    return on_decode_error


def with_junk_left_out(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Gossip.on_message``: what is no event of a worker's, whoever has published it, does not end this worker."""

    @functools.wraps(original)
    def on_message(gossip: Any, prepare: Any, message: Any) -> Any:
        try:
            return original(gossip, prepare, message)
        except (LookupError, TypeError, ValueError, AttributeError, KombuError) as exc:
            log.warning("junk on the exchange of events: %s", printable(repr(exc), 200))
            return None

    return on_message


def _refuse(consumer: Any, message: Any, exc: BaseException) -> None:
    why = f"a worker can't receive it: {printable(f'{type(exc).__name__}: {said(exc)}', 500)}"
    log.error("%s task=%r id=%r", why, message.headers.get("task"), message.headers.get("id"), exc_info=exc)
    message.channel.refuse(message.delivery_tag, why)
    signals.task_rejected.send(sender=consumer, message=message, exc=exc)


def _is_its_own(exc: BaseException) -> bool:
    if state.should_stop is not None or state.should_terminate is not None:
        return False
    return not isinstance(exc, StreamTaskError | OperationalError | WorkerShutdown | WorkerTerminate)


def fault_of(message: Any) -> str | None:
    """Why no worker could make a task of a message; None where it may, or where Celery itself says that it is no task. What
    Celery would raise on later is among it, outside of its handler or in a pool, where nobody could tell whose fault it is."""
    headers = message.headers
    try:
        payload = message.payload
    except MemoryError:
        raise
    except Exception as exc:
        return f"its body can't be decoded: {said(exc)}"
    body: Any = payload
    if "task" in headers:
        stated = headers
        if isinstance(payload, dict) and "args" in payload:
            stated = {**payload, **headers}
            body = [payload["args"], payload.get("kwargs", {}), None]
        elif not (isinstance(payload, list | tuple) and len(payload) == 3):
            return "its body is no [args, kwargs, embed]"
    elif isinstance(payload, dict) and "task" in payload:
        stated = payload
        body = [payload.get("args", ()), payload.get("kwargs", {}), None]
    else:
        # Celery says of it that it is no task, and how long its body is.
        return "it has no body" if message.body is None else None
    args, kwargs, embed = body
    if not (isinstance(args, list | tuple) and isinstance(kwargs, Mapping) and isinstance(embed or {}, dict)):
        return "its args, kwargs and embed are no list and two maps"
    if embed and not all(type(name) is str for name in embed):
        return "a name in its embed is no text"
    for name, fits in _STATED.items():
        value = stated.get(name)
        if not fits(value):
            return f"its {name} is {printable(repr(value), 100, lines=False)}"
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or type(value) is int


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_time(value: Any) -> bool:
    return value is None or (isinstance(value, str | dt.datetime) and value != "")


def _are_limits(limits: Any) -> bool:
    if not limits:
        return True
    try:
        hard, soft = limits
        return all(limit is None or math.isfinite(limit) for limit in (hard, soft))
    except (TypeError, ValueError, OverflowError):
        return False


def _are_names(names: Any) -> bool:
    return not names or (
        isinstance(names, list | tuple | set | frozenset) and all(isinstance(name, str) for name in names)
    )


def _is_count(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 0)


def _is_map(value: Any) -> bool:
    return not value or isinstance(value, Mapping)


_STATED: dict[str, Callable[[Any], bool]] = {
    "task": _is_text, "id": _is_id, "shadow": _is_text_or_none, "eta": _is_time, "expires": _is_time,
    "timelimit": _are_limits, "stamped_headers": _are_names, "stamps": _is_map, "headers": _is_map,
    "retries": _is_count,
}  # fmt: skip
"""Of what a message says of its task that which Celery takes to be of its type."""
