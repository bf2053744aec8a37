"""Taking messages under a lease: one round trip settles what has ended and reads what there is, for all streams of a queue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..clock import mono_s
from ..errors import LeaseLost, ReplyError
from ..queue.arrivals import pack_fetch
from ..queue.backlog import Batch
from ..queue.delivery import Entry
from ..redis.scripts import Code
from .consumed import Consumed
from .consumer import StreamConsumer
from .message import DELIVERY, address, decode, expired
from .resting import is_of_one_key

if TYPE_CHECKING:
    from .session import Session

LOOK_S = 0.005
"""How often Redis is asked for more while what was read before is enough to go on with."""

SHARD_READ = 100
"""Messages of an owned shard that are read with one call: nobody else may run them, so reading ahead keeps nothing from
anybody."""


def read(session: Session, consumed: Consumed, most: int) -> None:
    """Reads from Redis what there is into the consumers, and settles what has ended, in one round trip."""
    for consumer in [c for c in consumed.consumers() if not c.rest]:
        try:
            if consumer.fence.needs_audit:
                consumer.recover(takeover=consumer.taken_over)
                consumer.taken_over = False
                consumer.read_at = 0.0
            if consumer.claimer.has_to_recover():
                consumer.claimer.recover_more()
        except (LeaseLost, ReplyError) as exc:
            if isinstance(exc, ReplyError) and is_of_one_key(exc):
                session.rest(consumer, exc)
                continue
            if consumer.lease.shared or not (isinstance(exc, LeaseLost) or exc.code == "NOGROUP"):
                raise
            session.lost(consumer, str(exc))
    now = mono_s()
    consumed.rung = False
    consumed.look_at = now + LOOK_S
    streams = [] if consumed.shared_rest() else list(consumed.streams.values())
    shards = [c for c in consumed.shards.values() if not c.backlog.closing and not c.rest]
    told = [c for c in shards if c.woken or (c.arrivals.next_due is not None and now >= c.arrivals.next_due)]
    readable = [c for c in shards if (now >= c.read_at or c in told) and c.arrivals.has_room()]
    looked = readable + [c for c in told if c not in readable]
    settling = [c for c in consumed.consumers() if c.backlog.finished and not c.settler.settling and not c.rest]
    calls = [(c.keys.stream, c.settler.begin()) for c in settling]
    room = max(0, most - sum(len(c.backlog.buffer) for c in streams))
    if streams:
        calls.append((streams[0].keys.stream, pack_fetch([c.arrivals for c in streams], room, True)))
    calls += [(c.keys.stream, pack_fetch([c.arrivals], SHARD_READ if c in readable else 0, True)) for c in looked]
    left = [*streams, *looked]  # whose replies are not taken yet
    try:
        try:
            replies = session.connections.links.pipeline(calls)
        except BaseException:
            for consumer in settling:
                consumer.settler.lost()
            raise
        for consumer, reply in zip(settling, replies, strict=False):
            _settled(session, consumer, reply)
        # The shards first, each for itself: whatever another's reply is, what was read of one is its owner's.
        failed = None
        for consumer, reply in zip(looked, replies[len(settling) + bool(streams) :], strict=True):
            if reply == Code.LEASE_LOST or (isinstance(reply, ReplyError) and reply.code == "NOGROUP"):
                session.lost(consumer, "")
            elif isinstance(reply, ReplyError) and is_of_one_key(reply):
                session.rest(consumer, reply)
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
            _receive_shared(session, consumed, streams, replies[len(settling)])
        left.clear()
    finally:
        for consumer in left:
            consumer.claimer.connection_lost()  # entries may have come with them


def _receive(consumer: StreamConsumer, reply: Any) -> list[Entry]:
    now_ms, found = reply
    fresh = consumer.receive(int(now_ms), found)
    consumer.woken = False
    return fresh


def _settled(session: Session, consumer: StreamConsumer, reply: Any) -> None:
    if isinstance(reply, Exception):
        consumer.settler.lost()
        return
    try:
        consumer.settler.end(reply)
    except LeaseLost as exc:
        session.lost(consumer, str(exc))


def _receive_shared(session: Session, consumed: Consumed, streams: Sequence[StreamConsumer], reply: Any) -> None:
    if isinstance(reply, ReplyError) and is_of_one_key(reply):
        session.rest(streams[0], reply)
        return
    if isinstance(reply, Exception):
        raise reply
    if reply == Code.LEASE_LOST:
        raise LeaseLost(f"the lease of {streams[0].keys.prefix} ran out and is another's, or is gone")
    now_ms, *parts = reply
    woken = False
    for consumer, found in zip(streams, parts, strict=True):
        woken |= consumed.moved(consumer.keys.prefix, *found[:2])
        consumer.receive(int(now_ms), found)
    if any(consumer.backlog.buffer for consumer in streams):
        consumed.rung = True
    if woken:
        # Something else than a message may have come: a stream of another priority.
        consumed.queue.recorded()
        if set(consumed.queue.priorities) != set(consumed.streams):
            session.join(consumed)
    consumed.next_due = min((c.arrivals.next_due for c in streams if c.arrivals.next_due is not None), default=None)


def hand_out(session: Session, consumed: Consumed, most: int, out: list[tuple[dict[str, Any], str]]) -> None:
    now = mono_s()
    groups = [list(consumed.streams.values()), list(consumed.shards.values())]
    if consumed.shards_first:
        groups.reverse()
    consumed.shards_first = not consumed.shards_first
    for consumer in (c for group in groups for c in group if not c.rest):
        consumer.backlog.lanes.open_due(now)
        try:
            _hand_out(session, consumed, consumer, most, out)
        except ReplyError as exc:
            if not is_of_one_key(exc):
                raise
            session.rest(consumer, exc)


def _hand_out(
    session: Session, consumed: Consumed, consumer: StreamConsumer, most: int, out: list[tuple[dict[str, Any], str]]
) -> None:
    while len(out) < most and consumer.backlog.has_work():
        batches = consumer.hand_out(most - len(out))
        if not batches:
            break
        for position, batch in enumerate(batches):
            try:
                handed = _handed(session, consumed, consumer, batch)
            except BaseException:
                for left in batches[position:]:
                    consumer.give_back(left)
                raise
            if handed is not None:
                out.append(handed)


def _handed(
    session: Session, consumed: Consumed, consumer: StreamConsumer, batch: Batch
) -> tuple[dict[str, Any], str] | None:
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
        consumed.left_out += 1
        return None
    tag = session.new_tag()
    address(payload, tag, again=not delivery.fresh)
    if not consumer.lease.shared:
        payload["headers"][DELIVERY] = {
            "queue": consumed.queue.name,
            "epoch": consumed.queue.shape().epoch,
            "shard": consumer.shard,
            "entry": delivery.entry_id.decode(),
            "token": consumer.lease.token,
            "generation": consumer.generation(delivery.entry_id),
            "tag": tag,
            "broker": session.address,
        }
    session.deliveries.add(tag, consumer, batch)
    return payload, tag
