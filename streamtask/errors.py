"""Every error that streamtask raises, as one tree.

::

    StreamTaskError
    ├── ConfigError              a wrong URL, option, name or app
    │   ├── ShardCountMismatch   the queue is recorded with another number of shards
    │   ├── UnsupportedServer    the Redis server is too old
    │   └── UntrustedServer      another user could take the embedded server's place, or has done so
    ├── SendError                a message was not stored
    │   ├── ShardKeyError        the shard key is missing or of a wrong type
    │   ├── MessageTooLarge      the message is above max_message_bytes
    │   ├── EncodeError          the arguments can't be serialised
    │   └── QueueFull            the backlog limit, or Redis' memory limit, is reached
    │       └── BrokerOutOfMemory
    ├── BrokerUnavailable        Redis can't be reached
    │   ├── InDoubt              a produce call that can't be repeated any more: it may be stored or not
    │   ├── AccessRefused        Redis refused the user or password
    │   └── EmbeddedServerError  the embedded redis-server is missing or did not start
    ├── ReplyError               Redis refused a call with an error that does not pass by itself
    │   └── Misconfigured        its ACL refuses a command or key, or it is a node of a Cluster (a ConfigError, too)
    ├── BulkSendError            send_many stored a part
    ├── LeaseLost                another process owns the shard now
    ├── DecodeError              an entry of a stream is no message
    ├── UnknownTask              no task of that name is registered
    ├── TaskError                what AsyncResult.get raises for a failed task
    │   └── TaskRevoked
    ├── ResultTimeout            no result within the time asked for
    ├── SoftTimeLimitExceeded    raised inside a body at its soft_time_limit
    ├── TimeLimitExceeded        what a body has failed with whose process was ended at its time_limit
    └── Control                  raised by a task to say what becomes of its message
        ├── Retry
        ├── Reject
        └── Ignore

Each message says what is wrong and what to do. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

__all__ = [
    "AccessRefused",
    "BrokerOutOfMemory",
    "BrokerUnavailable",
    "BulkSendError",
    "ConfigError",
    "Control",
    "DecodeError",
    "EmbeddedServerError",
    "EncodeError",
    "Ignore",
    "InDoubt",
    "LeaseLost",
    "MessageTooLarge",
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
    "StreamTaskError",
    "TaskError",
    "TaskRevoked",
    "TimeLimitExceeded",
    "UnknownTask",
    "UnsupportedServer",
    "UntrustedServer",
]


class StreamTaskError(Exception):
    """Base of all errors that streamtask raises."""


class ConfigError(StreamTaskError):
    """A setting, URL, name or app is wrong; nothing was sent."""


class ShardCountMismatch(ConfigError):
    """The queue is recorded in Redis with another number of shards than this app has."""


class UnsupportedServer(ConfigError):
    """The Redis server is older than 6.2."""


class UntrustedServer(ConfigError):
    """Another user of this machine could take the place of the embedded server, or has done so; nothing was sent."""


class SendError(StreamTaskError):
    """A message was refused; it is not stored."""


class ShardKeyError(SendError, ValueError):
    """The shard key is missing, None, or not a str, int, UUID or bytes; nothing was sent."""


class MessageTooLarge(SendError, ValueError):
    """The encoded message is larger than ``max_message_bytes``; nothing was sent."""


class EncodeError(SendError, TypeError):
    """The arguments can't be serialised; nothing was sent."""


class QueueFull(SendError):
    """The shard's backlog limit is reached; the message is not stored."""


class BrokerOutOfMemory(QueueFull):
    """Redis refused the write for want of memory; the message is not stored."""


class BrokerUnavailable(StreamTaskError, ConnectionError):
    """Redis can't be reached, did not answer in time, or does not serve now. ``code`` is then the first word of its
    answer, as BUSY, LOADING, READONLY, NOREPLICAS or MISCONF.

    After a produce call, the message may be stored or not: the reply was lost. Repeat the call with a
    ``dedupe_id`` where that matters.
    """

    code = ""
    in_doubt = True
    """Whether what was asked for may have been done all the same; not where it was not sent, or where Redis refused it."""


