"""A stream in the hands of this process, as the kombu transport uses it: messages end one by one, in any order, and a key's
next message is handed out only when Redis has answered that the one before is finished, or what replaces it."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, final

from ..coordination.lease import Lease
from ..errors import ReplyError
from ..queue.arrivals import Arrivals
from ..queue.backlog import Backlog, Batch
from ..queue.claimer import Claimer
from ..queue.decoder import Decoder
from ..queue.delivery import Dead, Delivery, Entry, Kind, Outcome, entry_id_of
from ..queue.fence import Fence, LinksByKey
from ..queue.rules import ConsumerSettings
from ..queue.settler import Settler
from ..redis import commands, wire
from ..redis.scripts import script
from ..redis.wire import Note, id_order
from .message import ORDERED, check
from .resting import Rest

COLD_S = (0.005, 0.1)
"""How often a shard is read that has nothing, while messages come from elsewhere: the interval doubles. A process that has
nothing at all to do waits for a bell, which rings for all of them."""


@final
class StreamConsumer:
    """Of a shard, or of one shared stream. Its parts are those of ``queue.consumer.ShardConsumer``."""

    def __init__(
        self, lease: Lease, queue: str, shard: int | str, settings: ConsumerSettings, links: LinksByKey
    ) -> None:
        self.lease = lease
        self.keys = lease.keys
        self.queue = queue
        self.shard = shard
        self.fence = Fence(lease, queue, shard, links)
        # What is handed out need not run: see ``mark``.
        self.backlog = Backlog(lease, queue, shard, settings, marks=False, ran="it was received or its body ran")
        pack = None if lease.shared else self._pack_settle
        self.settler = Settler(self.backlog, self.fence, pack=pack, settled=self._settled)
        self._decoder = Decoder(self.backlog, lease.group)
        self.arrivals = Arrivals(self.backlog, self.fence, self._decode)
        self.claimer = Claimer(self.backlog, self.fence, self.settler, self.arrivals)
        self.taken_over = False
        """Whether what is pending was another owner's."""
        self.woken = True
        """Whether the shard's bell rang for something else than a message."""
        self.read_at = 0.0
        """When (monotonic) to read again: a shard that had nothing is not asked each time."""
        self.rest = Rest()
        self._cold_s = COLD_S[0]
        self._ended: dict[bytes, Delivery] = {}  # acknowledged, and Redis has not answered yet
        self._generations: dict[bytes, int] = {}  # of those whose replacement was handed out
        self._replacements: dict[bytes, tuple[int, bytes]] = {}  # generation, envelope
        self._returned: list[bytes] = []  # to be put on offer (shared streams)
        self._unmarked: list[bytes] = []
        self._replaced_key = self.keys.replaced(lease.group)

    # What comes

    def generation(self, entry_id: bytes) -> int:
        return self._generations.get(entry_id, 0)

    def _decode(self, entries: Sequence[Entry]) -> list[Delivery | Entry]:
        arrived: list[Delivery | Entry] = []
        for entry in entries:
            replacement = self._replacements.get(entry[0])
            if replacement is not None:
                entry = [entry[0], [wire.MSGPACK, replacement[1]]]
            for delivery in self._decoder([entry]):
                item = Delivery(*delivery) if isinstance(delivery, list) else delivery
                try:
                    check(item.args)
                except Exception as exc:
                    outcome = Outcome(Kind.DEAD, reason="undecodable", message=str(exc))
                    self.backlog.dead.append(Dead(item, outcome))
                    continue
                if replacement is not None:
                    self._generations[item.entry_id] = replacement[0]
                if len(item.args) == 5 and item.args[3].get(ORDERED) is False:
                    item.lane = None
                arrived.append(item)
        return arrived

    def recover(self, *, takeover: bool) -> int:
        """See ``Claimer.recover``."""
        if not self.lease.shared:
            stored = self.fence.link.call(commands.all_fields(self._replaced_key))
            for entry_id, text in commands.pairs(stored).items():
                generation, _, envelope = _parse(text)
                if generation:
                    self._replacements[entry_id] = generation, envelope
        elif not takeover:
            # Before any of it is fetched again: then it would be on offer while it is worked on.
            self.settler.write_notes()
            self._remove_marks()
            self._put_on_offer()
        count = self.claimer.recover(takeover=takeover, beside=self._returned)
        self._suspects_first()
        return count

    def receive(self, now_ms: int, found: Sequence[Any]) -> list[Entry]:
        """Takes what ``lua/fetch.lua`` answers for this stream. Answers the new entries, which lie ready then."""
        fresh = self.arrivals.receive(now_ms, found)
        if found[4]:
            self._suspects_first()
        if fresh:
            self.arrivals.absorb(fresh)
        return fresh

    # What goes out

    def hand_out(self, limit: int) -> list[Batch]:
        """Up to ``limit`` messages of different keys, each a batch of its own."""
        backlog = self.backlog
        if backlog.halted or backlog.closing:
            return []
        self.arrivals.load(backlog.lacking(limit, in_sequence=False))
        return backlog.hand_singly(backlog.choose_free(limit))

    # Ends of messages

    def end(self, batch: Batch) -> None:
        """A message was acknowledged. Its lane opens when Redis has answered."""
        delivery = batch.deliveries[0]
        self.backlog.handed.pop(batch.number, None)
        self._ended[delivery.entry_id] = delivery
        self.backlog.finish(delivery.entry_id)

    def reject(self, batch: Batch, why: str = "", reason: str = "rejected") -> None:
        """A message goes to the dead letters."""
        note = batch.deliveries[0].note
        if note is not None and note.crashes > self.backlog.settings.max_crashes:
            said = f"{self.backlog.too_many_crashes(note)}: {why}" if why else self.backlog.too_many_crashes(note)
            outcome = Outcome(Kind.DEAD, reason="crashed", message=said)
        else:
            outcome = Outcome(Kind.DEAD, reason=reason, message=why or "the consumer rejected it")
        batch.outcomes.append((0, outcome))
        self.backlog.complete_singly(batch)

    def is_suspect(self, delivery: Delivery) -> bool:
        """Whether a message has been charged so often that it has to be told from those beside it."""
        return delivery.note is not None and delivery.note.crashes >= max(1, self.backlog.settings.max_crashes - 1)

    def _suspects_first(self) -> None:
        """While nothing runs beside them it is known what they do. None overtakes a message of its key."""
        suspects: list[Delivery | Entry] = []
        others: list[Delivery | Entry] = []
        before: set[Hashable] = set()
        for item in self.backlog.buffer:
            if isinstance(item, Delivery) and item.lane_key not in before and self.is_suspect(item):
                suspects.append(item)
            else:
                others.append(item)
                before.add((Delivery(*item) if isinstance(item, list) else item).lane_key)
        if suspects:
            self.backlog.buffer = deque([*suspects, *others])

    def charge(self, batch: Batch) -> bool:
        """A message took its process down: True if that was once too often, else the count is kept beside the entry."""
        delivery = batch.deliveries[0]
        note = delivery.note = delivery.note or Note()
        note.crashes += 1
        if note.crashes > self.backlog.settings.max_crashes:
            return True
        self.backlog.notes.append((delivery.entry_id, note))
        return False

    def mark(self, batch: Batch) -> None:
        """The body of a message starts in this process: whoever has it next, if this process dies, counts a crash. Raises
        ``BrokerUnavailable``, ``LeaseLost``."""
        delivery = batch.deliveries[0]
        note = delivery.note = delivery.note or Note()
        note.mark = self.lease.token
        self.settler.write([(delivery.entry_id, note)])

    def unmark(self, batch: Batch) -> None:
        """The process was told to end, or what ran has ended: nothing is to be counted."""
        delivery = batch.deliveries[0]
        if delivery.note is not None and delivery.note.mark:
            delivery.note.mark = 0
            self._unmarked.append(delivery.entry_id)

    def give_back(self, batch: Batch) -> None:
        """A message is to be delivered again: at the head of its lane, or, from a shared stream, by whoever comes first."""
        delivery = batch.deliveries[0]
        delivery.fresh = False
        self.unmark(batch)
        if self.lease.shared:
            self.backlog.handed.pop(batch.number, None)
            self.backlog.lanes.finish(delivery.lane_key)
            self._returned.append(delivery.entry_id)
            return
        batch.outcomes.append((0, Outcome(Kind.LATER)))
        self.backlog.complete_singly(batch)

    def put_off(self, batch: Batch, wait_s: float) -> None:
        """A message is to be delivered again after a while, by this process; its key waits for it."""
        delivery = batch.deliveries[0]
        self.backlog.handed.pop(batch.number, None)
        self.backlog.let_wait(delivery, wait_s)

    def give_back_all(self) -> None:
        """All that was read and not handed out goes back (shared streams)."""
        for lane in list(self.backlog.lanes.lanes.values()):
            while lane.waiting:  # it was put off
                self._returned.append(entry_id_of(self.backlog.lanes.pop(lane)))
            if not lane.running:
                self.backlog.lanes.drop(lane)
        self._returned += map(entry_id_of, self.backlog.buffer)
        self.backlog.buffer.clear()

    def replaced(self, batch: Batch) -> Delivery | None:
        """What is to be delivered in place of a message that comes again: a retry may have been stored before its process
        died. None if that is not due yet."""
        delivery = batch.deliveries[0]
        text = self.fence.link.call(commands.field(self._replaced_key, delivery.entry_id))
        if text is None or _parse(text)[0] <= self.generation(delivery.entry_id):
            return delivery
        following, due_ms = self._replace(delivery.entry_id, text)
        wait_s = (due_ms - self.backlog.redis_ms()) / 1000
        if wait_s <= 0:
            batch.items = [following]
            return following
        batch.items = [following]
        self.put_off(batch, wait_s)
        return None

    def _replace(self, entry_id: bytes, text: bytes) -> tuple[Delivery, int]:
        generation, due_ms, envelope = _parse(text)
        self._replacements[entry_id] = generation, envelope
        arrived = self._decode([[entry_id, [wire.MSGPACK, envelope]]])
        if not arrived:
            raise ReplyError(f"the retry of entry {entry_id.decode()} in {self._replaced_key} is no message: remove it")
        assert isinstance(arrived[0], Delivery)
        return arrived[0], due_ms

    def was_read(self, full: bool, some: bool, now: float) -> None:
        """Decides when to read again."""
        self._cold_s = COLD_S[0] if some else min(COLD_S[1], 2 * self._cold_s)
        self.read_at = 0.0 if full else now + self._cold_s

    def may_have(self, now: float) -> bool:
        """Whether there is something to hand out or to look after."""
        if self.rest:
            return False
        if self.fence.needs_audit or self.claimer.has_to_recover() or self.backlog.has_work():
            return True
        due = self.backlog.lanes.next_due()
        if due is not None and due <= now:
            return True
        due = self.arrivals.next_due
        return due is not None and due <= now and not self.backlog.closing

    def reads_on(self) -> bool:
        """Whether new messages are read at all: else none of them is to wake anybody."""
        backlog = self.backlog
        return backlog.lanes.waiting < backlog.settings.max_waiting and self.arrivals.pending_from is None

    def has_to_flush(self) -> bool:
        """Whether there is something to write, now."""
        return not self.rest and self.has_something_to_write()

    def has_something_to_write(self) -> bool:
        backlog = self.backlog
        return bool(
            backlog.finished
            or self.settler.settling
            or self._returned
            or backlog.notes
            or self._unmarked
            or backlog.dead
        )

    def _pack_settle(self, ids: Sequence[bytes]) -> bytes:
        token, incarnation, group = self.fence.head
        args: list[str | bytes] = [str(token), incarnation, group]
        for entry_id in ids:
            args += [entry_id, str(self._generations.get(entry_id, 0))]
        return script("settle_kept").pack_text((*self.settler.keys, self._replaced_key), args)

    def _settled(self, ids: list[bytes], answer: Any) -> None:
        """Redis has answered that these are finished, or what is to be delivered in their places."""
        kept = dict(zip(answer[::2], answer[1::2], strict=True)) if isinstance(answer, list) else {}
        for entry_id in ids:
            delivery = self._ended.pop(entry_id, None)
            if delivery is None:
                continue
            if entry_id in kept:
                following, due_ms = self._replace(entry_id, kept[entry_id])
                wait_s = max(0, due_ms - self.backlog.redis_ms()) / 1000
                self.backlog.let_wait(following, wait_s)
                continue
            self._generations.pop(entry_id, None)
            self._replacements.pop(entry_id, None)
            self.backlog.lanes.finish(delivery.lane_key)

    def _put_on_offer(self) -> None:
        """Sends what was given back to the entries that every consumer takes first."""
        if self._returned:
            self._returned.sort(key=id_order)
            for some in _slices(self._returned):
                self.settler.requeue(some, "")
            self._returned = []

    def _remove_marks(self) -> None:
        # Not with the rest of a note, beside which a retry may have been stored meanwhile.
        if self._unmarked:
            keys = [self.lease.key, self.keys.notes(self.lease.group)]
            for some in _slices(self._unmarked):
                self.fence.run("unmark", keys, [*self.fence.head[:2], *some])
            self._unmarked = []

    def flush(self) -> None:
        """Writes all that is to be written."""
        self.settler.flush()  # the notes first: whoever has the message next has to know of its crashes
        self.settler.died.clear()  # kombu knows no results
        self._remove_marks()
        self._put_on_offer()
        self.settler.settle()


def _slices(ids: list[bytes]) -> Iterator[list[bytes]]:
    """So many as one call of a script is to look at."""
    for i in range(0, len(ids), 500):
        yield ids[i : i + 500]


def _parse(text: bytes) -> tuple[int, int, bytes]:
    """A stored replacement: its generation, when it is due, its envelope; generation 0 for what no script has written."""
    found = _REPLACEMENT.fullmatch(text)
    return (int(found[1]), int(found[2]), found[3]) if found else (0, 0, b"")


_REPLACEMENT = re.compile(rb"(\d{1,19}) (\d{1,19}) (.*)", re.DOTALL)


__all__ = ["StreamConsumer"]
