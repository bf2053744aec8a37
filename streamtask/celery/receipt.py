"""A message that breaks its worker at receipt, before any body: Celery would be given it for ever, and nothing behind it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from celery import signals
from celery.exceptions import WorkerShutdown, WorkerTerminate
from celery.worker import state
from kombu.exceptions import OperationalError

from ..errors import StreamTaskError
from ..text import logger
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
            limits = message.headers.get("timelimit")
            if limits and not _are_limits(limits):
                return _refuse(consumer, message, ValueError(f"timelimit is {limits!r}"))
            if not channel.receive(tag):
                return None
            try:
                return receive(message)
            except (Exception, SystemExit) as exc:
                # Not where the worker is told to stop meanwhile, or Redis is away.
                if _is_its_own(exc) and (channel.charge(tag) or _is_none_of_celerys(message)):
                    return _refuse(consumer, message, exc)
                raise
            finally:
                channel.received(tag)

        return on_task_received

    return create_task_handler


def _refuse(consumer: Any, message: Any, exc: BaseException) -> None:
    why = f"a worker can't receive it: {exc!r}"
    log.error("%s task=%r id=%r", why, message.headers.get("task"), message.headers.get("id"), exc_info=exc)
    message.channel.refuse(message.delivery_tag, why)
    signals.task_rejected.send(sender=consumer, message=message, exc=exc)


def _is_its_own(exc: BaseException) -> bool:
    if state.should_stop is not None or state.should_terminate is not None:
        return False
    return not isinstance(exc, StreamTaskError | OperationalError | WorkerShutdown | WorkerTerminate)


def _are_limits(limits: Any) -> bool:
    try:
        hard, soft = limits
        return all(limit is None or math.isfinite(limit) for limit in (hard, soft))
    except (TypeError, ValueError, OverflowError):
        return False


def _is_none_of_celerys(message: Any) -> bool:
    """Whether no worker could ever make a task of a message."""
    try:
        said, payload = message.headers, message.payload
        if "task" not in said:
            said = payload
        elif "args" not in payload:
            _args, _kwargs, _embed = payload
        hash(said["id"])
        return not isinstance(said["task"], str)
    except Exception:
        return True


__all__ = ["with_guard"]
