"""This process' part in the shards of its queues: what its keeper tells, and what the keeper has to know."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from ..clock import mono_s
from ..coordination.keeper import Keeper
from ..coordination.lease import Lease, join_shared, reap
from ..coordination.orders import Lost, LostShared, Own, Release, Resume, Up
from ..errors import StreamTaskError
from ..queue.fence import LinksByKey
from ..queue.rules import ConsumerSettings
from ..redis.connection import Broker
from ..redis.keys import SHARED
from ..text import logger
from .consumed import SHARD_READ, Consumed
from .consumer import StreamConsumer
from .options import Options
from .queues import GROUP, shared
from .vhost import Touched

log = logger("streamtask.transport")

KEEPER_PAUSE_S = 1.0
"""Between two starts of a keeper, where it keeps dying."""


class Read:
    """See ``queue.arrivals.Reading``. The keeper may be replaced meanwhile."""

    def __init__(self, ownership: Ownership, lease: Lease) -> None:
        self._ownership = ownership
        self._lease = lease

    def begin(self, entry_id: bytes) -> None:
        self._ownership.reads(self._lease, entry_id)

    def end(self) -> None:
        self._ownership.reads(self._lease, None)


class Told(NamedTuple):
    """What the keeper's orders ask of others."""

    came: bool
    """Shards have come: there is something to read."""
    going: list[StreamConsumer]
    """Shards are to go: what was handed out of them and has not begun goes with them."""


