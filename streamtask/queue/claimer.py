"""What is pending and not held: another owner's at a takeover, or what came with a reply that was lost. It is read before
anything new, and put in its place. Where Redis itself has lost its last second, it is told again what this process knows.
"""

from __future__ import annotations

from collections.abc import Collection, Container
from typing import Any, final

from ..clock import wall_ms
from ..redis import commands
from ..redis.wire import Note, id_order
from ..text import counted, logger
from .arrivals import Arrivals, pack_reads
from .backlog import Backlog, Recovered
from .delivery import deliveries_of
from .fence import Fence
from .settler import Settler

log = logger("streamtask.consumer")

PAGE = 1000
RECOVER_BODIES = 1000
"""Bodies kept when a takeover finds many pending entries; the rest is read again when its turn comes."""


@final
class Claimer:
    """See the module."""

    def __init__(self, backlog: Backlog, fence: Fence, settler: Settler, arrivals: Arrivals) -> None:
        self._backlog = backlog
        self._fence = fence
        self._settler = settler
        self._arrivals = arrivals
        self._settings = backlog.settings
        self._read_to = (0, 0)  # before a connection broke

    def connection_lost(self) -> None:
        """A connection to Redis broke: a reply may have been lost with entries in it, which are pending now, and not here.
        Or Redis itself has lost the last it was told, or is a replica that was never told."""
        fence = self._fence
        fence.needs_audit = True
        self._read_to = max(self._read_to, id_order(self._arrivals.last_id.encode()))

    def recover(self, *, takeover: bool, beside: Collection[bytes] = ()) -> int:
        """Finds the pending entries that this process does not hold, and takes them in their order. Returns how many.

        ``takeover``: the lease is new, and what is pending was another owner's. Otherwise a reply was lost. ``beside``: entries
        that the caller holds.
        """
        fence = self._fence
        lost = fence.needs_audit and not takeover
        set_back = self._read_clock()
        if lost:
            self._void_fetches()
            self._lift_last_id()
        self._read_positions(takeover)
        if lost:
            self._tell_again(set_back)
        held = self._backlog.entry_ids().union(self._settler.settling, beside)
        found: list[Recovered] = []
        if takeover:
            start = self._find_pending("-", held, found, self._settings.max_waiting, takeover=True)
        else:
            # What was not known after the takeover is not missing.
            start = self._arrivals.pending_from
            self._find_pending("-", held, found, None, takeover=False)
        self._backlog.place(found, len(found) > RECOVER_BODIES)
        self._arrivals.pending_from = start
        fence.needs_audit = False
        self._read_to = (0, 0)
        if found:
            log.info(
                "claimed %s queue=%s shard=%s token=%d",
                counted(len(found), "pending entry", "pending entries"),
                fence.queue,
                fence.shard,
                fence.lease.token,
            )
        return len(found)

    def has_to_recover(self) -> bool:
        """Whether more was pending at the takeover than may wait here, and there is room for a part of the rest now."""
        if self._arrivals.pending_from is None or self._backlog.closing or self._backlog.halted:
            return False
        return self._backlog.room() >= min(PAGE, (self._settings.max_waiting + 1) // 2)

    def recover_more(self) -> None:
        """Goes on with a takeover. Nothing new is read before all that is pending is known: it comes after that."""
        if self._arrivals.pending_from is not None:
            found: list[Recovered] = []
            start = self._find_pending(
                self._arrivals.pending_from, frozenset(), found, self._backlog.room(), takeover=True
            )
            self._backlog.place(found, True)
            self._arrivals.pending_from = start

    def overlooked(self) -> int:
        """How many entries are on offer of which this process neither knows nor is about to be told."""
        fence = self._fence
        if self._arrivals.on_offer or not fence.lease.shared:
            return 0
        # In this order: whoever puts entries on offer tells of them in the same step.
        left = int(fence.link.call(commands.count_scored(fence.keys.requeued(fence.group))))
        return left if self._newest_wake() == self._arrivals.wake_id else 0

    def _find_pending(
        self,
        start: str,
        held: Container[bytes],
        found: list[Recovered],
        most: int | None,
        *,
        takeover: bool,
    ) -> str | None:
        """Pages through the pending entries for those that are not held; of the first some are found with their bodies.
        Returns where to go on after ``most``, None where there are no more."""
        bodies = RECOVER_BODIES if start == "-" else 0
        unknown = (
            None
            if takeover or self._arrivals.pending_from is None
            else id_order(self._arrivals.pending_from[1:].encode())
        )
        while True:
            count = PAGE if most is None else min(PAGE, most - len(found))
            if count <= 0:
                return start
            last, ids = self._pending_page(start, count)
            if not last:
                return None
            missing = [entry_id for entry_id in ids if entry_id not in held]
            if unknown is not None:
                missing = [entry_id for entry_id in missing if id_order(entry_id) <= unknown]
            for i in range(0, len(missing), 100):
                self._recover_page(missing[i : i + 100], found, bodies, takeover)
            if unknown is not None and id_order(last) >= unknown:
                return None
            start = "(" + last.decode()

    def _pending_page(self, start: str, count: int) -> tuple[bytes, list[bytes]]:
        """The last entry that was looked at, b"" for none, and those that are this consumer's."""
        fence = self._fence
        group = fence.group
        if fence.lease.shared:
            last, ids = fence.link.run(
                "pending_shared",
                [fence.keys.stream, fence.keys.requeued(group)],
                [group, fence.consumer_name, start, count],
            )
            return last or b"", ids
        ids = [row[0] for row in fence.link.call(commands.pending(fence.keys.stream, group, start, count))]
        return ids[-1] if ids else b"", ids

    def _recover_page(
        self,
        ids: list[bytes],
        found: list[Recovered],
        bodies: int,
        takeover: bool,
    ) -> None:
        fence = self._fence
        wanted = set(ids)
        noted = commands.fields(fence.keys.notes(fence.group), *ids)
        if takeover:
            # They nearly always follow each other. Where they don't, what lies between is not to be shipped.
            asked = [commands.entries(fence.keys.stream, ids[0], ids[-1], 2 * len(ids))]
        else:
            asked = pack_reads(fence, ids)
        texts, *replies = _raised(fence.link.pipeline([noted, *asked]))
        entries = [entry for reply in replies for entry in reply if entry[0] in wanted]
        if takeover and len(entries) < len(ids):
            left = pack_reads(fence, wanted.difference(entry_id for entry_id, _ in entries))
            entries += [entry for reply in _raised(fence.link.pipeline(left)) for entry in reply]
            entries.sort(key=lambda entry: id_order(entry[0]))
        notes = {entry_id: Note.parse(text) for entry_id, text in zip(ids, texts, strict=True) if text}
        for entry_id in wanted.difference(e for e, _ in entries):
            log.warning(
                "a pending entry is gone from the stream queue=%s shard=%s entry=%s",
                fence.queue,
                fence.shard,
                entry_id.decode(),
            )
            self._backlog.finish(entry_id)
        arrived = self._arrivals.decode_again(self._arrivals.readable(entries, notes))
        for delivery in self._arrivals.first_of_their_ids(deliveries_of(arrived)):
            delivery.fresh = self._backlog.is_fresh(delivery.entry_id)
            note = notes.get(delivery.entry_id)
            if note is not None:
                self._backlog.adopt_note(delivery, note)
                if note.held == 2:
                    self._backlog.finish(delivery.entry_id)
                    continue
            if len(found) < bodies or note is not None:
                found.append(delivery)
            else:
                found.append((delivery.lane_key, delivery.entry_id))

    def _tell_again(self, set_back: bool) -> None:
        """Brings Redis, which may have lost its last second, to where this process is. What was read is pending again then,
        as far as it is there; what was acknowledged is so again; and no attempt is forgotten."""
        fence = self._fence
        while id_order(self._arrivals.last_id.encode()) < self._read_to:
            entries = self._arrivals.fetch(self._settings.fetch_count)
            if not entries:
                break
            # Those that are held are to be settled as ever, and the others are about to be found among the pending ones.
            self._arrivals.last_id = entries[-1][0].decode()
        if set_back:
            # By a slower clock a new message may have got the id of one that was acknowledged.
            self._settler.sent.clear()
        for answer in (
            _raised(fence.link.pipeline([packed for _, packed in self._settler.sent])) if self._settler.sent else ()
        ):
            fence.checked(answer)
        noted = [(d.entry_id, d.note) for d in self._backlog.notable() if d.note is not None and not d.note.held]
        if noted:
            ids = [entry_id for entry_id, _ in noted]
            there = fence.link.call(commands.fields(fence.keys.notes(fence.group), *ids))
            self._settler.write([one for one, text in zip(noted, there, strict=True) if one[1].is_ahead_of(text)])

    def _read_clock(self) -> bool:
        """Reads Redis' clock. True if it has surely been set back, or is another machine's that is behind."""
        fence = self._fence
        asked_ms, before = wall_ms(), self._backlog.clock_ms
        now_ms = commands.clock_ms(fence.link.call(commands.TIME))
        self._backlog.clock_ms = now_ms - wall_ms()
        return now_ms - asked_ms + 2 < before

    def _void_fetches(self) -> None:
        """A fetch may still be on its way, or blocked, over a connection that broke for this process and not yet for Redis: it
        reads nothing any more. Its entries would be pending, and here unknown."""
        fence = self._fence
        args = [fence.lease.token, fence.lease.incarnation]
        fence.voided = fence.run("void_fetches", [fence.lease.key, fence.lease.guard], args)

    def _lift_last_id(self) -> None:
        """Redis may have lost that it gave the last entries (a failover, the end of its append-only file), and its clock may be
        behind now: without this a new entry could get the id of one that is held here, and go with that one's end."""
        fence = self._fence
        info = commands.pairs(fence.link.call(commands.stream_info(fence.keys.stream)))
        if id_order(info[b"last-generated-id"]) >= id_order(self._arrivals.last_id.encode()):
            return
        args = [fence.lease.token, fence.lease.incarnation, self._arrivals.last_id]
        if fence.run("lift_last_id", [fence.lease.key, fence.keys.stream], args):
            log.warning(
                "data loss: Redis has lost entries that it had given; new ones come after these queue=%s shard=%s entry=%s",
                fence.queue,
                fence.shard,
                self._arrivals.last_id,
            )

    def _read_positions(self, takeover: bool) -> None:
        fence = self._fence
        for row in fence.link.call(commands.group_infos(fence.keys.stream)):
            info = commands.pairs(row)
            if info[b"name"].decode() == fence.group:
                self._arrivals.last_id = info[b"last-delivered-id"].decode()
        if takeover:
            self._backlog.others_to = id_order(self._arrivals.last_id.encode())
        if takeover or fence.needs_audit:
            self._arrivals.wake_id = self._newest_wake()  # after an outage it may be older than what was seen

    def _newest_wake(self) -> str:
        fence = self._fence
        newest = fence.link.call(commands.newest(fence.keys.wake))
        return newest[0][0].decode() if newest else "0-0"


def _raised(replies: list[Any]) -> list[Any]:
    """The replies of a pipeline, where an error is to raise."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies
