"""One shard (or shared stream) in the hands of its owner: what it has read, what waits, what is to be settled.

The state machine of an owner, without a loop of its own and without knowing what a task is: the worker's control thread
calls it, and so does the inline runner of tests. Methods that talk to Redis take the link; each of their calls names the
lease's token and incarnation and raises ``LeaseLost`` when these are no longer the owner's.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from zlib import crc32

from ..clock import mono_s, wall_ms
from ..coordination.lease import Lease
from ..errors import BrokerUnavailable, DecodeError, LeaseLost, ReplyError
from ..redis import wire
from ..redis.link import Link, pack
from ..redis.scripts import Code, script
from .fetcher import pack_fetch
from .lanes import (
    KEEP_BODIES,
    MAX_WAITING,
    Delivery,
    Entry,
    Lane,
    LaneSet,
    Note,
    deliveries_of,
    entry_id_of,
    id_order,
    put_in_place,
)  # fmt: skip
from .seen import generation_keys

log = logging.getLogger("streamtask.consumer")

OWNER = "owner"
"""The name of the one consumer of a shard in each group. The lease says which process that is."""

PAGE = 1000
RECOVER_BODIES = 1000
"""Bodies kept when a takeover finds many pending entries; the rest is read again when its turn comes."""

SENT_S = 3.0
"""How long what was acknowledged is remembered: Redis' append-only file loses a second or two, should the machine die."""
MOST_SENT = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerSettings:
    """``deduped``: time to live (ms) of the dedupe middleware's ids by task name; ``dedupe_all_ms``: for all others.
    ``max_waiting``: messages of a shard that wait in this process, beyond which reading stops."""

    group: str = "workers"
    fetch_count: int = 200
    ack_batch: int = 200
    max_crashes: int = 3
    hold_on_dead: bool = False
    max_dedupe_ids: int = 1_000_000
    unordered: frozenset[str] = frozenset()
    deduped: Mapping[str, int] = field(default_factory=dict)
    dedupe_all_ms: int = 0
    max_waiting: int = MAX_WAITING


class Batch:
    """Deliveries handed out together, to be run one after the other.

    ``collected`` of them are known to have ended; ``outcomes`` has (position, outcome) of those that did not end well,
    ``reopened`` the keys that a sequential executor skips no longer; ``mixed``: not in the order of the stream.
    """

    __slots__ = (
        "collected", "consumer", "ids", "items", "mixed", "number", "outcomes", "reopened", "results", "seen", "slot",
    )  # fmt: skip

    def __init__(
        self, consumer: ShardConsumer, number: int, items: Sequence[Delivery | Entry], reopened: list[Hashable]
    ) -> None:
        self.consumer = consumer
        self.number = number
        self.items = items
        self.ids: list[bytes] = [item[0] if type(item) is list else item.entry_id for item in items]  # type: ignore[union-attr]
        self.reopened = reopened
        self.mixed = False
        self.collected = 0
        self.seen = 0  # outcomes that were dealt with
        self.outcomes: list[tuple[int, Outcome]] = []
        self.results: list[tuple[Delivery, Any]] = []
        self.slot: Any = None  # where its executor writes down which one runs

    def delivery(self, index: int) -> Delivery:
        item = self.items[index]
        return Delivery(*item) if type(item) is list else item  # type: ignore[return-value]

    @property
    def deliveries(self) -> list[Delivery]:
        return deliveries_of(self.items)


@dataclass(slots=True)
class Outcome:
    """What becomes of a message that did not simply succeed.

    ``kind``: ``retry`` (after ``delay_s``, counted as an attempt), ``requeue`` (at once, not counted), ``dead``,
    ``skipped`` (its lane is closed), ``unstarted`` (the owner stopped handing out), ``ignored`` or ``revoked``.
    """

    kind: str
    delay_s: float = 0.0
    reason: str = ""
    message: str = ""
    traceback: str | None = None
    in_doubt: bool = False  # its dead letter may be stored: the reply was lost