class Ownership:
    """See the module. ``consumed`` and ``touched`` are those of the process, by the names of queues; ``lost`` is told of a
    stream of which all that was delivered is others' now, and why, or None where it comes back at once.

    Who owns ``consumed`` guards this, too. A process that consumes nothing has no keeper.
    """

    def __init__(
        self,
        broker: Broker,
        options: Options,
        links: LinksByKey,
        consumed: Mapping[str, Consumed],
        touched: Mapping[str, Touched],
        lost: Callable[[StreamConsumer, str | None], None],
    ) -> None:
        self._broker = broker
        self._options = options
        self.settings = ConsumerSettings(group=GROUP, fetch_count=SHARD_READ, max_crashes=options.max_crashes)
        self._links = links
        self._incarnation = uuid.uuid4().hex[:16]
        self._consumed = consumed
        self._touched = touched
        self._tell_lost = lost
        self._came = False
        self._going: list[StreamConsumer] = []
        self._keeper: Keeper | None = None
        self._started = 0.0
        self._again_at: float | None = None
        self._up = False
        self._numbers: dict[int, tuple[Consumed, int]] = {}  # the keeper's numbers of shards
        self._told: dict[int, Own] = {}  # the orders with which they came
        self.releasing: set[int] = set()
        """Shards that are to go, by the keeper's numbers."""

    def fileno(self) -> int:
        """The keeper's socket, -1 without one."""
        return -1 if self._keeper is None else self._keeper.fileno()

    def stamp(self) -> object:
        """Tells one keeper's socket from another's."""
        return id(self._keeper)

    # What the keeper has to know

    def keeper(self) -> Keeper:
        if self._keeper is None:
            options = self._options
            self._started = mono_s()
            self._up = False
            self._keeper = Keeper(
                self._broker,
                namespace=options.namespace,
                app=options.app,
                group=GROUP,
                incarnation=self._incarnation,
                lease_ms=options.lease_ms,
                handover_timeout_s=options.handover_timeout_s,
                last=max(self._numbers, default=0),
            )
        return self._keeper

    @property
    def starting(self) -> bool:
        """Whether leases are kept by a keeper that is not there yet."""
        return self._again_at is not None or (self._keeper is not None and not self._up)

    def keep(self, lease: Lease) -> None:
        self.keeper().keep(lease)

    def forget(self, lease: Lease) -> None:
        if self._keeper is not None:
            self._keeper.forget(lease)

    def join(self, consumed: Consumed) -> None:
        """Becomes a consumer of the queue's shared streams, and takes part in its shards."""
        queue = consumed.queue
        if queue.declared:
            queue.refresh()
        else:
            queue.shape()  # after a flush this makes all streams again that were made before
        queue.open(SHARED)
        for priority in queue.priorities:
            if priority not in consumed.streams:
                queue.open(shared(priority))
                names = queue.shard_keys(shared(priority))
                alive = queue.keys.alive(GROUP, names, cluster=self._broker.is_cluster)
                lease = join_shared(
                    self._links.at(names.stream), names, GROUP, self._incarnation, self._options.lease_ms, alive=alive
                )
                consumer = StreamConsumer(lease, queue.name, shared(priority), self.settings, self._links)
                consumer.arrivals.reading = Read(self, lease)
                consumer.recover(takeover=False)
                consumed.streams[priority] = consumer
        consumed.streams = dict(sorted(consumed.streams.items()))
        for consumer in consumed.streams.values():
            self.keep(consumer.lease)  # again, where it was to run out
        if not consumed.in_keeper:
            consumed.in_keeper = True
            self._tell(consumed)
        consumed.notified = True

    def end(self, consumed: Consumed, priority: int) -> None:
        """Ends the lease of a shared stream, of which nothing is held any more."""
        consumer = consumed.streams.pop(priority)
        lease = consumer.lease
        self.forget(lease)
        link = consumer.fence.link
        reap(link, lease.keys, GROUP, lease.incarnation, lease.lease_ms, gone=True, alive=lease.alive)

    def leave(self, consumed: Consumed) -> None:
        """Gives a queue's shards away."""
        if consumed.in_keeper and self._keeper is not None:
            self._keeper.cancel(consumed.queue.name)
            self._keeper.touch(consumed.queue.name, 0)
        consumed.in_keeper = False

    def _tell(self, consumed: Consumed, owned: Iterable[Own] = ()) -> None:
        name = consumed.queue.name
        self.keeper().consume(name, owned)
        touched = self._touched.get(name)
        self.keeper().touch(name, touched.expires_ms if touched else 0)

    def receives(self, lease: Lease | None, entry_id: bytes = b"") -> None:
        """From now on the death of this process is counted of one message, by the keeper; None: it was received."""
        if self._keeper is not None:
            slot = self._keeper.memory.slot(0)
            if lease is None:
                slot.clear()
            else:
                slot.begin(lease.token, [entry_id])

    def reads(self, lease: Lease, entry_id: bytes | None) -> None:
        """As ``receives``, of an entry that is read; None when it has been."""
        if self._keeper is not None:
            reading = self._keeper.memory.reading(lease.token)
            if entry_id is None:
                reading.end()
            else:
                reading.begin(entry_id)

    def trusted_until(self, consumer: StreamConsumer) -> float:
        """Until when (monotonic) the keeper vouches for a shard, also one that is cut off or dead since. From any thread."""
        keeper = self._keeper
        return 0.0 if keeper is None or consumer.backlog.number < 0 else keeper.trusted[consumer.backlog.number]

    def close(self) -> None:
        if self._keeper is not None:
            self._keeper.close()
            self._keeper = None

    # What the keeper tells

    def receive_orders(self) -> Told | None:
        """Does what the keeper says: shards come and go. None where it has said nothing."""
        if self._keeper is None:
            return None
        try:
            orders = self._keeper.orders()
        except StreamTaskError as exc:
            log.warning("the keeper of the leases ended, another is started: %s", exc)
            self._keeper = None
            self._again_at = self._started + KEEPER_PAUSE_S
            self.restart_keeper()
            return None
        if not orders:
            return None
        for order in orders:
            match order:
                case Up():
                    self._up = True
                case Own():
                    self._own(order)
                case Release(number):
                    self._release(number)
                case Resume(number):
                    self._resume(number)
                case Lost(number):
                    self._lost(number)
                case LostShared():
                    self._lost_shared(order)
        told = Told(self._came, self._going)
        self._came, self._going = False, []
        return told

    def restart_keeper(self) -> None:
        """Starts a keeper in the place of one that died, when it is time, and tells it all that it has to know."""
        if self._again_at is None or mono_s() < self._again_at:
            return
        self._again_at = None
        for consumed in self._consumed.values():
            for consumer in consumed.streams.values():
                self.keep(consumer.lease)
            if consumed.in_keeper:
                numbers = [number for number, (of, _) in self._numbers.items() if of is consumed]
                self._tell(consumed, [self._told[number] for number in numbers if number in self._told])

    def _own(self, order: Own) -> None:
        number, shard = order.number, int(order.shard)
        consumed = self._consumed.get(order.queue)
        if consumed is None or not consumed.users:
            self.keeper().released(number)
            return
        for other, (of, at) in list(self._numbers.items()):
            if of is consumed and at == shard:
                del self._numbers[other]
                self.releasing.discard(other)
        self._numbers[number] = consumed, shard
        self._told = {known: told for known, told in self._told.items() if known in self._numbers}
        self._told[number] = order
        names = consumed.queue.keys.shard(order.epoch, shard)
        lease = Lease(names, GROUP, self._incarnation, self._options.lease_ms, False, order.token, 0.0, order.by_expiry)
        held = consumed.shards.get(shard)
        if held is not None and held.lease.token == lease.token:
            held.backlog.closing = False  # told again by a new keeper
            held.backlog.number = number
            return
        if held is not None:
            self._tell_lost(held, None)
        consumer = StreamConsumer(lease, consumed.queue.name, shard, self.settings, self._links)
        consumer.backlog.number = number
        consumer.arrivals.reading = Read(self, lease)
        consumer.fence.needs_audit = True  # the pending entries come first
        consumer.taken_over = True
        consumed.shards[shard] = consumer
        consumed.notified = True
        self._came = True

    def _release(self, number: int) -> None:
        found = self._numbers.get(number)
        if found is None:
            self.keeper().released(number)
            return
        consumed, shard = found
        consumed.shards[shard].backlog.closing = True
        self.releasing.add(number)
        self._going.append(consumed.shards[shard])

    def _resume(self, number: int) -> None:
        self.releasing.discard(number)
        found = self._numbers.get(number)
        if found is not None and found[1] in found[0].shards:
            found[0].shards[found[1]].backlog.closing = False
            found[0].notified = True

    def _lost_shared(self, order: LostShared) -> None:
        """Unless the lease has been replaced meanwhile."""
        for consumed in self._consumed.values():
            for consumer in consumed.streams.values():
                lease = consumer.lease
                if lease.keys.prefix == order.prefix and lease.token == order.token:
                    self._tell_lost(consumer, f"the lease of {order.prefix} ran out")
                    return

    def end_releases(self) -> None:
        """Gives away the shards that are to go, as soon as nothing of them is worked on or unsettled."""
        for number in list(self.releasing):
            consumed, shard = self._numbers[number]
            consumer = consumed.shards[shard]
            if not consumer.settler.idle() or consumer.has_something_to_write():
                continue
            self.releasing.discard(number)
            del self._numbers[number]
            del consumed.shards[shard]
            self.keeper().released(number)

    def lost(self, consumer: StreamConsumer) -> None:
        """A call was refused: the shard is another's, or its record is gone. The keeper takes part anew."""
        for number, (consumed, shard) in list(self._numbers.items()):
            if consumed.shards.get(shard) is consumer:
                self.keeper().released(number)
                self._lost(number)

    def _lost(self, number: int) -> None:
        found = self._numbers.pop(number, None)
        self.releasing.discard(number)
        if found is not None and found[1] in found[0].shards:
            consumer = found[0].shards.pop(found[1])
            self._tell_lost(consumer, f"shard {found[1]} of queue {found[0].queue.name!r} is another's")
