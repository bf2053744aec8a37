"""A shard in the hands of this process, as the control loop sees it."""

from __future__ import annotations

from ..queue.consumer import ShardConsumer
from ..queue.queues import Queue
from ..redis.outage import Rarely


class Owned:
    """See the module."""

    __slots__ = (
        "consumer", "full", "next_audit", "number", "queue", "quiet_until", "read_at", "refusals", "takeover", "woken",
    )  # fmt: skip

    def __init__(self, number: int, consumer: ShardConsumer, queue: Queue, next_audit: float) -> None:
        self.number = number
        self.consumer = consumer
        self.queue = queue
        self.takeover = True  # the pending entries have not been read yet
        self.full = True  # the last fetch brought as much as it could, or there was none
        self.read_at = 0.0
        self.quiet_until = 0.0  # no calls before then: the lease's record is missing, or something failed
        self.refusals = Rarely()
        self.next_audit = next_audit
        self.woken = True  # something else than a message has come, and was not looked at yet

    def audit_due(self, now: float) -> bool:
        return self.takeover or self.consumer.fence.needs_audit or now >= self.next_audit

    def offers_first(self) -> bool:
        """Whether there are messages on offer, to be taken before new ones are read."""
        return self.consumer.arrivals.room is not None and self.consumer.arrivals.on_offer

    def has_to_prepare(self, now: float) -> bool:
        consumer = self.consumer
        backlog, arrivals = consumer.backlog, consumer.arrivals
        return (
            self.audit_due(now)
            or self.woken
            or consumer.claimer.has_to_recover()
            or backlog.halted
            or bool(backlog.lanes.lanes)
            or (arrivals.next_due is not None and now >= arrivals.next_due)
            or (arrivals.on_offer and arrivals.has_room())
        )
