"""What an owner has read of its shard (or shared stream) and has not ended: what waits, what is handed out, what has ended and
is to be written. In memory alone.

Nothing here talks to Redis. What has to be read before messages can be handed out (``lacking``) and what has to be written
before they start (``to_mark``) is answered to whoever has a connection; what is left to write lies in ``finished``, ``notes``
and ``dead``. Used by one thread; ``halted`` alone is also set by executors.

To hand out: ``lacking`` and ``load``; ``choose`` or ``choose_free``; ``to_mark``; then ``hand`` or ``hand_free``, or
``put_back`` where the marks could not be written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, final

from ..clock import mono_s, wall_ms
from ..redis import wire
from ..redis.wire import Note, id_order
from ..text import counted, logger
from .delivery import CLOSES, Dead, Delivery, Entry, Kind, Outcome, deliveries_of, entry_id_of, lacks_body
from .lanes import KEEP_BODIES, Lane, LaneSet, put_in_place
from .rules import ConsumerSettings

log = logger("streamtask.consumer")

PAUSE_S, LONGEST_PAUSE_S = 0.01, 10.0
"""How long what a body gives back waits: the first time, and at most; it doubles each time."""

Recovered = Delivery | tuple[Hashable, bytes]
"""An entry that was pending: whole, or of one that is to wait as a bare id, its lane's key and its id."""


@dataclass(slots=True)
class Lacking:
    """What has to be read before messages can be handed out: entry ids, and how many of the first of which lanes they are."""

    ids: Collection[bytes]
    of: list[tuple[Lane, int]]


class Lease(Protocol):
    """What has to be known here of the owner's lease. See ``coordination.lease.Lease``."""

    token: int
    shared: bool
    by_expiry: bool


class Batch:
    """Deliveries handed out together: to be run one after the other, or side by side, of different lanes.

    ``collected`` of them are known to have ended. In sequence, ``outcomes`` has (position, outcome) of those that did not end
    well, ``reopened`` the keys that the executor skips no longer; ``mixed``: not in the order of the stream. Side by side,
    ``ended`` has the positions of all that have ended, as they did, and ``odd`` the outcomes of those that did not end well.
    """

    __slots__ = (
        "backlog", "collected", "end", "ended", "ids", "items", "mixed", "number", "odd", "outcomes", "reopened", "results",
        "seen", "slot",
    )  # fmt: skip

    def __init__(
        self, backlog: Backlog, number: int, items: Sequence[Delivery | Entry], reopened: list[Hashable]
    ) -> None:
        self.backlog = backlog
        self.number = number
        self.items = items
        self.ids: list[bytes] = [item[0] if type(item) is list else item.entry_id for item in items]  # type: ignore[union-attr]
        self.end = len(self.ids)  # from there on nothing begins any more
        self.reopened = reopened
        self.mixed = False
        self.collected = 0
        self.seen = 0  # outcomes that were dealt with
        self.outcomes: list[tuple[int, Outcome]] = []
        self.ended: list[int] | None = None
        self.odd: dict[int, Outcome] = {}
        self.results: list[tuple[Delivery, Any]] = []
        self.slot: Any = None  # where its executor writes down which one runs

    def delivery(self, index: int) -> Delivery:
        item = self.items[index]
        return Delivery(*item) if type(item) is list else item  # type: ignore[return-value]

    @property
    def deliveries(self) -> list[Delivery]:
        return deliveries_of(self.items)

    def left(self) -> Iterable[int]:
        """The positions of those that are not known to have ended."""
        if self.ended is None:
            return range(self.collected, len(self.ids))
        over = set(self.ended[: self.collected])
        return (position for position in range(len(self.ids)) if position not in over)

    def take_results(self) -> list[tuple[Delivery, Any]]:
        """What executors have put there so far."""
        count = len(self.results)
        taken = self.results[:count]
        del self.results[:count]  # what is put there meanwhile stays
        return taken


