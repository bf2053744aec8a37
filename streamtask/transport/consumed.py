"""A queue that this process takes messages from: its streams here, and what is known of when there is something in them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from ..clock import mono_s
from .consumer import StreamConsumer
from .queues import KombuQueue, shared
from .resting import Rest


class Consumed:
    """See the module. Its session's lock guards it."""

    def __init__(self, queue: KombuQueue) -> None:
        self.queue = queue
        # Channels that consume it; True: without acknowledging. Weak: one that nobody closed must not hold messages.
        self.users: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        self.streams: dict[int, StreamConsumer] = {}  # shared streams by priority, the most urgent first
        self.shards: dict[int, StreamConsumer] = {}  # by shard
        self.positions: dict[str, tuple[str, str]] = {}  # last delivered id and newest wake id, by stream's prefix
        self.next_due: float | None = None  # of the shared streams' delayed messages, monotonic
        self.in_keeper = False
        self.gone = False  # deleted, and not declared again yet
        self.rung = True  # there may be something to read
        self.rest = Rest()
        self.look_at = 0.0
        self.shards_first = False
        self.left_out = 0  # messages that had expired

    def takes_for_good(self) -> bool:
        """Nobody here acknowledges, and no order has to be kept: no lease is needed then."""
        return bool(self.users) and all(self.users.values()) and not self.streams and not self.queue.keyed

    def consumers(self) -> Iterable[StreamConsumer]:
        yield from self.streams.values()
        yield from self.shards.values()

    def moved(self, prefix: str, last: bytes, rung: bytes) -> bool:
        """Notes how far a shared stream was read. True if its bell rang meanwhile, for whatever reason."""
        before = self.positions.get(prefix)
        self.positions[prefix] = last.decode(), rung.decode()
        return before is None or before[1] != rung.decode()

    def ready(self) -> bool:
        """Whether there may be something to take."""
        if self.gone or self.rest:
            return False
        if self.rung:
            return True
        now = mono_s()
        if self.next_due is not None and now >= self.next_due and not self.shared_rest():
            return True
        return any(consumer.may_have(now) for consumer in self.consumers())

    def shared_rest(self) -> bool:
        """Whether the shared streams rest, which are read with one call."""
        return any(consumer.rest for consumer in self.streams.values())

    def due_times(self) -> Iterable[float]:
        """When (monotonic) something falls due, as far as is known here."""
        rests = [self.rest, *(consumer.rest for consumer in self.consumers())]
        yield from (rest.until for rest in rests if rest)
        if self.next_due is not None and not self.shared_rest():
            yield self.next_due
        times = [consumer.backlog.lanes.next_due() for consumer in self.consumers() if not consumer.rest]
        shards = [consumer for consumer in self.shards.values() if not consumer.rest and not consumer.backlog.closing]
        times += [consumer.arrivals.next_due for consumer in shards]
        yield from (at for at in times if at is not None)

    def bell(self) -> dict[bytes, str]:
        """The streams to wait for, and the ids after which there is something new."""
        found: dict[bytes, str] = {}
        if self.gone or self.rest:
            return found
        for priority in () if self.shared_rest() else self.streams or self.queue.priorities:
            keys = self.queue.shard_keys(shared(priority))
            found[keys.stream.encode()], found[keys.wake.encode()] = self.positions.get(keys.prefix, ("0-0", "0-0"))
        for consumer in self.shards.values():
            if not consumer.backlog.closing and not consumer.rest:
                if consumer.reads_on():
                    found[consumer.keys.stream.encode()] = consumer.arrivals.last_id
                found[consumer.keys.wake.encode()] = consumer.arrivals.wake_id
        return found

    def rang(self, key: bytes, last: bytes) -> None:
        """The bell rang for one of these streams."""
        self.rung = True
        for consumer in self.shards.values():
            if consumer.keys.stream.encode() == key:
                consumer.read_at = 0.0
            if consumer.keys.wake.encode() == key:
                consumer.arrivals.wake_id = last.decode()
                consumer.woken = True
