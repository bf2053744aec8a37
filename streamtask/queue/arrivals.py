"""What comes to an owner: new entries, entries that were given back, notes that others changed. Each is decoded, looked at
by the dedupe middleware, and put in its place: behind what waits, or into its lane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, final
from zlib import crc32

from ..clock import mono_s, wall_ms
from ..redis import commands, wire
from ..redis.scripts import Code, script
from ..redis.wire import Note
from ..text import counted, logger
from .backlog import Backlog, Lacking, Recovered
from .delivery import Dead, Delivery, Entry, Kind, Outcome, deliveries_of
from .fence import Fence
from .seen import generation_keys

log = logger("streamtask.consumer")


class Reading(Protocol):
    """Where it stands which entry is read: whoever sees this process die then counts that entry."""

    def begin(self, entry_id: bytes) -> None: ...
    def end(self) -> None: ...


@final
class Arrivals:
    """See the module."""

    def __init__(
        self, backlog: Backlog, fence: Fence, decode: Callable[[Sequence[Entry]], list[Delivery | Entry]]
    ) -> None:
        self._backlog = backlog
        self._decode = decode
        self._settings = settings = backlog.settings
        self.fence = fence
        self.last_id = "0-0"
        self.wake_id = "0-0"
        self.next_due: float | None = None
        self.on_offer = fence.lease.shared
        """Whether entries that were given back may be there to be taken (shared streams)."""
        self.reading: Reading | None = None
        self.room: int | None = None
        """How many entries to read now, where others could run them, too: workers set it for shared streams. None: as many as
        one call reads."""
        self.asked = settings.fetch_count  # how many the last read asked for
        self.pending_from: str | None = None
        """After a takeover: from where on the pending entries are not known yet, as XPENDING is asked; None: all are."""
        # Whether a new message may stay a plain entry until something happens to it.
        self._plain = not (settings.unordered or settings.deduped or settings.dedupe_all_ms)
        self._full_said = False
        self._layouts: dict[str, str] = {}
        self._reads: dict[int, bytes] = {}  # calls that read, by how many entries
        keys, group = fence.keys, fence.group
        self.fetch_keys = (
            fence.lease.key, keys.stream, keys.state, keys.notes(group), keys.delayed, keys.wake, keys.requeued(group),
        )  # fmt: skip

    def has_room(self) -> bool:
        """Whether to read more: half a fetch is left at most, and not too much waits."""
        backlog = self._backlog
        if backlog.closing or backlog.halted or self.fence.needs_audit:
            return False
        if len(backlog.buffer) > self._settings.fetch_count // 2:
            return False
        if self.room == 0:
            return False  # others may run it sooner
        if backlog.lanes.waiting < self._settings.max_waiting and self.pending_from is None:
            self._full_said = False
            return True
        if not self._full_said:
            self._full_said = True
            log.error(
                "reading stops: %d messages wait in this process queue=%s shard=%s",
                backlog.lanes.waiting + len(backlog.buffer),
                self.fence.queue,
                self.fence.shard,
            )
        return False

    def read_count(self) -> int:
        """How many entries to read at once."""
        return self._settings.fetch_count if self.room is None else self.room

    def read_command(self) -> bytes:
        """The call that reads new entries; to be run inside a transaction that watches ``lease.guard``."""
        count = self.asked = max(1, self.read_count())
        packed = self._reads.get(count)
        if packed is None:
            fence = self.fence
            packed = commands.new_entries(fence.keys.stream, fence.group, fence.consumer_name, count)
            self._reads[count] = packed
        return packed

    def fetch(self, most: int, *, new: bool = True) -> list[Entry]:
        """Moves what is due, learns when the next is, and takes up to ``most`` of the entries that were given back or whose
        consumers are gone (shared streams). Answers the ``new`` ones, of which there may be as many as are left of ``most``: to
        be absorbed."""
        now_ms, found = self.fence.checked(self.fence.link.call(pack_fetch([self], most, new)))
        return self.receive(int(now_ms), found)

    def look(self) -> None:
        """Looks at all that a wake may tell of."""
        self.fetch(self.read_count() if self.fence.lease.shared and self.has_room() else 0, new=False)
        self.reread_notes()

    def receive(self, now_ms: int, found: Sequence[Any]) -> list[Entry]:
        """Takes what ``lua/fetch.lua`` answers for this stream, but for the new entries."""
        _, wake_id, due_ms, more, again, fresh = found
        self._backlog.clock_ms = now_ms - wall_ms()
        self.wake_id = wake_id.decode()
        self.next_due = None if due_ms < 0 else mono_s() + max(0, int(due_ms) - now_ms) / 1000
        self.on_offer = bool(more)
        if again:
            self.absorb_again(again)
        return fresh  # type: ignore[no-any-return]

    def absorb(self, entries: Sequence[Entry]) -> None:
        """Takes new entries that were read, in the order of the stream; at least one."""
        self.last_id = entries[-1][0].decode()
        # Always through the buffer, also where the lane is closed: an earlier message of its key may still be there.
        arrived = self._decode(entries)
        self._backlog.buffer.extend(arrived if self._plain else self.first_of_their_ids(deliveries_of(arrived)))

    def absorb_again(self, entries: Iterable[tuple[bytes, list[bytes], bytes]]) -> None:
        """Takes entries, with their notes, that were given back, or whose consumers are gone."""
        notes: dict[bytes, Note] = {}
        plain: list[Entry] = []
        for entry_id, fields, note in entries:
            plain.append([entry_id, fields])
            if note:
                notes[entry_id] = Note.parse(note)
        found: list[Recovered] = []
        arrived = self.decode_again(self.readable(plain, notes))
        for delivery in self.first_of_their_ids(deliveries_of(arrived)):
            # What a worker gives back it has not begun. Who ends one of which nobody knows what ran leaves a note.
            delivery.fresh = self.room is not None and delivery.entry_id not in notes
            if delivery.entry_id in notes:
                self._backlog.adopt_note(delivery, notes[delivery.entry_id])
            found.append(delivery)
        self._backlog.place(found, False)

    def decode_again(self, entries: Sequence[Entry]) -> list[Delivery | Entry]:
        """Decodes entries that were delivered before, to a process that may have died of reading one. They are read
        one at a time, and it is written down which: so the next death tells the culprit from those beside it."""
        arrived: list[Delivery | Entry] = []
        for entry in entries:
            if self.reading is not None:
                self.reading.begin(entry[0])
            arrived += self._decode([entry])
            if self.reading is not None:
                self.reading.end()
        return arrived

    def readable(self, entries: Sequence[Entry], notes: Mapping[bytes, Note]) -> Sequence[Entry]:
        """Leaves out what takes its process down when it is read: it is a dead letter, unread. A body may do so
        ``max_crashes`` times, and what is charged once more is read again, and not run: so this was charged for that."""
        most = self._settings.max_crashes + 1
        deadly = [entry_id for entry_id, note in notes.items() if note.crashes > most and not note.held]
        if not deadly:
            return entries
        for entry_id in deadly:
            said = f"its process died {counted(notes[entry_id].crashes, 'time')}, at last while it was read"
            message = f"{said} (max_crashes is {self._settings.max_crashes})"
            self._backlog.dead.append(Dead(entry_id, Outcome(Kind.DEAD, reason="crashed", message=message)))
        return [entry for entry in entries if entry[0] not in deadly]

    def first_of_their_ids(self, arrived: list[Delivery]) -> list[Delivery]:
        """The dedupe middleware: leaves out deliveries whose id another entry carried first."""
        settings = self._settings
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
                doubles.update(self._claim_ids(ttl, deliveries[i : i + 100]))
        for entry_id in doubles:
            log.info(
                "left out a message that was appended twice queue=%s shard=%s entry=%s",
                self.fence.queue,
                self.fence.shard,
                entry_id.decode(),
            )
            self._backlog.finish(entry_id)
        return [delivery for delivery in arrived if delivery.entry_id not in doubles] if doubles else arrived

    def _claim_ids(self, ttl_ms: int, deliveries: list[Delivery]) -> list[bytes]:
        kind = f"f{ttl_ms}:{self.fence.group}"
        ids = [wire.pack_id(delivery.id) for delivery in deliveries]
        while True:
            layout = self._layouts.get(kind, "")
            keys = [self.fence.lease.key, self.fence.keys.state]
            for id16 in ids:
                keys += generation_keys(self.fence.keys, kind + ":", layout, id16)
            args: list[Any] = [
                self.fence.lease.token,
                self.fence.lease.incarnation,
                kind,
                ttl_ms,
                layout,
                self._settings.max_dedupe_ids,
            ]
            for id16, delivery in zip(ids, deliveries, strict=True):
                args += [id16, crc32(delivery.entry_id) & 0x7FFFFFFF]
            answer = self.fence.run("claim_ids", keys, args)
            if answer and answer[0] == Code.SEEN_LAYOUT:
                self._layouts[kind] = answer[1].decode()
                continue
            return [d.entry_id for d, runs in zip(deliveries, answer, strict=True) if not runs]

    def reread_notes(self) -> None:
        """Looks whether held lanes may open: their dead letter was replayed (no note) or dropped."""
        held = self._backlog.held_heads()
        if not held:
            return
        fence = self.fence
        ids = [head.entry_id for _, head in held]
        texts = fence.link.call(commands.fields(fence.keys.notes(fence.group), *ids))
        for (lane, head), text in zip(held, texts, strict=True):
            note = Note.parse(text) if text else Note()
            if note.held != 1:
                self._backlog.let_go(lane, head, note)

    def load(self, lacking: Lacking | None) -> None:
        """Reads the bodies that messages to be handed out lack, in one round trip."""
        if lacking is None:
            return
        replies = self.fence.link.pipeline(pack_reads(self.fence, lacking.ids))
        entries = [reply[0] for reply in replies if isinstance(reply, list) and reply]
        found = {entry_id for entry_id, _ in entries}
        bodies = {delivery.entry_id: delivery for delivery in deliveries_of(self._decode(entries))}
        for entry_id in lacking.ids:
            if entry_id not in found:
                log.warning(
                    "a waiting entry is gone from the stream queue=%s shard=%s entry=%s",
                    self.fence.queue, self.fence.shard, entry_id.decode(),
                )  # fmt: skip
                self._backlog.finish(entry_id)
        self._backlog.load(lacking, bodies)


def pack_fetch(streams: Sequence[Arrivals], most: int, new: bool) -> bytes:
    """The call that takes what there is in streams of one slot, ``most`` entries in all, the first stream's before others':
    what is due, what is on offer, and what is ``new``."""
    fence = streams[0].fence
    keys = tuple(key for stream in streams for key in stream.fetch_keys)
    args: list[str | int] = [*fence.head, fence.consumer_name, most, int(new), fence.voided]
    for stream in streams[1:]:
        args += [stream.fence.lease.token, stream.fence.voided]
    return script("fetch").pack(keys, tuple(args))


def pack_reads(fence: Fence, ids: Iterable[bytes]) -> list[bytes]:
    """The calls that read these entries again."""
    return [commands.entry(fence.keys.stream, entry_id) for entry_id in ids]