@final
class Backlog:
    """See the module.

    ``marks``: what was another owner's is only handed out after it is written down that it starts, one by one where they
    run in sequence: should this process end then, it is known what did that. ``ran``: what a message did when its process died.
    """

    def __init__(
        self,
        lease: Lease,
        queue: str,
        shard: int | str,
        settings: ConsumerSettings,
        *,
        marks: bool = True,
        ran: str = "the body ran",
    ) -> None:
        self.lease = lease
        self.queue = queue
        self.shard = shard
        self.settings = settings
        self.number = -1
        """Which of its process' leases this is, as their keeper numbers them."""
        self.halted = False
        """Nothing is handed out, nor begun of what was."""
        self.closing = False
        """It is to be given to another owner."""
        self.revoked: set[bytes | str] = set()
        self.clock_ms = 0  # what to add to wall_ms() to get Redis' clock
        self.lanes = LaneSet()
        self.buffer: deque[Delivery | Entry] = deque()  # what was read, in its order
        self.handed: dict[int, Batch] = {}
        self.finished: list[bytes] = []
        """What has ended and is not sent to be acknowledged yet."""
        self.finished_since = 0.0
        self.notes: list[tuple[bytes, Note]] = []
        """What is to be written beside pending entries."""
        self.dead: list[Dead] = []
        """What is to go to the dead letters. Its lane is closed until then."""
        self.left_out: list[Delivery] = []
        """Revoked messages, which have ended, until somebody has seen to their results."""
        self.others_to = (0, 0)
        """Up to this entry, what is pending was given to another owner before."""
        self._again_to = (0, 0)  # up to this entry of a shared stream, what was another's lies among what is new
        self._marks = marks and (lease.by_expiry or lease.shared)
        self._ran = ran
        self._in_order = True  # finished
        self._closed: set[Hashable] = set()  # keys that a sequential executor skips until a batch reopens them
        self._numbers = 0

    def __repr__(self) -> str:
        return f"<Backlog {self.queue}/{self.shard} token={self.lease.token}>"

    # What is held

    def redis_ms(self) -> int:
        """Redis' clock, in ms."""
        return wall_ms() + self.clock_ms

    def entry_ids(self) -> set[bytes]:
        """The ids of all entries that lie here: buffered, waiting, running, or ended and not sent to be written."""
        held = {entry_id_of(item) for item in self.buffer}
        held.update(self.lanes.entry_ids())
        for batch in self.handed.values():
            held.update(batch.ids[position] for position in batch.left())
        held.update(self.finished)
        held.update(dead.entry_id for dead in self.dead)
        return held

    def notable(self) -> Iterator[Delivery]:
        """Those held that may have a note."""
        yield from (item for item in self.buffer if isinstance(item, Delivery))
        for lane in self.lanes.lanes.values():
            yield from (item for item in lane.waiting if isinstance(item, Delivery))
        for batch in self.handed.values():
            yield from (item for i in batch.left() if isinstance(item := batch.items[i], Delivery))

    def has_work(self) -> bool:
        return not self.halted and not self.closing and (bool(self.buffer) or self.lanes.has_ready())

    def has_writes(self) -> bool:
        """Whether there are notes or dead letters to write."""
        return bool(self.notes or self.dead)

    def room(self) -> int:
        """How many more messages may wait here."""
        return self.settings.max_waiting - self.lanes.waiting - len(self.buffer)

    # What comes

    def finish(self, entry_id: bytes) -> None:
        """An entry has ended: it is to be acknowledged."""
        if not self.finished:
            self.finished_since = mono_s()
        self.finished.append(entry_id)
        self._in_order = False

    def adopt_note(self, delivery: Delivery, note: Note) -> None:
        """Gives a message what stood beside its entry."""
        delivery.note = note
        if note.mark and note.mark != self.lease.token:
            # An owner that vanished had written down that it starts this body: that owner's end is charged to it.
            if self.lease.by_expiry or self.lease.shared:
                note.crashes += 1
            note.mark = 0

    def is_fresh(self, entry_id: bytes) -> bool:
        """Whether an entry that was found pending was never another owner's."""
        # What is found pending in a shared stream may be what somebody gave back, and the reply with it was lost.
        return not self.lease.shared and id_order(entry_id) > self.others_to

    def place(self, found: list[Recovered], many: bool) -> None:
        """Puts entries that were pending into their places. ``many``: into lanes, where most of them are kept as bare ids."""
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

    # Lanes that are held by a dead letter

    def held_heads(self) -> list[tuple[Lane, Delivery]]:
        """The lanes that are closed until their dead letter is replayed or dropped."""
        held: list[tuple[Lane, Delivery]] = []
        for lane in self.lanes.lanes.values():
            head = lane.waiting[0] if lane.waiting else None
            if isinstance(head, Delivery) and head.note is not None and head.note.held == 1:
                held.append((lane, head))
        return held

    def let_go(self, lane: Lane, head: Delivery, note: Note) -> None:
        """A dead letter was replayed, or dropped: so this stands beside it."""
        head.note = note
        if note.held == 2:
            self.lanes.pop(lane)
            self.finish(head.entry_id)
        self.lanes.open(lane)

    # Handing out

    def lacking(self, limit: int, *, in_sequence: bool) -> Lacking | None:
        """The bodies that have to be read before up to ``limit`` messages are handed out: those that the first ready lanes
        lack. Of a lane that lacks one, the next some are read with it."""
        per_lane = 1
        lanes = self.lanes.peek_ready()
        if in_sequence:
            per_lane, oldest_out = limit, self._oldest_out()
            lanes = (lane for lane in lanes if lane.closed_by < oldest_out)
        wanted: dict[bytes, None] = {}
        of: list[tuple[Lane, int]] = []
        for lane in lanes:
            if limit <= 0:
                break
            count = min(per_lane, limit, len(lane.waiting))
            limit -= count
            if any(map(lacks_body, islice(lane.waiting, count))):
                count = max(count, KEEP_BODIES)
                of.append((lane, count))
                wanted.update((entry_id_of(item), None) for item in islice(lane.waiting, count) if lacks_body(item))
        return Lacking(wanted, of) if wanted else None

    def load(self, lacking: Lacking, bodies: Mapping[bytes, Delivery]) -> None:
        """Takes the bodies that were lacking. Those that were not found are gone."""
        for delivery in bodies.values():
            delivery.fresh = self.is_fresh(delivery.entry_id)
        for lane, count in lacking.of:
            self.lanes.load(lane, count, bodies)

    def run_on(self, limit: int) -> Batch | None:
        """The next run of the stream as a batch, if nothing has to come before it: the common case. Else ``choose``."""
        buffer = self.buffer
        if self.lanes.lanes or self.revoked or not buffer or not self._all_fresh():
            return None
        items: list[Delivery | Entry]
        if len(buffer) <= limit:
            items = list(buffer)
            buffer.clear()
        else:
            items = [buffer.popleft() for _ in range(limit)]
        return self._hand(items, self._reopen(deliveries_of(items)) if self._closed else [])

    def choose(self, limit: int, may_mark: bool) -> tuple[list[Delivery], bool]:
        """What to run next in sequence, up to ``limit`` messages, and whether they are not in the order of the stream.
        ``may_mark`` False: nothing that needs a start mark, for it would not start at once."""
        chosen: list[Delivery] = []
        if self.lanes.has_ready():
            self._choose_from_lanes(limit, chosen, may_mark)
        mixed = bool(chosen)
        if not chosen or (not self._needs_mark(chosen[0]) and len(chosen) < limit):
            self._choose_from_buffer(limit, chosen, may_mark)
        return chosen, mixed

    def choose_free(self, limit: int, at_once: int | None = None) -> list[Delivery | Entry]:
        """What to run next side by side: up to ``limit`` messages of different lanes, each of which is closed until its message
        has ended. ``at_once``: how many of them start at once, where not all do: what needs a start mark is among these, for
        whoever dies is charged with it."""
        chosen: list[Delivery | Entry] = []
        again: list[Lane] = []
        for lane in self.lanes.ready():
            head = lane.waiting[0] if lane.waiting else None
            if isinstance(head, bytes) or (head is not None and head.spent):
                again.append(lane)
                continue
            if head is not None and self._must_wait(head, len(chosen), at_once):
                again.append(lane)
                break
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
        buffer, lanes, start = self.buffer, self.lanes.lanes, self.lanes.start
        while buffer and len(chosen) < limit:
            item = buffer[0]
            if type(item) is list and not self.revoked:
                # As nearly all are: new, and nothing is known of it.
                buffer.popleft()
                key = item[1][1]
                if key is not None:
                    if key in lanes:
                        self.lanes.add(lanes[key], Delivery(*item))
                        continue
                    start(key)
                chosen.append(item)
                continue
            delivery = Delivery(*item) if isinstance(item, list) else item
            if self._must_wait(delivery, len(chosen), at_once):
                break
            buffer.popleft()
            lane_or_none = self.lanes.get(delivery.lane_key)
            if lane_or_none is not None:
                self.lanes.add(lane_or_none, delivery)
                continue
            if self._may_run(delivery):
                if delivery.lane is not None:
                    start(delivery.lane_key)
                chosen.append(delivery)
        return chosen

    def to_mark(self, chosen: Iterable[Delivery | Entry]) -> list[tuple[bytes, Note]]:
        """The notes that say of what was chosen that it starts: to be written before it is handed out."""
        if not self._marks:
            return []
        notes = []
        for delivery in chosen:
            if isinstance(delivery, Delivery) and self._needs_mark(delivery):
                note = delivery.note = delivery.note or Note()
                note.mark = self.lease.token
                notes.append((delivery.entry_id, note))
        return notes

    def hand(self, chosen: list[Delivery], mixed: bool) -> Batch:
        """What was chosen, to be run in sequence."""
        batch = self._hand(chosen, self._reopen(chosen))
        batch.mixed = mixed
        return batch

    def hand_free(self, chosen: Sequence[Delivery | Entry]) -> Batch | None:
        """What was chosen, to be run side by side."""
        if not chosen:
            return None
        batch = self._hand(chosen, [])
        batch.ended = []
        return batch

    def hand_singly(self, chosen: Iterable[Delivery | Entry]) -> list[Batch]:
        """What was chosen, each in a batch of its own."""
        return [self._hand([delivery], []) for delivery in deliveries_of(chosen)]

    def _oldest_out(self) -> int:
        return min(self.handed, default=self._numbers + 1)

    def _reopen(self, chosen: Iterable[Delivery]) -> list[Hashable]:
        """The keys of a batch that a sequential executor still skips, and is to skip no longer."""
        if not self._closed:
            return []
        reopened = [d.lane for d in chosen if d.lane in self._closed]
        self._closed.difference_update(reopened)
        return reopened

    def _choose_from_lanes(self, limit: int, chosen: list[Delivery], may_mark: bool) -> None:
        again: list[Lane] = []
        oldest_out = self._oldest_out()
        for lane in self.lanes.ready():
            if lane.closed_by >= oldest_out:
                # A batch that may still hold messages of this key is out: it has to come back first.
                again.append(lane)
                continue
            while lane.waiting and len(chosen) < limit and not lane.closed:
                head = lane.waiting[0]
                if not isinstance(head, Delivery) or head.spent:
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

    def _choose_from_buffer(self, limit: int, chosen: list[Delivery], may_mark: bool) -> None:
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

    def _hand(self, items: Sequence[Delivery | Entry], reopened: list[Hashable]) -> Batch:
        self._numbers += 1
        batch = Batch(self, self._numbers, items, reopened)
        self.handed[batch.number] = batch
        return batch

    def _all_fresh(self) -> bool:
        """Whether nothing that lies ready was delivered to another owner before: what was comes first, but in a shared stream
        what is on offer may come behind new messages."""
        first = self.buffer[0]
        if not isinstance(first, list) and not first.fresh:
            return False
        return not self.lease.shared or id_order(entry_id_of(first)) > self._again_to

    def _must_wait(self, delivery: Delivery, before: int, at_once: int | None) -> bool:
        return at_once is not None and before >= at_once and self._needs_mark(delivery)

    def _needs_mark(self, delivery: Delivery) -> bool:
        return self._marks and not delivery.fresh

    def _may_run(self, delivery: Delivery) -> bool:
        """False for what must not run: revoked, or crashed its process too often. What becomes of it is seen to."""
        if self.revoked and delivery.id in self.revoked:
            log.info(
                "left out a revoked message queue=%s shard=%s id=%s", self.queue, self.shard, wire.id_text(delivery.id)
            )
            self._leave_out(delivery)
            return False
        note = delivery.note
        if note is not None and note.crashes > self.settings.max_crashes:
            self.bury(delivery, Outcome(Kind.DEAD, reason="crashed", message=self.too_many_crashes(note)))
            return False
        return True

    def too_many_crashes(self, note: Note) -> str:
        died = f"its process died {counted(note.crashes, 'time')} while {self._ran}"
        return f"{died} (max_crashes is {self.settings.max_crashes})"

    def _leave_out(self, delivery: Delivery) -> None:
        self.finish(delivery.entry_id)
        self.left_out.append(delivery)

    # What comes back

    def cut_off(self, batch: Batch, position: int) -> None:
        """What a batch was not to start any more, from there on, waits here again."""
        left = batch.items[position:]
        batch.items, batch.ids = batch.items[:position], batch.ids[:position]
        self.put_back(deliveries_of(left))

    def put_back(self, deliveries: Iterable[Delivery]) -> None:
        """What was chosen or handed out, and has not begun, waits here again, in its place."""
        for delivery in deliveries:
            lane = self.lanes.get(delivery.lane_key)
            if lane is not None:
                was_running = lane.running
                self.lanes.add(lane, delivery)
                if was_running:
                    self.lanes.open(lane)
            else:
                put_in_place(self.buffer, delivery)

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

    def collect_free(self, batch: Batch) -> int:
        """Takes note of what has ended since the last look of a batch of ``hand_free``: its lanes open. Answers how many of
        these have run."""
        assert batch.ended is not None
        ended = batch.ended[batch.collected :]
        if not ended:
            return 0
        batch.collected += len(ended)
        if not self.finished:
            self.finished_since = mono_s()
        self._in_order = False
        items, odd, lanes, ran = batch.items, batch.odd, self.lanes, len(ended)
        for position in ended:
            item = items[position]
            if odd and (outcome := odd.pop(position, None)) is not None:
                delivery = batch.delivery(position)
                self._apply(delivery, outcome)
                lanes.finish(delivery.lane_key)
                ran -= outcome.kind is Kind.UNSTARTED
            elif type(item) is list:
                self.finished.append(item[0])
                if (key := item[1][1]) is not None:
                    lanes.finish(key)
            elif isinstance(item, Delivery):
                self.finished.append(item.entry_id)
                lanes.finish(item.lane_key)
        self._closed.clear()  # which only a sequential executor needs
        if batch.collected == len(batch.ids):
            del self.handed[batch.number]
        return ran

    def complete_singly(self, batch: Batch) -> None:
        """As ``complete``, for a batch of ``hand_singly``."""
        self._in_order = False
        self.complete(batch)
        self._closed.clear()  # which only a sequential executor needs
        for delivery in batch.deliveries:
            self.lanes.finish(delivery.lane_key)

    def let_wait(self, delivery: Delivery, wait_s: float) -> None:
        """A message is to be handed out after a while; its key waits for it."""
        self.lanes.close(delivery.lane_key, delivery, mono_s() + wait_s, self._numbers)

    def bury(self, delivery: Delivery, outcome: Outcome) -> None:
        """A message goes to the dead letters; its lane is closed until it lies there."""
        self.dead.append(Dead(delivery, outcome))
        self.lanes.close(delivery.lane_key, None, None, self._numbers)

    def buried(self, dead: Dead, held: Note | None) -> None:
        """A dead letter is stored. Its lane opens, unless this note was written: then it is held."""
        delivery = dead.delivery
        if delivery is None:
            return
        if held is not None:
            delivery.note = held
            self.lanes.close(delivery.lane_key, delivery, None)
        elif (lane := self.lanes.get(delivery.lane_key)) is not None:
            self.lanes.open(lane)

    def _apply(self, delivery: Delivery, outcome: Outcome) -> None:
        kind = outcome.kind
        if kind is Kind.IGNORED:
            self.finish(delivery.entry_id)
            return
        if kind is Kind.REVOKED:
            self._leave_out(delivery)
            return
        if kind in (Kind.RETRY, Kind.AGAIN, Kind.DEAD):
            delivery.spent = True
        if kind in CLOSES and delivery.lane is not None:
            self._closed.add(delivery.lane_key)
        note = delivery.note
        if note is not None and note.mark and kind not in (Kind.RETRY, Kind.DEAD):
            # It waits again: should this process end before its body begins, that is none of its crashes.
            note.mark = 0
            self.notes.append((delivery.entry_id, note))
        if kind is Kind.RETRY:
            note = delivery.note = delivery.note or Note()
            note.attempt += 1
            note.held = 0
            note.due_ms = self.redis_ms() + max(0, int(outcome.delay_s * 1000))
            note.mark = 0
            self.notes.append((delivery.entry_id, note))
            self.let_wait(delivery, max(0.0, outcome.delay_s))
        elif kind is Kind.LATER:
            self.let_wait(delivery, outcome.delay_s)
        elif kind is Kind.AGAIN:
            delivery.given_back += 1
            self.let_wait(delivery, min(PAUSE_S * 2 ** min(delivery.given_back - 1, 20), LONGEST_PAUSE_S))
        elif kind is Kind.DEAD:
            self.bury(delivery, outcome)
        else:
            self.put_back((delivery,))

    # What is given away

    def waits(self) -> bool:
        """Whether something lies ready that has not begun, and that others could run (shared streams)."""
        return bool(self.buffer) or any(isinstance(lane.key, tuple) for lane in self.lanes.peek_ready())

    def give_away(self) -> list[bytes]:
        """What lies ready of a shared stream and has not begun, in its order: it lies here no longer."""
        items: list[Delivery | Entry | bytes] = list(self.buffer)
        self.buffer.clear()
        for lane in list(self.lanes.ready()):
            if isinstance(lane.key, tuple):  # of one message, that waited for its retry
                while lane.waiting:
                    items.append(self.lanes.pop(lane))
                self.lanes.drop(lane)
            else:
                self.lanes.open(lane)
        return sorted(map(entry_id_of, items), key=id_order)

    # What is written

    def next_finished(self, most: int) -> list[bytes]:
        """The first of what has ended, to be acknowledged: it is no longer among ``finished``."""
        if not self._in_order:
            self.finished.sort(key=id_order)
            self._in_order = True
        first, self.finished = self.finished[:most], self.finished[most:]
        self.finished_since = mono_s()
        return first

    def still_finished(self, ids: list[bytes]) -> None:
        """What was to be acknowledged is not known to be."""
        self.finished = ids + self.finished
        self._in_order = False
