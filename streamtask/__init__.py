"""streamtask: Celery's task decorator with Kafka's guarantees, on Redis Streams.

The names are imported at their first use: kombu imports a part of this package in every process where both are installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import StreamTask
    from .errors import (
        AccessRefused,
        BrokerOutOfMemory,
        BrokerUnavailable,
        BulkSendError,
        ConfigError,
        DecodeError,
        EncodeError,
        Ignore,
        InDoubt,
        LeaseLost,
        MessageTooLarge,
        Misconfigured,
        QueueFull,
        Reject,
        ReplyError,
        ResultTimeout,
        Retry,
        SendError,
        ShardCountMismatch,
        ShardKeyError,
        SoftTimeLimitExceeded,
        StreamTaskError,
        TaskError,
        TaskRevoked,
        TimeLimitExceeded,
        UnknownTask,
        UnsupportedServer,
        UntrustedServer,
    )
    from .middleware import Dedupe, Middleware
    from .results import AsyncResult
    from .task import Task

__all__ = [
    "AccessRefused",
    "AsyncResult",
    "BrokerOutOfMemory",
    "BrokerUnavailable",
    "BulkSendError",
    "ConfigError",
    "DecodeError",
    "Dedupe",
    "EncodeError",
    "Ignore",
    "InDoubt",
    "LeaseLost",
    "MessageTooLarge",
    "Middleware",
    "Misconfigured",
    "QueueFull",
    "Reject",
    "ReplyError",
    "ResultTimeout",
    "Retry",
    "SendError",
    "ShardCountMismatch",
    "ShardKeyError",
    "SoftTimeLimitExceeded",
    "StreamTask",
    "StreamTaskError",
    "Task",
    "TaskError",
    "TaskRevoked",
    "TimeLimitExceeded",
    "UnknownTask",
    "UnsupportedServer",
    "UntrustedServer",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    homes = {
        "AsyncResult": ".results",
        "Dedupe": ".middleware",
        "Middleware": ".middleware",
        "StreamTask": ".app",
        "Task": ".task",
    }
    value = globals()[name] = getattr(import_module(homes.get(name, ".errors"), __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