class ShardConsumer:
    """See the module. Used by one thread; ``halted`` alone is also set by executors."""

    def __init__(self, lease: Lease, queue: str, shard: int | str, settings: ConsumerSettings) -> None:
        self.lease = lease
        self.keys = lease.keys
        self.queue = queue
        self.shard = shard
        self.settings = settings
        self.consumer_name = lease.incarnation if lease.shared else OWNER
        self.lanes = LaneSet()
        self.buffer: deque[Delivery | Entry] = deque()  # what was read, in its order
        self.handed: dict[int, Batch] = {}
        self.finished: list[bytes] = []
        self.finished_since = 0.0
        self.settling: list[bytes] = []  # sent to be acknowledged, and not answered yet
        self._sent: deque[tuple[float, bytes]] = deque(maxlen=MOST_SENT)  # when, and the calls of the last SENT_S
        self.halted = False
        self.closing = False
        self.last_id = "0-0"
        self.wake_id = "0-0"
        self.next_due: float | None = None
        self.needs_audit = False
        self.on_offer = lease.shared
        """Whether entries that were given back may be there to be taken (shared streams)."""
        self.revoked: set[bytes | str] = set()
        self.clock_ms = 0  # what to add to wall_ms() to get Redis' clock
        # Whether a new message may stay a plain entry until something happens to it.
        self._plain = not (settings.unordered or settings.deduped or settings.dedupe_all_ms)
        self._in_order = True
        self._closed: set[Hashable] = set()  # keys that a sequential executor skips until a batch reopens them
        self._notes: list[tuple[bytes, Note]] = []
        self._dead: list[tuple[Delivery | bytes, list[bytes], Outcome]] = []
        self._numbers = 0
        self._full_said = False
        # After a takeover: from where on the pending entries are not known yet, as XPENDING is asked; None: all are.
        self._pending_from: str | None = None
        self._read_to = (0, 0)  # before a connection broke
        self._others_to = (0, 0)  # up to this entry, what is pending was given to another owner before
        self._layouts: dict[str, str] = {}
        self._head = (lease.token, lease.incarnation, settings.group)
        self._group = settings.group.encode()
        keys = self.keys
        self.fetch_keys = (
            lease.key, keys.stream, keys.state, keys.notes(settings.group), keys.delayed, keys.wake,
            keys.requeued(settings.group),
        )  # fmt: skip
        self.read_command = pack(
            "XREADGROUP", "GROUP", settings.group, self.consumer_name, "COUNT", settings.fetch_count,
            "STREAMS", keys.stream, ">",
        )  # fmt: skip
        """XREADGROUP of new entries; to be run inside a transaction that watches ``lease.guard``."""
        self.guard_command = pack("HMGET", lease.key, "token", "owner")
        """What to ask for after WATCH: does this incarnation own the lease?"""
        self._record = [b"%d" % lease.token, lease.incarnation.encode()]
        self._settle_keys = (lease.key, keys.stream, keys.state, keys.notes(settings.group))

    def __repr__(self) -> str:
        return f"<ShardConsumer {self.queue}/{self.shard} token={self.lease.token}>"

    # Reading

    def fetch(self, link: Link, most: int, *, new: bool = True) -> list[Entry]:
        """Moves what is due, learns when the next is, and takes up to ``most`` of the
        entries that were given back or whose consumers are gone (shared streams). Answers the ``new`` ones, of which
        there may be as many as are left of ``most``: to be absorbed."""
        now_ms, found = self._owned(link.call(pack_fetch([self], most, new)))
        return self.take_found(link, int(now_ms), found)

    def look(self, link: Link) -> None:
        """Looks at all that a wake may tell of."""
        self.fetch(link, self.settings.fetch_count if self.lease.shared and self.has_room() else 0, new=False)
        self.reread_notes(link)

    def take_found(self, link: Link, now_ms: int, found: Sequence[Any]) -> list[Entry]:
        """Takes what ``lua/fetch.lua`` answers for this stream, but for the new entries."""
        _, wake_id, due_ms, more, again, fresh = found
        self.clock_ms = now_ms - wall_ms()
        self.wake_id = wake_id.decode()
        self.next_due = None if due_ms < 0 else mono_s() + max(0, int(due_ms) - now_ms) / 1000
        self.on_offer = bool(more)
        if again:
            self.absorb_again(link, again)
        return fresh  # type: ignore[no-any-return]

    def owns(self, answer: Sequence[bytes | None]) -> bool:
        """Whether that is the answer to ``guard_command`` that an owner gets."""
        return answer == self._record

    def has_room(self) -> bool:
        """Whether to read more: half a fetch is left at most, and not too much waits."""
        if self.closing or self.halted or self.needs_audit or len(self.buffer) > self.settings.fetch_count // 2:
            return False
        if self.lanes.waiting < self.settings.max_waiting and self._pending_from is None:
            self._full_said = False
            return True
        if not self._full_said:
            self._full_said = True
            log.error(
                "reading stops: %d messages wait in this process queue=%s shard=%s",
                self.lanes.waiting + len(self.buffer),
                self.queue,
                self.shard,
            )
        return False

    def absorb(self, link: Link, entries: Sequence[Entry]) -> None:
        """Takes new entries that were read, in the order of the stream; at least one."""
        self.last_id = entries[-1][0].decode()
        # Always through the buffer, also where the lane is closed: an earlier message of its key may still be there.
        if self._plain:
            self.buffer.extend(self._decode(entries))
        else:
            self.buffer.extend(self._first_of_their_ids(link, deliveries_of(self._decode(entries))))

    def absorb_again(self, link: Link, entries: Iterable[tuple[bytes, list[bytes], bytes]]) -> None:
        """Takes entries, with their notes, that were given back, or whose consumers are gone."""
        notes: dict[bytes, bytes] = {}
        plain: list[Entry] = []
        for entry_id, fields, note in entries:
            plain.append([entry_id, fields])
            notes[entry_id] = note
        found: list[Delivery | tuple[Hashable, bytes]] = []
        for delivery in self._first_of_their_ids(link, deliveries_of(self._decode(plain))):
            delivery.fresh = False
            if text := notes[delivery.entry_id]:
                self._take_note(delivery, Note.parse(text))
            found.append(delivery)
        self._place_recovered(found, False)

    def _decode(self, entries: Iterable[Entry]) -> list[Delivery | Entry]:
        """Decodes entries ``[id, fields]``. What can't be decoded is left to be a dead letter."""
        arrived: list[Delivery | Entry] = []
        append, unordered = arrived.append, self.settings.unordered
        unpack, hook = wire.unpackb, wire.ext_hook
        for entry in entries:
            entry_id, fields = entry
            # What nearly all messages are is seen here, in place of a call of ``decode`` for each.
            try:
                envelope = unpack(fields[1], ext_hook=hook, strict_map_key=False)
                task, key, message_id, args, kwargs, headers = envelope
                usual = (
                    headers is None
                    and len(fields) == 2
                    and type(key) is bytes
                    and type(args) is list
                    and type(kwargs) is dict
                    and type(message_id) is bytes
                    and type(task) is str
                    and fields[0] == b"m"
                )
            except Exception:
                usual = False
            if usual and not unordered:
                entry[1] = envelope
                append(entry)
                continue
            replayed_for = wire.replayed_for(fields) if len(fields) > 2 else None
            if replayed_for not in (None, self._group, b"1"):
                self._finish(entry_id)  # the dead letter of another group; this one has dealt with the message
                continue
            try:
                envelope = wire.decode(fields)
            except DecodeError as exc:
                self._dead.append((entry_id, fields, Outcome("dead", reason="undecodable", message=str(exc))))
                continue
            delivery = Delivery(entry_id, envelope)
            if unordered and delivery.task in unordered:
                delivery.lane = None
            delivery.replayed = replayed_for is not None
            append(delivery)
        return arrived

    def _first_of_their_ids(self, link: Link, arrived: list[Delivery]) -> list[Delivery]:
        """The dedupe middleware: leaves out deliveries whose id another entry carried first."""
        settings = self.settings
        if not settings.deduped and not settings.dedupe_all_ms:
            return arrived
        asked: dict[int, list[Delivery]] = {}
        for delivery in arrived:
            ttl = settings.deduped.get(delivery.task, settings.dedupe_all_ms)
            if ttl and not delivery.replayed:
                asked.setdefault(ttl, []).append(delivery)
        doubles: set[bytes] = set()
        for ttl, deliveries in asked.items():
            for i in range(0, len(deliveries), 100):
                doubles.update(self._claim_ids(link, ttl, deliveries[i : i + 100]))
        for entry_id in doubles:
            log.info(
                "left out a message that was appended twice queue=%s shard=%s entry=%s",
                self.queue,
                self.shard,
                entry_id.decode(),
            )
            self._finish(entry_id)
        return [delivery for delivery in arrived if delivery.entry_id not in doubles] if doubles else arrived

    def _claim_ids(self, link: Link, ttl_ms: int, deliveries: list[Delivery]) -> list[bytes]:
        kind = f"f{ttl_ms}:{self.settings.group}"
        ids = [wire.pack_id(delivery.id) for delivery in deliveries]
        while True:
            layout = self._layouts.get(kind, "")
            keys = [self.lease.key, self.keys.state]
            for id16 in ids:
                keys += generation_keys(self.keys, kind + ":", layout, id16)
            args: list[Any] = [
                self.lease.token,
                self.lease.incarnation,
                kind,
                ttl_ms,
                layout,
                self.settings.max_dedupe_ids,
            ]
            for id16, delivery in zip(ids, deliveries, strict=True):
                args += [id16, crc32(delivery.entry_id) & 0x7FFFFFFF]
            answer = self._run(link, "claim_ids", keys, args)
            if answer and answer[0] == Code.SEEN_LAYOUT:
                self._layouts[kind] = answer[1].decode()
                continue
            return [d.entry_id for d, runs in zip(deliveries, answer, strict=True) if not runs]

    # Takeover and lost replies

    def connection_lost(self) -> None:
        """A connection to Redis broke: a reply may have been lost with entries in it, which are pending now, and not here.
        Or Redis itself has lost the last it was told, or is a replica that was never told."""
        self.needs_audit = True
        self._read_to = max(self._read_to, id_order(self.last_id.encode()))

    def recover(self, link: Link, *, takeover: bool) -> int:
        """Finds the pending entries that this process does not hold, and takes them in their order. Returns how many.

        ``takeover``: the lease is new, and what is pending was another owner's. Otherwise a reply was lost.
        """
        lost = self.needs_audit and not takeover
        set_back = self._read_clock(link)
        if lost:
            self._void_fetches(link)
            self._lift_last_id(link)
        self._read_positions(link, takeover)
        if lost:
            self._tell_again(link, set_back)
        found: list[Delivery | tuple[Hashable, bytes]] = []
        if takeover:
            start = self._find_pending(link, "-", self.entry_ids(), found, self.settings.max_waiting, takeover=True)
        else:
            # What was not known after the takeover is not missing.
            start = self._pending_from
            self._find_pending(link, "-", self.entry_ids(), found, None, takeover=False)
        self._place_recovered(found, len(found) > RECOVER_BODIES)
        self._pending_from = start
        self.needs_audit = False
        self._read_to = (0, 0)
        if found:
            log.info(
                "claimed %d pending entries queue=%s shard=%s token=%d",
                len(found),
                self.queue,
                self.shard,
                self.lease.token,
            )
        return len(found)

    def _tell_again(self, link: Link, set_back: bool) -> None:
        """Brings Redis, which may have lost its last second, to where this process is. What was read is pending again then,
        as far as it is there; what was acknowledged is so again; and no attempt is forgotten."""
        while id_order(self.last_id.encode()) < self._read_to:
            entries = self.fetch(link, self.settings.fetch_count)
            if not entries:
                break
            # Those that are held are to be settled as ever, and the others are about to be found among the pending ones.
            self.last_id = entries[-1][0].decode()
        if set_back:
            # By a slower clock a new message may have got the id of one that was acknowledged.
            self._sent.clear()
        for answer in _raised(link.pipeline([packed for _, packed in self._sent])) if self._sent else ():
            self._owned(answer)
        noted = [(d.entry_id, d.note) for d in self._held_deliveries() if d.note is not None and not d.note.held]
        if noted:
            ids = [entry_id for entry_id, _ in noted]
            there = link.command("HMGET", self.keys.notes(self.settings.group), *ids)
            self._write_notes(link, [one for one, text in zip(noted, there, strict=True) if not text])

    def _held_deliveries(self) -> Iterable[Delivery]:
        """Those held that may have a note."""
        yield from (item for item in self.buffer if isinstance(item, Delivery))
        for lane in self.lanes.lanes.values():
            yield from (item for item in lane.waiting if isinstance(item, Delivery))
        for batch in self.handed.values():
            yield from (item for item in batch.items[batch.collected :] if isinstance(item, Delivery))

    def has_to_recover(self) -> bool:
        """Whether more was pending at the takeover than may wait here, and there is room for a part of the rest now."""
        if self._pending_from is None or self.closing or self.halted:
            return False
        return self._room() >= min(PAGE, (self.settings.max_waiting + 1) // 2)

    def recover_more(self, link: Link) -> None:
        """Goes on with a takeover. Nothing new is read before all that is pending is known: it comes after that."""
        if self._pending_from is not None:
            found: list[Delivery | tuple[Hashable, bytes]] = []
            start = self._find_pending(link, self._pending_from, frozenset(), found, self._room(), takeover=True)
            self._place_recovered(found, True)
            self._pending_from = start

    def _room(self) -> int:
        return self.settings.max_waiting - self.lanes.waiting - len(self.buffer)

    def _find_pending(
        self,
        link: Link,
        start: str,
        held: Container[bytes],
        found: list[Delivery | tuple[Hashable, bytes]],
        most: int | None,
        *,
        takeover: bool,
    ) -> str | None:
        """Pages through the pending entries for those that are not held; of the first some are found with their bodies.
        Returns where to go on after ``most``, None where there are no more."""
        bodies = RECOVER_BODIES if start == "-" else 0
        unknown = None if takeover or self._pending_from is None else id_order(self._pending_from[1:].encode())
        while True:
            count = PAGE if most is None else min(PAGE, most - len(found))
            if count <= 0:
                return start
            last, ids = self._pending_page(link, start, count)
            if not last:
                return None
            missing = [entry_id for entry_id in ids if entry_id not in held]
            if unknown is not None:
                missing = [entry_id for entry_id in missing if id_order(entry_id) <= unknown]
            for i in range(0, len(missing), 100):
                self._recover_page(link, missing[i : i + 100], found, bodies, takeover)
            if unknown is not None and id_order(last) >= unknown:
                return None
            start = "(" + last.decode()

    def _pending_page(self, link: Link, start: str, count: int) -> tuple[bytes, list[bytes]]:
        """The last entry that was looked at, b"" for none, and those that are this consumer's."""
        group = self.settings.group
        if self.lease.shared:
            last, ids = link.run(
                "pending_shared",
                [self.keys.stream, self.keys.requeued(group)],
                [group, self.consumer_name, start, count],
            )
            return last or b"", ids
        ids = [row[0] for row in link.command("XPENDING", self.keys.stream, group, start, "+", count)]
        return ids[-1] if ids else b"", ids

    def _recover_page(
        self,
        link: Link,
        ids: list[bytes],
        found: list[Delivery | tuple[Hashable, bytes]],
        bodies: int,
        takeover: bool,
    ) -> None:
        wanted = set(ids)
        noted = pack("HMGET", self.keys.notes(self.settings.group), *ids)
        if takeover:
            # They nearly always follow each other. Where they don't, what lies between is not to be shipped.
            asked = [pack("XRANGE", self.keys.stream, ids[0], ids[-1], "COUNT", 2 * len(ids))]
        else:
            asked = self._pack_reads(ids)
        texts, *replies = _raised(link.pipeline([noted, *asked]))
        entries = [entry for reply in replies for entry in reply if entry[0] in wanted]
        if takeover and len(entries) < len(ids):
            left = self._pack_reads(wanted.difference(entry_id for entry_id, _ in entries))
            entries += [entry for reply in _raised(link.pipeline(left)) for entry in reply]
            entries.sort(key=lambda entry: id_order(entry[0]))
        notes = {entry_id: Note.parse(text) for entry_id, text in zip(ids, texts, strict=True) if text}
        for entry_id in wanted.difference(e for e, _ in entries):
            log.warning(
                "a pending entry is gone from the stream queue=%s shard=%s entry=%s",
                self.queue,
                self.shard,
                entry_id.decode(),
            )
            self._finish(entry_id)
        for delivery in self._first_of_their_ids(link, deliveries_of(self._decode(entries))):
            delivery.fresh = self._is_fresh(delivery)
            note = notes.get(delivery.entry_id)
            if note is not None:
                self._take_note(delivery, note)
                if note.held == 2:
                    self._finish(delivery.entry_id)
                    continue
            if len(found) < bodies or note is not None:
                found.append(delivery)
            else:
                found.append((delivery.lane_key, delivery.entry_id))

    def _pack_reads(self, ids: Iterable[bytes]) -> list[bytes]:
        return [pack("XRANGE", self.keys.stream, entry_id, entry_id) for entry_id in ids]

    def _is_fresh(self, delivery: Delivery) -> bool:
        return id_order(delivery.entry_id) > self._others_to

    def _take_note(self, delivery: Delivery, note: Note) -> None:
        delivery.note = note
        if note.mark and note.mark != self.lease.token:
            # An owner that vanished had written down that it starts this body: that owner's end is charged to it.
            if self.lease.by_expiry or self.lease.shared:
                note.crashes += 1
            note.mark = 0

    def _place_recovered(self, found: list[Delivery | tuple[Hashable, bytes]], many: bool) -> None:
        """``many``: into lanes, where most of them are kept as bare ids."""
        if many and self.buffer:
            found = [*deliveries_of(self.buffer), *found]
            self.buffer.clear()
            found.sort(key=lambda item: id_order(item[1] if isinstance(item, tuple) else item.entry_id))
        now = mono_s()
        touched: list[Lane] = []
        for item in found:
            key = item[0] if isinstance(item, tuple) else item.lane_key
            note = None if isinstance(item, tuple) else item.note
            lane = self.lanes.get(key)
            if note is not None and (note.held == 1 or note.due_ms > self.redis_ms()):
                assert isinstance(item, Delivery)
                due = None if note.held else now + (note.due_ms - self.redis_ms()) / 1000
                if lane is None or not (lane.waiting or lane.running):
                    self.lanes.close(key, item, due, self._numbers)
                else:
                    self.lanes.add(lane, item)
            elif many:
                if lane is None:
                    lane = self.lanes.close(key, None, None)
                    touched.append(lane)
                self.lanes.add(lane, item[1] if isinstance(item, tuple) else item)
            else:
                assert isinstance(item, Delivery)
                self.buffer.append(item)
        for lane in touched:
            self.lanes.open(lane)
        if len(self.buffer) > 1:
            ordered = sorted(deliveries_of(self.buffer), key=lambda d: id_order(d.entry_id))
            self.buffer = deque(ordered)

    def _read_clock(self, link: Link) -> bool:
        """Reads Redis' clock. True if it has surely been set back, or is another machine's that is behind."""
        asked_ms, before = wall_ms(), self.clock_ms
        seconds, micros = link.command("TIME")
        now_ms = int(seconds) * 1000 + int(micros) // 1000
        self.clock_ms = now_ms - wall_ms()
        return now_ms - asked_ms + 2 < before

    def _void_fetches(self, link: Link) -> None:
        """A fetch may still be on its way, or blocked, over a connection that broke for this process and not yet for Redis: it
        reads nothing any more. Its entries would be pending, and here unknown."""
        args = [self.lease.token, self.lease.incarnation]
        self._run(link, "void_fetches", [self.lease.key, self.lease.guard], args)

    def _lift_last_id(self, link: Link) -> None:
        """Redis may have lost that it gave the last entries (a failover, the end of its append-only file), and its clock may be
        behind now: without this a new entry could get the id of one that is held here, and go with that one's end."""
        info = dict(_pairs(link.command("XINFO", "STREAM", self.keys.stream)))
        if id_order(info[b"last-generated-id"]) >= id_order(self.last_id.encode()):
            return
        args = [self.lease.token, self.lease.incarnation, self.last_id]
        if self._run(link, "lift_last_id", [self.lease.key, self.keys.stream], args):
            log.warning(
                "data loss: Redis has lost entries that it had given; new ones come after these queue=%s shard=%s entry=%s",
                self.queue,
                self.shard,
                self.last_id,
            )

    def _read_positions(self, link: Link, takeover: bool) -> None:
        for row in link.command("XINFO", "GROUPS", self.keys.stream):
            info = dict(_pairs(row))
            if info[b"name"].decode() == self.settings.group:
                self.last_id = info[b"last-delivered-id"].decode()
        if takeover:
            self._others_to = id_order(self.last_id.encode())
        if takeover or self.needs_audit:
            self.wake_id = self._newest_wake(link)  # after an outage it may be older than what was seen

    def _newest_wake(self, link: Link) -> str:
        newest = link.command("XREVRANGE", self.keys.wake, "+", "-", "COUNT", 1)
        return newest[0][0].decode() if newest else "0-0"

    def overlooked(self, link: Link) -> int:
        """How many entries are on offer of which this process neither knows nor is about to be told."""
        if self.on_offer or not self.lease.shared:
            return 0
        # In this order: whoever puts entries on offer tells of them in the same step.
        left = int(link.command("ZCARD", self.keys.requeued(self.settings.group)))
        return left if self._newest_wake(link) == self.wake_id else 0

    def redis_ms(self) -> int:
        """Redis' clock, in ms."""
        return wall_ms() + self.clock_ms

    def reread_notes(self, link: Link) -> None:
        """Looks whether held lanes may open: their dead letter was replayed (no note) or dropped."""
        held: list[tuple[Lane, Delivery]] = []
        for lane in self.lanes.lanes.values():
            head = lane.waiting[0] if lane.waiting else None
            if isinstance(head, Delivery) and head.note is not None and head.note.held == 1:
                held.append((lane, head))
        if not held:
            return
        texts = link.command("HMGET", self.keys.notes(self.settings.group), *[head.entry_id for _, head in held])
        for (lane, head), text in zip(held, texts, strict=True):
            note = Note.parse(text) if text else Note()
            if note.held == 1:
                continue
            head.note = note
            if note.held == 2:
                self.lanes.pop(lane)
                self._finish(head.entry_id)
            self.lanes.open(lane)

    def entry_ids(self) -> set[bytes]:
        """The ids of all entries that this process holds: buffered, waiting, running, or finished and not settled."""
        held = {entry_id_of(item) for item in self.buffer}
        held.update(self.lanes.entry_ids())
        for batch in self.handed.values():
            held.update(batch.ids[batch.collected :])
        held.update(self.finished)
        held.update(self.settling)
        for item, _, _ in self._dead:
            held.add(item if isinstance(item, bytes) else item.entry_id)
        return held

    # Handing out

    def has_work(self) -> bool:
        return not self.halted and not self.closing and (bool(self.buffer) or self.lanes.has_ready())

    def take(self, link: Link, limit: int, *, may_mark: bool = True) -> Batch | None:
        """A batch for an executor that runs it in sequence; None if nothing can run now. ``may_mark`` False: nothing
        that needs a start mark, for it would not start at once."""
        if self.halted or self.closing:
            return None
        buffer = self.buffer
        if not self.lanes.lanes and not self.revoked and (not buffer or type(buffer[0]) is list or buffer[0].fresh):  # type: ignore[union-attr]
            # The common case: nothing waits, so the batch is the next run of the stream.
            if not buffer:
                return None
            if len(buffer) <= limit:
                items = list(buffer)
                buffer.clear()
            else:
                items = [buffer.popleft() for _ in range(limit)]
            return self._hand(items, self._reopen(deliveries_of(items)) if self._closed else [])
        # What talks to Redis comes first, or is undone: an outage in the middle must not lose what was chosen.
        oldest_out = min(self.handed, default=self._numbers + 1)
        self._load_heads(link, (la for la in self.lanes.peek_ready() if la.closed_by < oldest_out), limit, limit)
        chosen: list[Delivery] = []
        if self.lanes.has_ready():
            self._take_from_lanes(limit, chosen, may_mark, oldest_out)
        mixed = bool(chosen)
        if not chosen or (not self._needs_mark(chosen[0]) and len(chosen) < limit):
            self._take_from_buffer(limit, chosen, may_mark)
        if not chosen:
            return None
        self._mark(link, chosen)
        batch = self._hand(chosen, self._reopen(chosen))
        batch.mixed = mixed
        return batch

    def _reopen(self, chosen: Iterable[Delivery]) -> list[Hashable]:
        """The keys of a batch that a sequential executor still skips, and is to skip no longer."""
        if not self._closed:
            return []
        reopened = [d.lane for d in chosen if d.lane in self._closed]
        self._closed.difference_update(reopened)
        return reopened

    def _take_from_lanes(self, limit: int, chosen: list[Delivery], may_mark: bool, oldest_out: int) -> None:
        again: list[Lane] = []
        for lane in self.lanes.ready():
            if lane.closed_by >= oldest_out:
                # A batch that may still hold messages of this key is out: it has to come back first.
                again.append(lane)
                continue
            while lane.waiting and len(chosen) < limit and not lane.closed:
                head = lane.waiting[0]
                if not isinstance(head, Delivery):
                    break  # its body is read when it is among the first
                marked = self._needs_mark(head)
                if marked and (chosen or not may_mark):
                    break
                self.lanes.pop(lane)
                if self._may_run(head):
                    chosen.append(head)
                if marked:
                    break
            if lane.waiting:
                again.append(lane)
            elif not lane.closed:
                self.lanes.drop(lane)
            if len(chosen) >= limit or (chosen and self._needs_mark(chosen[0])):
                break
        for lane in again:
            if not lane.closed:
                self.lanes.open(lane)

    def _take_from_buffer(self, limit: int, chosen: list[Delivery], may_mark: bool) -> None:
        buffer = self.buffer
        while buffer and len(chosen) < limit:
            item = buffer[0]
            head = Delivery(*item) if isinstance(item, list) else item
            if self._needs_mark(head) and (chosen or not may_mark):
                return
            buffer.popleft()
            lane = self.lanes.get(head.lane_key)
            if lane is not None:
                self.lanes.add(lane, head)
                continue
            if self._may_run(head):
                chosen.append(head)
            if self._needs_mark(head):
                return

    def take_free(self, link: Link, limit: int) -> list[Batch]:
        """Up to ``limit`` deliveries of different lanes, each a batch of its own, for executors that run side by side.
        Each closes its lane until it has ended."""
        if self.halted or self.closing:
            return []
        self._load_heads(link, self.lanes.peek_ready(), limit, 1)
        chosen: list[Delivery] = []
        again: list[Lane] = []
        for lane in self.lanes.ready():
            head = lane.waiting[0] if lane.waiting else None
            if isinstance(head, bytes):
                again.append(lane)
                continue
            if head is not None:
                self.lanes.pop(lane)
            if head is not None and self._may_run(head):
                lane.running = True
                chosen.append(head)
            elif lane.waiting:
                again.append(lane)
            elif not lane.closed:
                self.lanes.drop(lane)
            if len(chosen) >= limit:
                break
        for lane in again:
            if not lane.closed:
                self.lanes.open(lane)
        buffer = self.buffer
        while buffer and len(chosen) < limit:
            item = buffer.popleft()
            delivery = Delivery(*item) if isinstance(item, list) else item
            lane_or_none = self.lanes.get(delivery.lane_key)
            if lane_or_none is not None:
                self.lanes.add(lane_or_none, delivery)
                continue
            if self._may_run(delivery):
                self.lanes.start(delivery.lane_key)
                chosen.append(delivery)
        self._mark(link, chosen)
        return [self._hand([delivery], []) for delivery in chosen]

    def _hand(self, items: Sequence[Delivery | Entry], reopened: list[Hashable]) -> Batch:
        self._numbers += 1
        batch = Batch(self, self._numbers, items, reopened)
        self.handed[batch.number] = batch
        return batch

    def _needs_mark(self, delivery: Delivery) -> bool:
        return not delivery.fresh and (self.lease.by_expiry or self.lease.shared)

    def _may_run(self, delivery: Delivery) -> bool:
        """False for what must not run: revoked, or crashed its process too often. What becomes of it is seen to."""
        if self.revoked and delivery.id in self.revoked:
            log.info(
                "left out a revoked message queue=%s shard=%s id=%s", self.queue, self.shard, wire.id_text(delivery.id)
            )
            self._dead_or_drop_revoked(delivery)
            return False
        note = delivery.note
        if note is not None and note.crashes > self.settings.max_crashes:
            self._dead.append((delivery, [], Outcome("dead", reason="crashed", message=self.too_many_crashes(note))))
            self.lanes.close(delivery.lane_key, None, None, self._numbers)
            return False
        return True

    def too_many_crashes(self, note: Note) -> str:
        return f"its process died {note.crashes} times while the body ran (max_crashes is {self.settings.max_crashes})"

    def _mark(self, link: Link, chosen: list[Delivery]) -> None:
        """Writes down that bodies start, where that is needed; where it fails, all of them go back."""
        if not (self.lease.by_expiry or self.lease.shared):
            return
        marked = [delivery for delivery in chosen if self._needs_mark(delivery)]
        if not marked:
            return
        for delivery in marked:
            delivery.note = delivery.note or Note()
            delivery.note.mark = self.lease.token
        try:
            self._write_notes(link, [(d.entry_id, d.note) for d in marked if d.note is not None])
        except BaseException:
            for delivery in chosen:
                self._give_back(delivery)
            raise

    def _load_heads(self, link: Link, lanes: Iterable[Lane], limit: int, per_lane: int) -> None:
        """Reads the bodies that messages to be handed out lack, in one round trip, into their places: ``limit`` messages of
        the first of these lanes, ``per_lane`` of each. Of a lane that lacks one, the next some are read with it."""
        wanted: dict[bytes, None] = {}
        loading: list[tuple[Lane, int]] = []
        for lane in lanes:
            if limit <= 0:
                break
            count = min(per_lane, limit, len(lane.waiting))
            limit -= count
            if any(isinstance(item, bytes) for item in islice(lane.waiting, count)):
                count = max(count, KEEP_BODIES)
                loading.append((lane, count))
                wanted.update((item, None) for item in islice(lane.waiting, count) if isinstance(item, bytes))
        if not wanted:
            return
        replies = link.pipeline(self._pack_reads(wanted))
        entries = [reply[0] for reply in replies if isinstance(reply, list) and reply]
        found = {entry_id for entry_id, _ in entries}
        bodies = {delivery.entry_id: delivery for delivery in deliveries_of(self._decode(entries))}
        for entry_id in wanted:
            if entry_id not in found:
                log.warning(
                    "a waiting entry is gone from the stream queue=%s shard=%s entry=%s",
                    self.queue, self.shard, entry_id.decode(),
                )  # fmt: skip
                self._finish(entry_id)
        for delivery in bodies.values():
            delivery.fresh = self._is_fresh(delivery)
        for lane, count in loading:
            self.lanes.load(lane, count, bodies)

    def _dead_or_drop_revoked(self, delivery: Delivery) -> None:
        self._finish(delivery.entry_id)
        self.on_revoked(delivery)

    def on_revoked(self, delivery: Delivery) -> None:
        """Told of each revoked message; the worker sets this to store a result."""

    def on_dead(self, consumer: ShardConsumer, delivery: Delivery, outcome: Outcome) -> None:
        """Told of each dead letter once it is stored; the worker sets this."""

    # Outcomes

    def collect(self, batch: Batch, position: int) -> None:
        """Takes note that the first ``position`` deliveries of a batch have ended."""
        outcomes = batch.outcomes
        odd: dict[int, Outcome] = {}
        while batch.seen < len(outcomes) and outcomes[batch.seen][0] < position:
            index, outcome = outcomes[batch.seen]
            odd[index] = outcome
            batch.seen += 1
        if position > batch.collected:
            done = batch.ids[batch.collected : position]
            if not self.finished:
                self.finished_since = mono_s()
            if batch.mixed or (self.finished and id_order(done[0]) < id_order(self.finished[-1])):
                self._in_order = False
            if odd:
                done = [entry_id for index, entry_id in enumerate(done, batch.collected) if index not in odd]
            self.finished += done
            batch.collected = position
        for index, outcome in odd.items():
            self._apply(batch.delivery(index), outcome)

    def complete(self, batch: Batch) -> None:
        """All of a batch has come back. Lanes that it ran side by side with others open."""
        self.collect(batch, len(batch.ids))
        self.handed.pop(batch.number, None)

    def complete_free(self, batch: Batch) -> None:
        """As ``complete``, for a batch of ``take_free``."""
        self._in_order = False
        self.complete(batch)
        for delivery in batch.deliveries:
            self.lanes.finish(delivery.lane_key)

    def _apply(self, delivery: Delivery, outcome: Outcome) -> None:
        kind, key = outcome.kind, delivery.lane_key
        if kind == "ignored":
            self._finish(delivery.entry_id)
            return
        if kind == "revoked":
            self._dead_or_drop_revoked(delivery)
            return
        if kind in ("retry", "requeue", "dead") and delivery.lane is not None:
            self._closed.add(key)
        if kind == "retry":
            note = delivery.note = delivery.note or Note()
            note.attempt += 1
            note.due_ms = self.redis_ms() + max(0, int(outcome.delay_s * 1000))
            note.mark = 0
            self._notes.append((delivery.entry_id, note))
            self.lanes.close(key, delivery, mono_s() + max(0.0, outcome.delay_s), self._numbers)
        elif kind == "requeue":
            self.lanes.close(key, delivery, mono_s() + outcome.delay_s, self._numbers)
        elif kind == "dead":
            self._dead.append((delivery, [], outcome))
            self.lanes.close(key, None, None, self._numbers)
        else:
            self._give_back(delivery)

    def _give_back(self, delivery: Delivery) -> None:
        lane = self.lanes.get(delivery.lane_key)
        if lane is not None:
            was_running = lane.running
            self.lanes.add(lane, delivery)
            if was_running:
                self.lanes.open(lane)
        else:
            put_in_place(self.buffer, delivery)

    def _finish(self, entry_id: bytes) -> None:
        if not self.finished:
            self.finished_since = mono_s()
        self.finished.append(entry_id)
        self._in_order = False

    # Writing

    def _run(self, link: Link, name: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        return self._owned(link.run(name, keys, args))

    def _owned(self, answer: Any) -> Any:
        if type(answer) is int and answer == Code.LEASE_LOST:
            raise LeaseLost(f"shard {self.shard} of queue {self.queue!r} belongs to another process now")
        return answer

    def settle(self, link: Link) -> int:
        """Acknowledges and removes what is finished, at most ``ack_batch`` messages a call. Returns how many."""
        count = 0
        while self.finished:
            packed = self.begin_settle()
            count += len(self.settling)
            try:
                self.end_settle(link.call(packed))
            except BaseException:
                self.settle_lost()
                raise
        return count

    def begin_settle(self) -> bytes:
        """The call that settles the first of what is finished; to be answered by ``end_settle`` or ``settle_lost`` before
        another begins."""
        if not self._in_order:
            self.finished.sort(key=id_order)
            self._in_order = True
        self.settling = self.finished[: self.settings.ack_batch]
        self.finished = self.finished[len(self.settling) :]
        self.finished_since = now = mono_s()
        packed = self.pack_settle(self.settling)
        sent = self._sent
        sent.append((now, packed))
        while sent[0][0] < now - SENT_S and not self.needs_audit:
            sent.popleft()
        return packed

    def end_settle(self, answer: Any) -> None:
        """Takes the answer. Raises ``LeaseLost``."""
        self._owned(answer)
        self.settling = []

    def settle_lost(self) -> None:
        """No answer came: what was sent is sent again, before anything later."""
        if self.settling:
            self.finished = self.settling + self.finished
            self.settling = []
            self._in_order = False

    def pack_settle(self, ids: Sequence[bytes]) -> bytes:
        token, incarnation, group = self._head
        return script("settle").pack_text(self._settle_keys, (str(token), incarnation, group, *ids))

    def flush(self, link: Link) -> None:
        """Writes the notes and dead letters that ``collect`` and reading have left to do."""
        self.write_notes(link)
        while self._dead:
            item, _, outcome = self._dead[0]
            try:
                self._dead_letter(link, item, outcome)
            except BrokerUnavailable:
                outcome.in_doubt = True
                raise
            self._dead.pop(0)

    def write_notes(self, link: Link) -> None:
        if self._notes:
            self._write_notes(link, self._notes)
            self._notes = []

    def has_writes(self) -> bool:
        return bool(self._notes or self._dead)

    def has_to_write(self) -> bool:
        """Whether there is anything to settle, write or hand over."""
        return bool(self.finished or self._notes or self._dead or self.closing)

    def _write_notes(self, link: Link, notes: Sequence[tuple[bytes, Note]]) -> None:
        for i in range(0, len(notes), 200):
            args: list[Any] = list(self._head)
            for entry_id, note in notes[i : i + 200]:
                args += [entry_id, note.format()]
            self._run(link, "note", [self.lease.key, self.keys.stream, self.keys.notes(self.settings.group)], args)

    def _dead_letter(self, link: Link, item: Delivery | bytes, outcome: Outcome) -> None:
        delivery = item if isinstance(item, Delivery) else None
        entry_id = item.entry_id if isinstance(item, Delivery) else item
        note = (delivery.note if delivery else None) or Note()
        error: dict[str, Any] = {
            "reason": outcome.reason,
            "message": outcome.message,
            "traceback": outcome.traceback,
            "attempts": note.attempt + (0 if outcome.reason in ("crashed", "expired", "undecodable") else 1),
            "crashes": note.crashes,
            "dead_at": self.redis_ms(),
            "appended_at": id_order(entry_id)[0],
            "queue": self.queue,
            "shard": self.shard,
        }
        if delivery:
            error["task"] = delivery.task
            error["id"] = wire.id_text(delivery.id)
            error["key"] = None if delivery.key is None else delivery.key.decode("utf-8", "backslashreplace")
        held = ""
        if self.settings.hold_on_dead and delivery is not None and delivery.lane is not None:
            held = Note(note.attempt, 0, note.crashes, 0, note.charged, 1).format()
        died = self._run(
            link,
            "dead_letter",
            [self.lease.key, self.keys.stream, self.keys.state, self.keys.notes(self.settings.group), self.keys.dlq],
            [*self._head, entry_id, json.dumps(error), held],
        )
        if not died and not (outcome.in_doubt and self._lies_dead(link, entry_id)):
            # It is no longer pending, or held already: what is no dead letter now is not said to be one.
            self._after_death(delivery, held)
            return
        log.error(
            "dead letter: %s queue=%s shard=%s entry=%s task=%s id=%s: %s",
            outcome.reason, self.queue, self.shard, entry_id.decode(),
            delivery.task if delivery else "-", error.get("id", "-"), outcome.message,
        )  # fmt: skip
        if delivery is not None:
            self.on_dead(self, delivery, outcome)
        self._after_death(delivery, held)

    def _lies_dead(self, link: Link, entry_id: bytes) -> bool:
        """Whether a call whose reply was lost has stored a dead letter, which is one of the last."""
        mine = [entry_id, self._group]
        newest = link.command("XREVRANGE", self.keys.dlq, "+", "-", "COUNT", 10)
        return any([fields[3], fields[5]] == mine for _, fields in newest)

    def _after_death(self, delivery: Delivery | None, held: str) -> None:
        if delivery is None:
            return
        lane = self.lanes.get(delivery.lane_key)
        if held:
            delivery.note = Note.parse(held.encode())
            self.lanes.close(delivery.lane_key, delivery, None)
        elif lane is not None:
            self.lanes.open(lane)

    def idle(self) -> bool:
        """Nothing is handed out and nothing is left to write."""
        return not (self.handed or self.finished or self.settling or self.has_writes())


def _raised(replies: list[Any]) -> list[Any]:
    """The replies of a pipeline, where an error is to raise."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies


def _pairs(flat: Sequence[bytes]) -> list[tuple[bytes, Any]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


__all__ = ["Batch", "ConsumerSettings", "Outcome", "ReplyError", "ShardConsumer"]
