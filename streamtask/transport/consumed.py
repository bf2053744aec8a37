"""A queue that this process consumes: its streams here, what is known of when there is something in them, how that is fetched
and handed out.

Fetching under a lease is one round trip, which settles what has ended and reads what there is, for all streams of the queue.
Where nobody acknowledges, and no order is to be kept, messages are fetched for good, without a lease.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..clock import mono_s
from ..errors import LeaseLost, ReplyError
from ..queue.arrivals import pack_fetch
from ..queue.backlog import Batch
from ..queue.delivery import Delivery, Entry
from ..redis import wire
from ..redis.keys import SHARED, ShardKeys
from ..redis.link import Link
from ..redis.links import Links
from ..redis.scripts import Code
from ..redis.wire import id_order
from ..text import logger, said, short
from .consumer import StreamConsumer
from .deliveries import Deliveries
from .message import DELIVERY, address, check, decode, expired
from .queues import GROUP, KombuQueue, shared
from .resting import Rest, is_of_one_key

log = logger("streamtask.transport")

LOOK_S = 0.005
"""How often Redis is asked for more while what was read before is enough to go on with."""

SHARD_READ = 100
"""Messages of an owned shard that are read with one call: nobody else may run them, so reading ahead keeps nothing from
anybody."""

Fetched = tuple[dict[str, Any], str]
"""A message as kombu has it, and its delivery tag."""


class Consumed:
    """See the module. Who made it guards it. ``broker`` is how pool processes are told where a shard is. ``lost`` is called
    where Redis says that a stream is another's, ``join`` where the queue has streams that are not consumed yet."""

    def __init__(
        self,
        queue: KombuQueue,
        links: Links,
        broker: str,
        deliveries: Deliveries,
        lost: Callable[[StreamConsumer, str], None],
        join: Callable[[Consumed], None],
    ) -> None:
        self.queue = queue
        self._links = links
        self._broker = broker
        self._deliveries = deliveries
        self._lost = lost
        self._join = join
        # Channels that consume it; True: without acknowledging. Weak: one that nobody closed must not hold messages.
        self.users: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        self.streams: dict[int, StreamConsumer] = {}  # shared streams by priority, the most urgent first
        self.shards: dict[int, StreamConsumer] = {}  # by shard
        self.positions: dict[str, tuple[str, str]] = {}  # last delivered id and newest wake id, by stream's prefix
        self.next_due: float | None = None  # of the shared streams' delayed messages, monotonic
        self.in_keeper = False
        self.gone = False  # deleted, and not declared again yet
        self.notified = True  # there may be something to read
        self.rest = Rest()
        self.look_at = 0.0
        self._shards_first = False
        self._left_out = 0  # messages that had expired

    def no_ack(self) -> bool:
        """Nobody here acknowledges, and no order has to be kept: no lease is needed then."""
        return bool(self.users) and all(self.users.values()) and not self.streams and not self.queue.keyed

    def consumers(self) -> Iterable[StreamConsumer]:
        yield from self.streams.values()
        yield from self.shards.values()

    def _moved(self, prefix: str, last: bytes, woken: bytes) -> bool:
        """Notes how far a shared stream was read, and its newest wake entry. True if that has come meanwhile, for whatever
        reason."""
        before = self.positions.get(prefix)
        self.positions[prefix] = last.decode(), woken.decode()
        return before is None or before[1] != woken.decode()

    def ready(self) -> bool:
        """Whether there may be something to fetch."""
        if self.gone or self.rest:
            return False
        if self.notified:
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
        self.notified = True
        for consumer in self.shards.values():
            if consumer.keys.stream.encode() == key:
                consumer.read_at = 0.0
            if consumer.keys.wake.encode() == key:
                consumer.arrivals.wake_id = last.decode()
                consumer.woken = True

    # Fetching

    def fetch(self, most: int) -> list[Fetched]:
        """Up to ``most`` messages."""
        if self.gone:
            return []
        if self.no_ack():
            return self._fetch_for_good(most)
        out: list[Fetched] = []
        try:
            # Shards and shared streams both get their turn, also while one of them alone could fill the room.
            if mono_s() >= self.look_at:
                self._read(most)
                looked = True
            else:
                looked = False
            self._hand_out(most, out)
            while len(out) < most and (not looked or self._left_out):
                self._left_out = 0
                looked = True
                self._read(most - len(out))
                self._hand_out(most, out)
        except BaseException:
            for _, tag in out:
                self._deliveries.reject(tag, requeue=True)
            raise
        return out

    def _read(self, most: int) -> None:
        """Reads from Redis what there is into the consumers, and settles what has ended, in one round trip."""
        for consumer in [c for c in self.consumers() if not c.rest]:
            try:
                if consumer.fence.needs_audit:
                    consumer.recover(takeover=consumer.taken_over)
                    consumer.taken_over = False
                    consumer.read_at = 0.0
                if consumer.claimer.has_to_recover():
                    consumer.claimer.recover_more()
            except (LeaseLost, ReplyError) as exc:
                if isinstance(exc, ReplyError) and is_of_one_key(exc):
                    self.rest_stream(consumer, exc)
                    continue
                if consumer.lease.shared or not (isinstance(exc, LeaseLost) or exc.code == "NOGROUP"):
                    raise
                self._lost(consumer, str(exc))
        now = mono_s()
        self.notified = False
        self.look_at = now + LOOK_S
        streams = [] if self.shared_rest() else list(self.streams.values())
        shards = [c for c in self.shards.values() if not c.backlog.closing and not c.rest]
        told = [c for c in shards if c.woken or (c.arrivals.next_due is not None and now >= c.arrivals.next_due)]
        readable = [c for c in shards if (now >= c.read_at or c in told) and c.arrivals.has_room()]
        looked = readable + [c for c in told if c not in readable]
        settling = [c for c in self.consumers() if c.backlog.finished and not c.settler.settling and not c.rest]
        calls = [(c.keys.stream, c.settler.begin()) for c in settling]
        room = max(0, most - sum(len(c.backlog.buffer) for c in streams))
        if streams:
            calls.append((streams[0].keys.stream, pack_fetch([c.arrivals for c in streams], room, True)))
        calls += [(c.keys.stream, pack_fetch([c.arrivals], SHARD_READ if c in readable else 0, True)) for c in looked]
        left = [*streams, *looked]  # whose replies are not received yet
        try:
            try:
                replies = self._links.pipeline(calls)
            except BaseException:
                for consumer in settling:
                    consumer.settler.lost()
                raise
            for consumer, reply in zip(settling, replies, strict=False):
                self._settled(consumer, reply)
            # The shards first, each for itself: whatever another's reply is, what was read of one is its owner's.
            failed = None
            for consumer, reply in zip(looked, replies[len(settling) + bool(streams) :], strict=True):
                if reply == Code.LEASE_LOST or (isinstance(reply, ReplyError) and reply.code == "NOGROUP"):
                    self._lost(consumer, "")
                elif isinstance(reply, ReplyError) and is_of_one_key(reply):
                    self.rest_stream(consumer, reply)
                elif isinstance(reply, Exception):
                    failed = failed or reply
                    continue
                else:
                    fresh = _receive(consumer, reply)
                    if consumer in readable:
                        consumer.was_read(len(fresh) >= SHARD_READ, bool(fresh), now)
                    else:
                        consumer.read_at = 0.0
                left.remove(consumer)
            if failed:
                raise failed
            if streams:
                self._receive_shared(streams, replies[len(settling)])
            left.clear()
        finally:
            for consumer in left:
                consumer.claimer.connection_lost()  # entries may have come with them

    def _settled(self, consumer: StreamConsumer, reply: Any) -> None:
        if isinstance(reply, Exception):
            consumer.settler.lost()
            return
        try:
            consumer.settler.end(reply)
        except LeaseLost as exc:
            self._lost(consumer, str(exc))

    def _receive_shared(self, streams: Sequence[StreamConsumer], reply: Any) -> None:
        if isinstance(reply, ReplyError) and is_of_one_key(reply):
            self.rest_stream(streams[0], reply)
            return
        if isinstance(reply, Exception):
            raise reply
        if reply == Code.LEASE_LOST:
            raise LeaseLost(f"the lease of {streams[0].keys.prefix} ran out and is another's, or is gone")
        now_ms, *parts = reply
        woken = False
        for consumer, found in zip(streams, parts, strict=True):
            woken |= self._moved(consumer.keys.prefix, *found[:2])
            consumer.receive(int(now_ms), found)
        if any(consumer.backlog.buffer for consumer in streams):
            self.notified = True
        if woken:
            # Something else than a message may have come: a stream of another priority.
            self.queue.recorded()
            if set(self.queue.priorities) != set(self.streams):
                self._join(self)
        self.next_due = min((c.arrivals.next_due for c in streams if c.arrivals.next_due is not None), default=None)

    def _hand_out(self, most: int, out: list[Fetched]) -> None:
        now = mono_s()
        groups = [list(self.streams.values()), list(self.shards.values())]
        if self._shards_first:
            groups.reverse()
        self._shards_first = not self._shards_first
        for consumer in (c for group in groups for c in group if not c.rest):
            consumer.backlog.lanes.open_due(now)
            try:
                self._hand_out_of(consumer, most, out)
            except ReplyError as exc:
                if not is_of_one_key(exc):
                    raise
                self.rest_stream(consumer, exc)

    def _hand_out_of(self, consumer: StreamConsumer, most: int, out: list[Fetched]) -> None:
        while len(out) < most and consumer.backlog.has_work():
            batches = consumer.hand_out(most - len(out))
            if not batches:
                break
            for position, batch in enumerate(batches):
                try:
                    handed = self._handed(consumer, batch)
                except BaseException:
                    for left in batches[position:]:
                        consumer.give_back(left)
                    raise
                if handed is not None:
                    out.append(handed)

    def _handed(self, consumer: StreamConsumer, batch: Batch) -> Fetched | None:
        delivery = batch.deliveries[0]
        if not delivery.fresh and not consumer.lease.shared:
            following = consumer.replaced(batch)
            if following is None:
                return None
            delivery = following
        try:
            payload = decode(delivery)
        except Exception as exc:
            consumer.reject(batch, str(exc), "undecodable")
            return None
        if expired(payload, delivery.entry_id, consumer.backlog.redis_ms()):
            consumer.end(batch)
            self._left_out += 1
            return None
        tag = self._deliveries.new_tag()
        address(payload, tag, again=not delivery.fresh)
        if not consumer.lease.shared:
            payload["headers"][DELIVERY] = {
                "queue": self.queue.name,
                "epoch": self.queue.shape().epoch,
                "shard": consumer.shard,
                "entry": delivery.entry_id.decode(),
                "token": consumer.lease.token,
                "generation": consumer.generation(delivery.entry_id),
                "tag": tag,
                "broker": self._broker,
            }
        self._deliveries.add(tag, consumer, batch)
        return payload, tag

    def _fetch_for_good(self, most: int) -> list[Fetched]:
        """Without a lease: the most urgent first."""
        queue = self.queue
        out: list[Fetched] = []
        self.notified = False
        due_at: list[float] = []
        for priority in queue.priorities:
            queue.open(shared(priority))
            names = queue.shard_keys(shared(priority))
            link = self._links.at(names.stream)
            while len(out) < most:
                now_ms, last, woken, next_ms, again, fresh = link.run(
                    "take",
                    [names.stream, names.requeued(GROUP), names.delayed, names.state, names.wake, names.notes(GROUP)],
                    [GROUP, most - len(out)],
                )
                if self._moved(names.prefix, last, woken):
                    queue.recorded()
                for position, (entry_id, fields) in enumerate([*again, *fresh]):
                    payload = _payload(link, queue.name, names, entry_id, fields)
                    if payload is None or expired(payload, entry_id, int(now_ms)):
                        continue
                    tag = self._deliveries.new_tag()
                    address(payload, tag, again=position < len(again))
                    out.append((payload, tag))
                if not again and not fresh:
                    if next_ms >= 0:
                        due_at.append(mono_s() + max(0, int(next_ms) - int(now_ms)) / 1000)
                    break
        # A first keyed message has come: the next fetch joins those who share its shards out.
        self.notified = len(out) >= most or queue.keyed
        self.next_due = min(due_at, default=None)
        return out

    # What Redis refuses

    def rest_stream(self, consumer: StreamConsumer, exc: ReplyError) -> None:
        """Redis refuses something of one shard, or of the shared streams: they rest."""
        what = f"shard {consumer.shard} of queue {consumer.queue}"
        resting = list(self.streams.values()) if consumer.lease.shared and self.streams else [consumer]
        for one in resting:
            one.claimer.connection_lost()  # a part may have been done
            one.rest.begin()
        named = (key for one in resting for key in (one.lease.key, *one.keys.all(GROUP)))
        consumer.rest.say(what, exc, named, self._links.pipeline)

    def rest_all(self, exc: ReplyError) -> None:
        """The same of all of the queue: it can't even be joined. Raises what is no matter of one queue."""
        if not is_of_one_key(exc):
            raise exc
        queue = self.queue
        epoch = queue.shape().epoch if queue.declared else 0
        streams = (SHARED, *(shared(priority) for priority in queue.priorities[1:]))
        named = (queue.keys.meta, *(key for one in streams for key in queue.keys.shard(epoch, one).all(GROUP)))
        for one in self.consumers():
            one.claimer.connection_lost()
        self.rest.begin()
        self.rest.say(f"queue {queue.name}", exc, named, self._links.pipeline)
        self.notified = True


def _receive(consumer: StreamConsumer, reply: Any) -> list[Entry]:
    now_ms, found = reply
    fresh = consumer.receive(int(now_ms), found)
    consumer.woken = False
    return fresh


def _payload(link: Link, queue: str, names: ShardKeys, entry_id: bytes, fields: list[bytes]) -> dict[str, Any] | None:
    """The message; None for junk, which goes to the dead letters."""
    try:
        delivery = Delivery(entry_id, wire.decode(fields))
        check(delivery.args)
        return decode(delivery)
    except Exception as exc:
        error = {
            "reason": "undecodable", "message": short(said(exc)), "traceback": None, "attempts": 0, "crashes": 0,
            "dead_at": id_order(entry_id)[0], "appended_at": id_order(entry_id)[0], "queue": queue, "shard": "shared",
        }  # fmt: skip
        dead: list[str | bytes] = ["error", json.dumps(error), "entry", entry_id, "group", GROUP, "held", "0", *fields]
        link.run("bury", [names.state, names.dlq], dead)
        log.error("dead letter: undecodable queue=%s entry=%s: %s", queue, entry_id.decode(), exc)
        return None
