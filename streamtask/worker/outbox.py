"""Results on their way to Redis. They are stored before their messages are acknowledged: a crash in between runs the task
again, and overwrites.

While Redis is away or full they wait, and so do the acknowledgements. What it refuses (its ACL, as a rule) is tried for
``GIVE_UP_S``, and then given up: one result that can't be stored must not hold up whatever this process does.
"""

from __future__ import annotations

from ..clock import mono_s
from ..errors import ReplyError
from ..queue.consumer import ShardConsumer
from ..queue.delivery import Delivery
from ..redis import wire
from ..redis.connection import Broker
from ..redis.links import Links, Prepared
from ..text import logger
from .ports import TaskRunner, results_of

log = logger("streamtask.worker")

GIVE_UP_S = 30.0
AGAIN_S = 1.0


class Outbox:
    """See the module. Used by one thread; without a broker it keeps nothing."""

    def __init__(self, broker: Broker | None, runner: TaskRunner) -> None:
        self._runner = runner
        self._links = Links(broker) if broker else None
        self._waiting: list[tuple[Delivery, Prepared]] = []
        self._refused_at: float | None = None
        self.again_at = 0.0
        """When (monotonic) to send again."""

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, results: list[tuple[Delivery, Prepared]]) -> None:
        if self._links is not None:
            self._waiting += results

    def add_unrun(self, consumer: ShardConsumer) -> None:
        """Those of what was revoked, before it is acknowledged, and of what lies among the dead letters now."""
        for one in results_of(consumer, self._runner):
            self.add([one])

    def send(self) -> bool:
        """Stores what there is. False if some of it is to be sent again before anything is acknowledged. Raises
        ``BrokerUnavailable``, ``QueueFull``."""
        if not self._waiting or self._links is None:
            return True
        now = mono_s()
        if now < self.again_at:
            return False
        refused: list[tuple[tuple[Delivery, Prepared], ReplyError]] = []
        replies = self._links.pipeline([call for _, call in self._waiting])
        for one, reply in zip(self._waiting, replies, strict=True):
            if isinstance(reply, ReplyError):
                refused.append((one, reply))
            elif isinstance(reply, Exception):
                raise reply  # all of them are stored again
            elif reply == -1:
                log.warning(
                    "a result is not kept: another message with this id has ended before task=%s id=%s",
                    one[0].task, wire.id_text(one[0].id),
                )  # fmt: skip
        self._waiting = []
        if not refused:
            self._refused_at = None
            return True
        if self._refused_at is None:
            self._refused_at = now
            log.error("Redis refuses results; they are kept for %.0f s, unacknowledged: %s", GIVE_UP_S, refused[0][1])
        if now < self._refused_at + GIVE_UP_S:
            self._waiting = [one for one, _ in refused]
            self.again_at = now + AGAIN_S
            return False
        for (delivery, _), reply in refused:
            log.error(
                "a message has ended and its result is given up, Redis refuses it task=%s id=%s: %s",
                delivery.task, wire.id_text(delivery.id), reply,
            )  # fmt: skip
        return True


__all__ = ["Outbox"]
