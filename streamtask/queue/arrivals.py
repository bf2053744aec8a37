"""What comes to an owner: new entries, entries that were given back, notes that others changed. Each is decoded, looked at
by the dedupe middleware, and put in its place: behind what waits, or into its lane.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any
from zlib import crc32

from ..clock import mono_s, wall_ms
from ..errors import DecodeError
from ..redis import wire
from ..redis.link import Link
from ..redis.scripts import Code
from ..redis.wire import Note, id_order
from ..text import counted, logger
from .delivery import Delivery, Entry, Outcome, deliveries_of
from .fetcher import pack_fetch
from .lanes import Lane
from .seen import generation_keys
from .settler import Settling

log = logger("streamtask.consumer")


class Arrivals(Settling):
    """See the module."""

    def has_room(self) -> bool:
        """Whether to read more: half a fetch is left at most, and not too much waits."""
        if self.closing or self.halted or self.needs_audit or len(self.buffer) > self.settings.fetch_count // 2:
            return False
        if self.room == 0:
            return False  # others may run it sooner
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

    def fetch(self, link: Link, most: int, *, new: bool = True) -> list[Entry]:
        """Moves what is due, learns when the next is, and takes up to ``most`` of the
        entries that were given back or whose consumers are gone (shared streams). Answers the ``new`` ones, of which
        there may be as many as are left of ``most``: to be absorbed."""
        now_ms, found = self._owned(link.call(pack_fetch([self], most, new)))
        return self.take_found(link, int(now_ms), found)

    def look(self, link: Link) -> None:
        """Looks at all that a wake may tell of."""
        self.fetch(link, self.read_count() if self.lease.shared and self.has_room() else 0, new=False)
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
        notes: dict[bytes, Note] = {}
        plain: list[Entry] = []
        for entry_id, fields, note in entries:
            plain.append([entry_id, fields])
            if note:
                notes[entry_id] = Note.parse(note)
        found: list[Delivery | tuple[Hashable, bytes]] = []
        arrived = self._decode_again(self._readable(plain, notes))
        for delivery in self._first_of_their_ids(link, deliveries_of(arrived)):
            # What a worker gives back it has not begun. Who ends one of which nobody knows what ran leaves a note.
            delivery.fresh = self.room is not None and delivery.entry_id not in notes
            if delivery.entry_id in notes:
                self._take_note(delivery, notes[delivery.entry_id])
            found.append(delivery)
        self._place_recovered(found, False)

    def _decode_again(self, entries: Sequence[Entry]) -> list[Delivery | Entry]:
        """As ``_decode``, of entries that were delivered before, to a process that may have died of reading one. They are read
        one at a time, and it is written down which: so the next death tells the culprit from those beside it."""
        arrived: list[Delivery | Entry] = []
        for entry in entries:
            if self.reading is not None:
                self.reading.begin(entry[0])
            arrived += self._decode([entry])
            if self.reading is not None:
                self.reading.end()
        return arrived

    def _decode(self, entries: Sequence[Entry]) -> list[Delivery | Entry]:
        """Decodes entries ``[id, fields]``. What can't be decoded is left to be a dead letter."""
        arrived: list[Delivery | Entry] | None = None  # the entries themselves, up to the first unusual one
        unordered, largest = self.settings.unordered, self.settings.max_message_bytes
        unpack, hook, few, most = wire.unpackb, wire.ext_hook, wire.MOST_ALIKE, -1 if unordered else largest
        for position, entry in enumerate(entries):
            fields = entry[1]
            # What nearly all messages are is seen here, in place of a call of ``decode`` for each.
            envelope = None
            try:
                name, data = fields
                if len(data) <= most:
                    envelope = unpack(data, ext_hook=hook, strict_map_key=False, max_map_len=few)
                    task, key, message_id, args, kwargs, headers = envelope
                    if (
                        headers is None
                        and type(key) is bytes
                        and type(args) is list
                        and type(kwargs) is dict
                        and type(message_id) is bytes
                        and type(task) is str
                        and name == b"m"
                    ):
                        entry[1] = envelope
                        if arrived is not None:
                            arrived.append(entry)
                        continue
            except Exception:
                pass
            if arrived is None:
                arrived = list(entries[:position])
            entry_id = entry[0]
            replayed_for = wire.replayed_for(fields) if len(fields) > 2 else None
            if replayed_for not in (None, self._group, b"1"):
                self._finish(entry_id)  # the dead letter of another group; this one has dealt with the message
                continue
            try:
                if envelope is None and (size := max(map(len, fields), default=0)) > largest:
                    raise DecodeError(f"it has {size} bytes; max_message_bytes is {largest}")
                envelope = wire.decode(fields, envelope, self.settings.accepts)
            except DecodeError as exc:
                self._dead.append((entry_id, [], Outcome("dead", reason="undecodable", message=str(exc))))
                continue
            delivery = Delivery(entry_id, envelope)
            if unordered and delivery.task in unordered:
                delivery.lane = None
            delivery.replayed = replayed_for is not None
            arrived.append(delivery)
        return list(entries) if arrived is None else arrived

    def _readable(self, entries: Sequence[Entry], notes: Mapping[bytes, Note]) -> Sequence[Entry]:
        """Leaves out what takes its process down when it is read: it is a dead letter, unread. A body may do so
        ``max_crashes`` times, and what is charged once more is read again, and not run: so this was charged for that."""
        most = self.settings.max_crashes + 1
        deadly = [entry_id for entry_id, note in notes.items() if note.crashes > most and not note.held]
        if not deadly:
            return entries
        for entry_id in deadly:
            said = f"its process died {counted(notes[entry_id].crashes, 'time')}, at last while it was read"
            message = f"{said} (max_crashes is {self.settings.max_crashes})"
            self._dead.append((entry_id, [], Outcome("dead", reason="crashed", message=message)))
        return [entry for entry in entries if entry[0] not in deadly]

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

    def _is_fresh(self, delivery: Delivery) -> bool:
        # What is found pending in a shared stream may be what somebody gave back, and the reply with it was lost.
        return not self.lease.shared and id_order(delivery.entry_id) > self._others_to

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
        if found and self.lease.shared:
            last = max(id_order(item[1] if isinstance(item, tuple) else item.entry_id) for item in found)
            self._again_to = max(self._again_to, last)
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
        waiting, self.buffer = self.buffer, deque()
        for delivery in sorted(deliveries_of(waiting), key=lambda d: id_order(d.entry_id)):
            lane = self.lanes.get(delivery.lane_key)
            if lane is None:
                self.buffer.append(delivery)
            else:
                # Later ones of its key may wait there, and lanes are served before the buffer.
                self.lanes.add(lane, delivery)

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
