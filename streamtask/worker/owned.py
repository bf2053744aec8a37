"""The shards in the hands of this process, as the control loop sees them, and what becomes of one whose calls are refused."""

from __future__ import annotations

from typing import Protocol

from ..clock import mono_s
from ..coordination.orders import Lost, Order, Released
from ..errors import ReplyError
from ..queue.consumer import ShardConsumer
from ..queue.queues import Queue
from ..redis.misplaced import by, naming
from ..redis.outage import Rarely
from ..text import logger
from .executor import SequentialExecutor
from .outbox import Outbox
from .side_by_side import ParallelExecutor

log = logger("streamtask.worker")

Executor = SequentialExecutor | ParallelExecutor


class Owned:
    """One of them."""

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


class Sender(Protocol):
    """The way to the supervisor."""

    def send(self, order: Order) -> None: ...


class Shards:
    """All of them."""

    def __init__(self, group: str, executor: Executor, outbox: Outbox, supervisor: Sender) -> None:
        self._group = group
        self._executor = executor
        self._outbox = outbox
        self._supervisor = supervisor
        self.owned: dict[int, Owned] = {}
        """By the number that the supervisor calls them."""
        self.shared: list[Owned] = []
        """Those of shared streams."""
        self.turn_order: list[Owned] = []
        """All: whoever was served goes to its end."""
        self.look_at: float | None = None
        """When (monotonic) to look at them again, whatever happens."""

    def add(self, owned: Owned) -> None:
        self.owned[owned.number] = owned
        if owned.consumer.fence.lease.shared:
            self.shared.append(owned)
        self.turn_order.append(owned)

    def of(self, consumer: ShardConsumer) -> Owned | None:
        owned = self.owned.get(consumer.backlog.number)
        return owned if owned is not None and owned.consumer is consumer else None

    def forget(self, owned: Owned) -> None:
        self._outbox.add_unrun(owned.consumer)
        self.owned.pop(owned.number, None)
        if owned in self.shared:
            self.shared.remove(owned)
        if owned in self.turn_order:
            self.turn_order.remove(owned)
        self._executor.forget(owned.consumer.backlog)

    def lost(self, owned: Owned) -> None:
        """Another process owns the shard: everything of it is dropped, and the supervisor ends this process."""
        log.error(
            "lost the lease queue=%s shard=%s token=%d",
            owned.queue.name,
            owned.consumer.fence.shard,
            owned.consumer.fence.lease.token,
        )
        owned.consumer.backlog.halted = True
        self.forget(owned)
        fence = owned.consumer.fence
        self._supervisor.send(Lost(owned.number, owned.queue.name, fence.shard, fence.lease.token))

    def suspect(self, owned: Owned) -> None:
        """A call was refused: is the lease another's, or is its record gone (a flush), to be written anew by the keeper?"""
        fence = owned.consumer.fence
        answer = fence.link.call(fence.guard_command)
        if fence.owns(answer):
            return
        if answer[1] is None:
            owned.quiet_until = mono_s() + 0.1
        else:
            self.lost(owned)

    def refused(self, owned: Owned, exc: ReplyError) -> None:
        if exc.code == "NOGROUP":
            try:
                self._stream_gone(owned)
                return
            except ReplyError as why:
                exc = why
        if owned.refusals.worth_saying(exc.code):
            fence = owned.consumer.fence
            text = naming(exc, fence.keys.all(fence.group), by(fence.link))
            log.error("Redis refused a call queue=%s shard=%s: %s", owned.queue.name, fence.shard, text)
        owned.quiet_until = mono_s() + 1.0

    def _stream_gone(self, owned: Owned) -> None:
        log.critical(
            "data loss: the stream or its group is gone (a flush, an eviction, or somebody deleted it); messages that were "
            "not read are lost; the group is made anew queue=%s shard=%s",
            owned.queue.name, owned.consumer.fence.shard,
        )  # fmt: skip
        owned.queue.forget()
        owned.queue.declare((self._group,))
        owned.consumer.arrivals.last_id = "0-0"
        owned.consumer.arrivals.wake_id = "0-0"
        owned.full = True

    def handed_over(self, owned: Owned) -> None:
        self.forget(owned)
        self._supervisor.send(Released(owned.number))