class InDoubt(BrokerUnavailable):
    """The reply to a produce call was lost, and Redis could not be asked again for as long as it knows the call's id
    (``produce_ttl``, or ``dedupe_ttl`` with a ``dedupe_id``). The message is stored or not; another repetition could store
    it twice."""


class AccessRefused(BrokerUnavailable):
    """Redis refused the user or password.

    A call, and a start, fail at once: as a rule it is a wrong setting. A worker that runs waits, as it does for a Redis that is
    away: the password is being changed, or a replica that was promoted has not its users yet.
    """


class ReplyError(StreamTaskError):
    """Redis answered with an error that does not pass by itself. ``code`` is its first word, as NOGROUP or WRONGTYPE; ERR
    where it has none. Nothing was stored by the call."""

    def __init__(self, message: str, code: str = "ERR") -> None:
        super().__init__(message)
        self.code = code


class Misconfigured(ConfigError, ReplyError):
    """Redis' answer shows a wrong setting: its ACL refuses a command or a key, or it is a node of a Cluster and the URL does
    not say so. Workers that run wait until that is changed."""


class EmbeddedServerError(BrokerUnavailable):
    """No redis-server was found for ``embedded://``, or it did not start."""


class BulkSendError(StreamTaskError):
    """``send_many`` failed after a part was stored.

    ``stored`` and ``failed`` hold the positions (from 0) of the items that are stored and that are not;
    ``unknown`` those whose reply was lost.
    """

    def __init__(
        self, message: str, *, stored: Sequence[int] = (), failed: Sequence[int] = (), unknown: Sequence[int] = ()
    ) -> None:
        super().__init__(message)
        self.stored = list(stored)
        self.failed = list(failed)
        self.unknown = list(unknown)


class LeaseLost(StreamTaskError):
    """Another process owns the shard now; what was asked for was not done."""


class DecodeError(StreamTaskError, ValueError):
    """An entry of a stream is no message that this version can read."""


class UnknownTask(StreamTaskError, LookupError):
    """No task of that name is registered in this app."""


class TaskError(StreamTaskError):
    """A task failed for good. ``traceback`` holds the worker's traceback as text, where there is one; Python, and so
    pytest, shows it above this error's own."""

    def __init__(self, message: str, *, traceback: str | None = None) -> None:
        super().__init__(message)
        self.traceback = traceback
        if traceback:
            self.__cause__ = _InTheWorker(f"\n\n{traceback}")


class _InTheWorker(Exception):
    """Where a task failed: in another process, or at another time."""


class TaskRevoked(TaskError):
    """The task was revoked before it ran."""


class ResultTimeout(StreamTaskError, TimeoutError):
    """No result came within the time asked for."""


class SoftTimeLimitExceeded(StreamTaskError):
    """Raised inside a task body when its ``soft_time_limit`` has passed."""


class TimeLimitExceeded(StreamTaskError):
    """What a run has failed with whose process was ended at its ``time_limit``: for ``autoretry_for``, hooks and the dead
    letter. No body can catch it."""


class Control(StreamTaskError):
    """Base of what a task raises to say what becomes of its message."""


class Retry(Control):
    """Run the message again later; it keeps its place at the head of its lane.

    ``countdown`` is in seconds, or a timedelta; ``eta`` is a timezone-aware instant. Without both, the task's back-off decides.
    What can't be makes the message a dead letter that says so.
    """

    def __init__(
        self,
        message: str = "",
        *,
        exc: BaseException | None = None,
        countdown: float | timedelta | None = None,
        eta: datetime | None = None,
        max_retries: int | None = None,
    ) -> None:
        super().__init__(message or (f"retry after a {type(exc).__name__}" if exc is not None else "retry"))
        self.exc = exc
        self.countdown = countdown
        self.eta = eta
        self.max_retries = max_retries


class Reject(Control):
    """Send the message to the dead letters at once, or with ``requeue=True`` back to the head of its lane.

    ``reason``: text, or an exception."""

    def __init__(self, reason: object = "rejected by the task", requeue: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.requeue = requeue


class Ignore(Control):
    """Finish the message without a result."""
