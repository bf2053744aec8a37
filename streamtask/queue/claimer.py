"""What is pending and not held: another owner's at a takeover, or what came with a reply that was lost. It is read before
anything new, and put in its place. Where Redis itself has lost its last second, it is told again what this process knows.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Sequence
from typing import Any

from ..clock import wall_ms
from ..redis.link import Link, pack
from ..redis.wire import Note, id_order
from ..text import counted, logger
from .arrivals import Arrivals
from .delivery import Delivery, deliveries_of

log = logger("streamtask.consumer")

PAGE = 1000
RECOVER_BODIES = 1000
"""Bodies kept when a takeover finds many pending entries; the rest is read again when its turn comes."""


class Claimer(Arrivals):
    """See the module."""

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
                "claimed %s queue=%s shard=%s token=%d",
                counted(len(found), "pending entry", "pending entries"),
                self.queue,
                self.shard,
                self.lease.token,
            )
        return len(found)

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

    def overlooked(self, link: Link) -> int:
        """How many entries are on offer of which this process neither knows nor is about to be told."""
        if self.on_offer or not self.lease.shared:
            return 0
        # In this order: whoever puts entries on offer tells of them in the same step.
        left = int(link.command("ZCARD", self.keys.requeued(self.settings.group)))
        return left if self._newest_wake(link) == self.wake_id else 0

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
        arrived = self._decode_again(self._readable(entries, notes))
        for delivery in self._first_of_their_ids(link, deliveries_of(arrived)):
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

    def _room(self) -> int:
        return self.settings.max_waiting - self.lanes.waiting - len(self.buffer)

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
            self._write_notes(link, [one for one, text in zip(noted, there, strict=True) if one[1].is_ahead_of(text)])

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
        self.voided = self._run(link, "void_fetches", [self.lease.key, self.lease.guard], args)

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


def _raised(replies: list[Any]) -> list[Any]:
    """The replies of a pipeline, where an error is to raise."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies


def _pairs(flat: Sequence[bytes]) -> list[tuple[bytes, Any]]:
    return list(zip(flat[::2], flat[1::2], strict=True))
