"""What this process holds of a broker's queues: its leases, what was delivered to it, and what of that has ended.

One session per process and broker, shared by all of its kombu connections: deliveries belong to the process' lease and not
to a channel, so an ack on a closed channel still settles, and a message that is worked on while the connection breaks is
not delivered again. All methods may be called from any thread.

The keeper, a process beside this one, renews the leases, also while a body holds Python's lock, and gives them back at once
when this process dies.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..clock import mono_s, wall_ms
from ..coordination.lease import Lease, join_shared, reap
from ..errors import BrokerUnavailable, LeaseLost, StreamTaskError
from ..queue.consumer import Batch, ConsumerSettings
from ..queue.lanes import Delivery
from ..queue.producer import Producer
from ..redis import keys, wire
from ..redis.connection import Broker
from ..redis.keys import SHARED
from ..redis.link import LARGE, REPLIES, Link, ReplyError
from ..redis.scripts import Code, script
from ..worker.keeper import Keeper
from . import hooks
from .consumer import StreamConsumer
from .ids import ProduceIds
from .message import DELIVERY, decode, expired
from .options import Options
from .queues import GROUP, KombuQueue, shared

log = logging.getLogger("streamtask.transport")

LOOK_S = 0.005
"""How often Redis is asked for more while what was read before is enough to go on with."""

KEEPER_PAUSE_S = 1.0
"""Between two starts of a keeper, where it keeps dying."""

SHARD_READ = 100
"""Messages of an owned shard that are read with one call: nobody else may run them, so reading ahead keeps nothing from
anybody."""


@dataclass(slots=True)
class Handed:
    """A delivery that was handed to a channel."""

    tag: str
    consumer: StreamConsumer
    batch: Batch
    queue: str


class Consumed:
    """A queue that this process takes messages from."""

    def __init__(self, queue: KombuQueue) -> None:
        self.queue = queue
        # Channels that consume it; True: without acknowledging. Weak: one that nobody closed must not hold messages.
        self.users: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        self.streams: dict[int, StreamConsumer] = {}  # shared streams by priority, the most urgent first
        self.shards: dict[int, StreamConsumer] = {}  # by shard
        self.positions: dict[str, list[str]] = {}  # last delivered id and newest wake id, by stream's prefix
        self.next_due: float | None = None
        self.in_keeper = False
        self.rung = True  # there may be something to read
        self.look_at = 0.0
        self.shards_first = False

    def takes_for_good(self) -> bool:
        """Nobody here acknowledges, and no order has to be kept: no lease is needed then."""
        return bool(self.users) and all(self.users.values()) and not self.streams and not self.queue.keyed

    def consumers(self) -> Iterable[StreamConsumer]:
        yield from self.streams.values()
        yield from self.shards.values()


class Session:
    """See the module."""

    def __init__(self, broker: Broker, options: Options) -> None:
        self.broker = broker
        self.options = options
        self.producer = Producer(options.producer_settings())
        self.queues: dict[str, KombuQueue] = {}
        self.fanout_queues: dict[str, tuple[str, str]] = {}
        """Queues that are bound to a fanout exchange: the exchange and the routing key."""
        self.touched: dict[str, int] = {}
        """Queues with ``x-expires``, ms."""
        self.wakers: weakref.WeakSet[Any] = (
            weakref.WeakSet()
        )  # pollers that may sleep while there is something for them
        self._settings = ConsumerSettings(group=GROUP, fetch_count=SHARD_READ)
        self.begin()

    def begin(self) -> None:
        """Holds nothing yet: at first, and in a forked child, which must neither write on its parent's sockets nor settle
        what was delivered to its parent."""
        self.pid = os.getpid()
        self.lock = threading.RLock()
        self.incarnation = uuid.uuid4().hex[:16]
        self.consumed: dict[str, Consumed] = {}
        self.handed: dict[str, Handed] = {}
        self.epoch = getattr(self, "epoch", 0) + 1
        """Grows when leases were lost: what was delivered before is others' now."""
        self.listened: set[str] = set()
        """Queues of fanout exchanges that somebody here listens to."""
        self._touch_at: dict[str, float] = {}
        self._upkeep_at = 0.0
        self.produce_ids = ProduceIds()
        self._link = self.broker.link(buffer_bytes=LARGE)
        self._idle: list[Link] = []
        self._keeper: Keeper | None = None
        self._keeper_started = 0.0
        self._keeper_again_at: float | None = None
        self._numbers: dict[int, tuple[Consumed, int]] = {}  # the keeper's numbers of shards
        self._releasing: set[int] = set()
        self.new_tag: Callable[[], str] = _tags().__next__

    def check_process(self) -> None:
        """Where a server forks without Python's hooks (uWSGI), two processes must not draw the same ids."""
        if os.getpid() != self.pid:
            _after_fork()

    # Queues

    def queue(self, name: str) -> KombuQueue:
        found = self.queues.get(name)
        if found is None:
            options = self.options
            found = self.queues.setdefault(
                name, KombuQueue(self.broker, options.namespace, options.app, name, options.shards, self.borrow)
            )
        return found

    @contextmanager
    def borrow(self, key: str = "") -> Iterator[Link]:
        """A link to the server of a key, for calls that need not wait for this session's lock."""
        if self.broker.is_cluster:
            link = self.broker.link(key)
            try:
                yield link
            finally:
                link.close()
            return
        try:
            link = self._idle.pop()
        except IndexError:
            link = self.broker.link()
        try:
            yield link
        except BaseException as exc:
            if not isinstance(exc, REPLIES):
                link.close()
            raise
        finally:
            self._idle.append(link)

    def run(self, name: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Calls a script once more if its connection turns out to be stale: for scripts that may be repeated."""
        return self.once_more(lambda link: link.run(name, keys, args), keys[0])

    def once_more(self, call: Callable[[Link], Any], key: str = "") -> Any:
        try:
            with self.borrow(key) as link:
                return call(link)
        except BrokerUnavailable:
            for link in self._idle:
                link.close()
            with self.borrow(key) as link:
                return call(link)

    def look(self) -> None:
        """Looks whether Redis answers. Connections that are kept may be stale, which says nothing about the server: a new
        kombu connection must not find that out. Raises ``BrokerUnavailable``."""
        self.once_more(lambda link: link.command("PING"))
        with self.lock:
            if self._link.connected:
                try:
                    self._link.command("PING")
                except BrokerUnavailable:
                    self._outage()

    def consume(self, name: str, user: Any, *, no_ack: bool = False) -> None:
        """A channel begins to take messages of a queue. ``no_ack``: it will not acknowledge any."""
        with self.lock:
            consumed = self.consumed.get(name) or Consumed(self.queue(name))
            self.consumed[name] = consumed
            consumed.users[user] = no_ack
            self._consumed(name)

    def cancel(self, name: str, user: Any) -> None:
        """A channel takes no more messages of a queue; what it was given stays its own until it is acknowledged."""
        with self.lock:
            consumed = self.consumed.get(name)
            if consumed is None:
                return
            consumed.users.pop(user, None)
            if not consumed.users:
                self._leave(consumed)

    def _consumed(self, name: str) -> Consumed:
        consumed = self.consumed.get(name)
        if consumed is None:
            consumed = self.consumed[name] = Consumed(self.queue(name))
        if consumed.takes_for_good():
            if SHARED not in consumed.queue.opened:
                consumed.queue.open(SHARED)
        elif not consumed.streams:
            self._join(consumed)
        return consumed

    def _join(self, consumed: Consumed) -> None:
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
                lease = join_shared(
                    self._link, queue.shard_keys(shared(priority)), GROUP, self.incarnation, self.options.lease_ms
                )
                consumer = StreamConsumer(lease, queue.name, shared(priority), self._settings)
                consumer.recover(self._link, takeover=False)
                consumed.streams[priority] = consumer
                self.keeper().keep(lease)
        consumed.streams = dict(sorted(consumed.streams.items()))
        if not consumed.in_keeper:
            consumed.in_keeper = True
            self.keeper().consume(queue.name, self.options.shards)
            self.keeper().touch(queue.name, self.touched.get(queue.name, 0))
        consumed.rung = True

    def _leave(self, consumed: Consumed) -> None:
        """Ends the leases of a queue that nobody here consumes, as far as nothing of it is still worked on."""
        if consumed.in_keeper and self._keeper is not None:
            consumed.in_keeper = False
            self._keeper.cancel(consumed.queue.name)
            self._keeper.touch(consumed.queue.name, 0)
        for consumer in consumed.consumers():
            if consumer.lease.shared:
                consumer.give_back_all()
        try:
            self.flush()
            for priority, consumer in list(consumed.streams.items()):
                if consumer.idle() and not consumer.handed:
                    self._end_stream(consumed, priority, consumer)
        except StreamTaskError as exc:
            log.info("a consumer could not be ended now: %s", exc)
            for consumer in consumed.streams.values():
                if consumer.idle() and self._keeper is not None:
                    self._keeper.forget(consumer.lease)
        if not consumed.streams and not consumed.shards:
            self.consumed.pop(consumed.queue.name, None)

    def _end_stream(self, consumed: Consumed, priority: int, consumer: StreamConsumer) -> None:
        lease = consumer.lease
        if self._keeper is not None:
            self._keeper.forget(lease)
        del consumed.streams[priority]
        reap(self._link, lease.keys, GROUP, lease.incarnation, lease.lease_ms, gone=True)

    def drop_queue(self, name: str) -> None:
        """The queue was deleted: what was read of it is no longer there."""
        with self.lock:
            consumed = self.consumed.pop(name, None)
            self.queues.pop(name, None)
            if consumed is not None:
                for user in list(consumed.users):
                    user.queue_gone(name)
                self._forget(consumed)

    def _forget(self, consumed: Consumed) -> None:
        for consumer in consumed.consumers():
            self._forget_deliveries(consumer)
            if consumer.lease.shared and self._keeper is not None:
                self._keeper.forget(consumer.lease)
        if consumed.in_keeper and self._keeper is not None:
            self._keeper.cancel(consumed.queue.name)
            self._keeper.touch(consumed.queue.name, 0)

    def _forget_deliveries(self, consumer: StreamConsumer) -> None:
        for tag in [tag for tag, handed in self.handed.items() if handed.consumer is consumer]:
            del self.handed[tag]

    # The keeper

    def keeper(self) -> Keeper:
        if self._keeper is None:
            options = self.options
            self._keeper_started = mono_s()
            self._keeper = Keeper(
                self.broker,
                namespace=options.namespace,
                app=options.app,
                group=GROUP,
                incarnation=self.incarnation,
                lease_ms=options.lease_ms,
                handover_timeout_s=options.handover_timeout_s,
            )
        return self._keeper

    def keeper_fd(self) -> int:
        return -1 if self._keeper is None else self._keeper.fileno()

    def keeper_stamp(self) -> object:
        """Tells one keeper's socket from another's."""
        return id(self._keeper)

    def take_orders(self) -> None:
        """Does what the keeper says: shards come and go. Raises ``LeaseLost`` where leases were lost."""
        with self.lock:
            if self._keeper is None:
                return
            try:
                orders = self._keeper.orders()
            except StreamTaskError as exc:
                log.warning("the keeper of the leases ended, another is started: %s", exc)
                self._restart_keeper()
                return
            for order in orders:
                op = order["op"]
                if op == "own":
                    self._own(order)
                elif op == "release":
                    self._release(order["number"])
                elif op == "resume":
                    self._resume(order["number"])
                elif op == "lost":
                    self._lost_shard(order["number"])
                elif op == "lost_shared":
                    self._lost(f"the lease of {order['prefix']} ran out")

    def _restart_keeper(self) -> None:
        self._keeper = None
        if mono_s() < self._keeper_started + KEEPER_PAUSE_S:
            self._keeper_again_at = self._keeper_started + KEEPER_PAUSE_S
            return
        self._tell_keeper()

    def _tell_keeper(self) -> None:
        """Starts a keeper and tells it all that it has to know."""
        self._keeper_again_at = None
        self._numbers = {}
        self._releasing = set()
        for consumed in self.consumed.values():
            for consumer in consumed.streams.values():
                self.keeper().keep(consumer.lease)
            if consumed.in_keeper:
                self.keeper().consume(consumed.queue.name, self.options.shards)
                self.keeper().touch(consumed.queue.name, self.touched.get(consumed.queue.name, 0))

    def _own(self, order: dict[str, Any]) -> None:
        consumed = self.consumed.get(order["queue"])
        if consumed is None or not consumed.users:
            self.keeper().released(order["number"])
            return
        shard, number = int(order["shard"]), int(order["number"])
        for other, (of, at) in list(self._numbers.items()):
            if of is consumed and at == shard:
                del self._numbers[other]
        self._numbers[number] = consumed, shard
        names = consumed.queue.keys.shard(int(order["epoch"]), shard)
        token, by_expiry = int(order["token"]), bool(order["by_expiry"])
        lease = Lease(names, GROUP, self.incarnation, self.options.lease_ms, False, token, 0.0, by_expiry)
        held = consumed.shards.get(shard)
        if held is not None and held.lease.token == lease.token:
            held.closing = False  # told again by a new keeper
            return
        if held is not None:
            self._forget_deliveries(held)
        consumer = StreamConsumer(lease, consumed.queue.name, shard, self._settings)
        consumer.needs_audit = True  # the pending entries come first
        consumer.taken_over = True
        consumed.shards[shard] = consumer
        consumed.rung = True
        self._wake()

    def _release(self, number: int) -> None:
        found = self._numbers.get(number)
        if found is None:
            self.keeper().released(number)
            return
        consumed, shard = found
        consumed.shards[shard].closing = True
        self._releasing.add(number)
        self._end_releases()

    def _resume(self, number: int) -> None:
        self._releasing.discard(number)
        found = self._numbers.get(number)
        if found is not None and found[1] in found[0].shards:
            found[0].shards[found[1]].closing = False
            found[0].rung = True

    def _end_releases(self) -> None:
        """Gives away the shards that are to go, as soon as nothing of them is worked on or unsettled."""
        for number in list(self._releasing):
            consumed, shard = self._numbers[number]
            consumer = consumed.shards[shard]
            if consumer.handed or not consumer.idle():
                continue
            self._releasing.discard(number)
            del self._numbers[number]
            del consumed.shards[shard]
            self.keeper().released(number)
            if not consumed.users and not consumed.streams and not consumed.shards:
                self.consumed.pop(consumed.queue.name, None)

    def _lost_shard(self, number: int) -> None:
        found = self._numbers.pop(number, None)
        self._releasing.discard(number)
        if found is not None and found[1] in found[0].shards:
            consumer = found[0].shards.pop(found[1])
            self._forget_deliveries(consumer)
            self._say_lost(f"shard {found[1]} of queue {found[0].queue.name!r} is another's")

    def _lost(self, why: str) -> None:
        """Leases of shared streams ran out, or their records are gone: what was delivered is others'. Begins anew."""
        for consumed in self.consumed.values():
            for consumer in consumed.streams.values():
                self._forget_deliveries(consumer)
                if self._keeper is not None:
                    self._keeper.forget(consumer.lease)
            consumed.streams = {}
            consumed.queue.forget()
        self._say_lost(why)

    def _say_lost(self, why: str) -> None:
        self.epoch += 1
        self._wake()
        log.error("messages that were delivered to this process are others' now: %s", why)

    # Taking messages

    def fetch(self, name: str, most: int) -> list[tuple[dict[str, Any], str]]:
        """Up to ``most`` messages of a queue, as (payload, delivery tag). Raises ``BrokerUnavailable``, ``LeaseLost``."""
        with self.lock:
            try:
                consumed = self._consumed(name)
                if consumed.takes_for_good():
                    return self._take(consumed, most)
                # Shards and shared streams both get their turn, also while one of them alone could fill the room.
                looked = mono_s() >= consumed.look_at
                if looked:
                    self._read(consumed, most)
                out = self._hand_out(consumed, most)
                if len(out) < most and not looked:
                    self._read(consumed, most - len(out))
                    out += self._hand_out(consumed, most - len(out))
                return out
            except BrokerUnavailable:
                self._outage()
                raise
            except LeaseLost as exc:
                self._lost(str(exc))
                raise
            except ReplyError as exc:
                if exc.code != "NOGROUP":
                    raise
                self._lost(f"the stream is gone: {exc}")
                raise LeaseLost(str(exc)) from None

    def _outage(self) -> None:
        """Replies may have been lost with messages in them."""
        self._link.close()
        for consumed in self.consumed.values():
            consumed.rung = True
            for consumer in consumed.consumers():
                consumer.needs_audit = True

    def _read(self, consumed: Consumed, most: int) -> None:
        """Reads from Redis what there is into the consumers, and settles what has ended, in one round trip."""
        link = self._link
        for consumer in list(consumed.consumers()):
            if consumer.needs_audit:
                consumer.recover(link, takeover=consumer.taken_over)
                consumer.taken_over = False
                consumer.read_at = 0.0
        now = mono_s()
        consumed.rung = False
        consumed.look_at = now + LOOK_S
        settling = [c for c in consumed.consumers() if c.finished and not c.settling]
        packed = [c.begin_settle() for c in settling]
        streams = list(consumed.streams.values())
        packed.append(self._pack_shared(streams, max(0, most - sum(len(c.buffer) for c in streams))))
        shards = [c for c in consumed.shards.values() if not c.closing]
        readable = [c for c in shards if now >= c.read_at and c.has_room()]
        packed += [c.pack_read(SHARD_READ) for c in readable]
        try:
            replies = self._pipeline(packed)
        except BaseException:
            for consumer in settling:
                consumer.settle_lost()
            raise
        for consumer, reply in zip(settling, replies, strict=False):
            self._settled(consumed, consumer, reply)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        self._take_shared(consumed, streams, replies[len(settling)])
        for consumer, reply in zip(readable, replies[len(settling) + 1 :], strict=True):
            if reply == Code.LEASE_LOST:
                self._lost_consumer(consumed, consumer, f"shard {consumer.shard} of a queue is another's")
                continue
            consumer.was_read(len(reply) >= SHARD_READ, bool(reply), now)
            if reply:
                consumer.absorb(link, reply)
        for consumer in shards:
            if consumer.woken or (consumer.next_due is not None and now >= consumer.next_due):
                consumer.woken = False
                consumer.move_due(link)
                consumer.read_at = 0.0
                consumed.rung = True

    def _settled(self, consumed: Consumed, consumer: StreamConsumer, reply: Any) -> None:
        if isinstance(reply, Exception):
            consumer.settle_lost()
            return
        try:
            consumer.end_settle(reply)
        except LeaseLost as exc:
            self._lost_consumer(consumed, consumer, str(exc))

    def _pack_shared(self, streams: Sequence[StreamConsumer], room: int) -> bytes:
        names: list[str] = []
        for consumer in streams:
            keys_of = consumer.keys
            names += [consumer.lease.key, keys_of.stream, keys_of.requeued, keys_of.delayed, keys_of.wake]
        tokens = [consumer.lease.token for consumer in streams]
        return script("fetch_shared").pack(tuple(names), (self.incarnation, GROUP, room, *tokens))

    def _take_shared(self, consumed: Consumed, streams: Sequence[StreamConsumer], reply: Any) -> None:
        now_ms, *parts = reply
        due_at: list[int] = []
        woken = False
        for consumer, part in zip(streams, parts, strict=True):
            if part == 0:
                raise LeaseLost(f"the lease of {consumer.keys.prefix} ran out and is another's, or is gone")
            last, rung, next_ms, again, fresh = part
            position = [last.decode(), rung.decode()]
            before = consumed.positions.get(consumer.keys.prefix)
            woken = woken or before is None or before[1] != position[1]
            consumed.positions[consumer.keys.prefix] = position
            consumer.clock_ms = int(now_ms) - wall_ms()
            if next_ms >= 0:
                due_at.append(int(next_ms))
            if fresh:
                consumer.absorb(self._link, fresh)
            if again:
                consumer.absorb_again(again)
        if any(consumer.buffer for consumer in streams):
            consumed.rung = True
        if woken:
            # Something else than a message may have come: a stream of another priority.
            consumed.queue.recorded()
            if set(consumed.queue.priorities) != set(consumed.streams):
                self._join(consumed)
        consumed.next_due = None if not due_at else mono_s() + max(0, min(due_at) - int(now_ms)) / 1000

    def _pipeline(self, packed: Sequence[bytes]) -> list[Any]:
        if len(packed) > 1:
            return self._link.pipeline(packed)
        return [self._link.call(packed[0])]

    def _hand_out(self, consumed: Consumed, most: int) -> list[tuple[dict[str, Any], str]]:
        out: list[tuple[dict[str, Any], str]] = []
        now = mono_s()
        groups = [list(consumed.streams.values()), list(consumed.shards.values())]
        if consumed.shards_first:
            groups.reverse()
        consumed.shards_first = not consumed.shards_first
        for consumer in (c for group in groups for c in group):
            consumer.lanes.open_due(now)
            while len(out) < most and consumer.has_work():
                batches = consumer.take_free(self._link, most - len(out))
                if not batches:
                    break
                for batch in batches:
                    handed = self._handed(consumed, consumer, batch)
                    if handed is not None:
                        out.append(handed)
        return out

    def _handed(self, consumed: Consumed, consumer: StreamConsumer, batch: Batch) -> tuple[dict[str, Any], str] | None:
        delivery = batch.deliveries[0]
        if not delivery.fresh and not consumer.lease.shared:
            following = consumer.replaced(self._link, batch)
            if following is None:
                return None
            delivery = following
        payload = decode(delivery)
        if expired(payload, delivery.entry_id, consumer.redis_ms()):
            consumer.end(batch)
            return None
        tag = self.new_tag()
        properties, headers = payload["properties"], payload["headers"]
        properties["delivery_tag"] = tag
        info = properties.setdefault("delivery_info", {})
        if not delivery.fresh:
            headers["redelivered"] = info["redelivered"] = True
        if not consumer.lease.shared:
            headers[DELIVERY] = {
                "queue": consumed.queue.name,
                "epoch": consumed.queue.shape().epoch,
                "shard": consumer.shard,
                "entry": delivery.entry_id.decode(),
                "token": consumer.lease.token,
                "generation": consumer.generation(delivery.entry_id),
                "tag": tag,
            }
        self.handed[tag] = Handed(tag, consumer, batch, consumed.queue.name)
        return payload, tag

    def look_again(self, name: str) -> None:
        """The next fetch asks Redis, whatever is known here."""
        consumed = self.consumed.get(name)
        if consumed is not None:
            consumed.rung = True

    def next_wake(self, names: Iterable[str]) -> float | None:
        """When (monotonic) the next message of these queues falls due, as far as is known here."""
        times: list[float] = []
        with self.lock:
            for name in names:
                consumed = self.consumed.get(name)
                if consumed is None:
                    continue
                if consumed.next_due is not None:
                    times.append(consumed.next_due)
                for consumer in consumed.shards.values():
                    due = consumer.lanes.next_due()
                    times += [at for at in (due, consumer.next_due) if at is not None]
        return min(times, default=None)

    def ready(self, name: str) -> bool:
        """Whether there may be something to take of a queue."""
        consumed = self.consumed.get(name)
        if consumed is None or consumed.rung:
            return True
        now = mono_s()
        if consumed.next_due is not None and now >= consumed.next_due:
            return True
        return any(consumer.may_have(now) for consumer in consumed.consumers())

    def bell(self, names: Iterable[str]) -> dict[bytes, tuple[str, str]]:
        """The streams to wait for, as {key: (queue, id after which something is new)}."""
        with self.lock:
            found: dict[bytes, tuple[str, str]] = {}
            for name in names:
                consumed = self.consumed.get(name)
                if consumed is None:
                    continue
                for priority in consumed.streams or consumed.queue.priorities:
                    names_of = consumed.queue.shard_keys(shared(priority))
                    last, wake = consumed.positions.get(names_of.prefix, ["0-0", "0-0"])
                    found[names_of.stream.encode()] = (name, last)
                    found[names_of.wake.encode()] = (name, wake)
                for consumer in consumed.shards.values():
                    if not consumer.closing:
                        found[consumer.keys.stream.encode()] = (name, consumer.last_id)
                        found[consumer.keys.wake.encode()] = (name, consumer.wake_id)
            return found

    def rang(self, reply: Any, asked: dict[bytes, tuple[str, str]]) -> None:
        """Takes the answer to the bell's XREAD."""
        with self.lock:
            for key, entries in reply or ():
                name = asked.get(bytes(key), ("", ""))[0]
                consumed = self.consumed.get(name)
                if consumed is None:
                    continue
                consumed.rung = True
                for consumer in consumed.shards.values():
                    if consumer.keys.stream.encode() == key:
                        consumer.read_at = 0.0
                    if consumer.keys.wake.encode() == key:
                        consumer.wake_id = entries[-1][0].decode()
                        consumer.woken = True

    # Ends of messages

    def ack(self, tag: str) -> bool:
        """A message has ended; False where this process does not hold it (any more)."""
        with self.lock:
            handed = self.handed.pop(tag, None)
            if handed is None:
                return False
            handed.consumer.end(handed.batch)
            return True

    def reject(self, tag: str, requeue: bool) -> bool:
        with self.lock:
            handed = self.handed.pop(tag, None)
            if handed is None:
                return False
            if requeue:
                handed.consumer.give_back(handed.batch)
            else:
                handed.consumer.reject(handed.batch)
            return True

    def restore(self, tags: Iterable[str]) -> None:
        """A channel closes: what it was given and has not acknowledged is delivered again, but for what is worked on."""
        with self.lock:
            left = [tag for tag in tags if tag in self.handed]
            kept: set[str] = set()
            for ask in hooks.keep_on_close:
                kept.update(ask(left))
            for tag in left:
                if tag not in kept:
                    handed = self.handed.pop(tag)
                    handed.consumer.give_back(handed.batch)

    def has_to_flush(self) -> bool:
        return any(c.has_to_flush() for consumed in self.consumed.values() for c in consumed.consumers())

    def flush(self) -> None:
        """Writes what has ended. Raises ``BrokerUnavailable``: then it is written later."""
        with self.lock:
            if self._keeper is not None:
                self.take_orders()
            for consumed in list(self.consumed.values()):
                for consumer in list(consumed.consumers()):
                    if consumer.has_to_flush():
                        self._flush(consumed, consumer)
            self._end_releases()
            for consumed in list(self.consumed.values()):
                if not consumed.users:
                    self._end_idle(consumed)

    def _flush(self, consumed: Consumed, consumer: StreamConsumer) -> None:
        try:
            consumer.flush(self._link)
        except BrokerUnavailable:
            self._outage()
            raise
        except (LeaseLost, ReplyError) as exc:
            if isinstance(exc, ReplyError) and exc.code != "NOGROUP":
                raise
            self._lost_consumer(consumed, consumer, str(exc))
        if consumer.lanes.has_ready() or consumer.lanes.next_due() is not None:
            consumed.rung = True

    def _lost_consumer(self, consumed: Consumed, consumer: StreamConsumer, why: str) -> None:
        if consumer.lease.shared:
            self._lost(why)
            return
        for number, (of, shard) in list(self._numbers.items()):
            if of is consumed and shard == consumer.shard:
                self.keeper().released(number)
                self._lost_shard(number)

    def _end_idle(self, consumed: Consumed) -> None:
        """Of a queue that nobody here consumes any more: the last of it was acknowledged."""
        for priority, consumer in list(consumed.streams.items()):
            if not consumed.in_keeper and consumer.idle() and not consumer.handed and not consumer.has_to_flush():
                self._end_stream(consumed, priority, consumer)
        if not consumed.streams and not consumed.shards:
            self.consumed.pop(consumed.queue.name, None)

    def still_ours(self, delivery: dict[str, Any]) -> bool:
        """Whether a keyed delivery may start: it was not given back, nor is its shard another's."""
        return str(delivery.get("tag")) in self.handed

    def _take(self, consumed: Consumed, most: int) -> list[tuple[dict[str, Any], str]]:
        """Takes messages for good: their consumer will not acknowledge them."""
        queue = consumed.queue
        out: list[tuple[dict[str, Any], str]] = []
        consumed.rung = False
        due_at: list[float] = []
        for priority in queue.priorities:
            queue.open(shared(priority))
            names = queue.shard_keys(shared(priority))
            now_ms, last, rung, next_ms, entries = self._link.run(
                "take",
                [names.stream, names.requeued, names.delayed, names.state, names.wake],
                [GROUP, most - len(out)],
            )
            position = [last.decode(), rung.decode()]
            before = consumed.positions.get(names.prefix)
            if before is None or before[1] != position[1]:
                queue.refresh()
            consumed.positions[names.prefix] = position
            if next_ms >= 0:
                due_at.append(mono_s() + max(0, int(next_ms) - int(now_ms)) / 1000)
            for entry_id, fields in entries:
                try:
                    payload = decode(Delivery(entry_id, wire.decode(fields)))
                except Exception as exc:
                    log.error("junk in queue %s is left out: %s", queue.name, exc)
                    continue
                if not expired(payload, entry_id, int(now_ms)):
                    tag = self.new_tag()
                    payload["properties"]["delivery_tag"] = tag
                    payload["properties"].setdefault("delivery_info", {})
                    out.append((payload, tag))
            if len(out) >= most:
                consumed.rung = True
                break
        consumed.next_due = min(due_at, default=None)
        return out

    def upkeep(self) -> None:
        """What is to be done from time to time: to be called often, costs next to nothing."""
        now = mono_s()
        if self._keeper_again_at is not None and now >= self._keeper_again_at:
            with self.lock:
                self._tell_keeper()
        if now < self._upkeep_at:
            return
        self._upkeep_at = now + 1.0
        for name, expires_ms in list(self.touched.items()):
            if now >= self._touch_at.get(name, 0.0) and (name in self.consumed or name in self.listened):
                self._touch_at[name] = now + expires_ms / 3000
                self.touch(name, expires_ms)

    def touch(self, name: str, expires_ms: int) -> None:
        """A queue with ``x-expires`` is in use."""
        key = keys.expiring(self.options.namespace, self.options.app)

        def prolong(link: Link) -> None:
            seconds, micros = link.command("TIME")
            link.command("ZADD", key, "XX", int(seconds) * 1000 + int(micros) // 1000 + expires_ms, name)

        self.once_more(prolong, key)

    def add_waker(self, waker: Any) -> None:
        self.wakers.add(waker)

    def _wake(self) -> None:
        for waker in list(self.wakers):
            waker.wake()

    def close_if_idle(self) -> None:
        """Ends the keeper of a process that consumes nothing more."""
        with self.lock:
            if not self.consumed and self._keeper is not None:
                self._keeper.close()
                self._keeper = None


def _tags() -> Iterator[str]:
    prefix = uuid.uuid4().hex[:12]
    number = 0
    while True:
        number += 1
        yield f"{prefix}.{number}"


_sessions: dict[tuple[Any, ...], Session] = {}
_sessions_lock = threading.Lock()


def session_of(broker: Broker, options: Options) -> Session:
    """The session of this process for a broker, made at its first use."""
    key = (os.getpid(), broker.url, tuple(sorted(map(str, broker.options.items()))), options)
    with _sessions_lock:
        found = _sessions.get(key)
        if found is None:
            found = _sessions[key] = Session(broker, options)
            hooks.still_ours = _still_ours
        return found


def _still_ours(delivery: dict[str, Any]) -> bool:
    return any(session.still_ours(delivery) for session in list(_sessions.values()))


def _after_fork() -> None:
    global _sessions_lock
    _sessions_lock = threading.Lock()
    hooks.still_ours = None
    for key, session in list(_sessions.items()):
        # Connections that the child has inherited go on with it.
        del _sessions[key]
        here = (os.getpid(), *key[1:])
        _sessions[here] = session
        session.begin()
        for queue in session.queues.values():
            queue.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

__all__ = ["Session", "session_of"]
