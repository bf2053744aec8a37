"""One shard (or shared stream) in the hands of its owner: what can run now is handed out, and comes back with its outcome.

The state machine of an owner, without a loop of its own and without knowing what a task is: the worker's control thread
calls it, and so does the inline runner of tests. Methods that talk to Redis take the link; each of their calls names the
lease's token and incarnation and raises ``LeaseLost`` when these are no longer the owner's.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import islice

from ..clock import mono_s
from ..redis import wire
from ..redis.link import Link
from ..redis.wire import Note, id_order
from ..text import counted, logger
from .claimer import Claimer
from .delivery import CLOSES, Batch, Delivery, Entry, Outcome, deliveries_of, entry_id_of, lacks_body
from .held import OWNER, ConsumerSettings, Held
from .lanes import KEEP_BODIES, Lane, put_in_place

log = logger("streamtask.consumer")


PAUSE_S, LONGEST_PAUSE_S = 0.01, 10.0
"""How long what a body gives back waits: the first time, and at most; it doubles each time."""


class ShardConsumer(Claimer):
    """See the module. Used by one thread; ``halted`` alone is also set by executors."""

    # Handing out

    def has_work(self) -> bool:
        return not self.halted and not self.closing and (bool(self.buffer) or self.lanes.has_ready())

    def take(self, link: Link, limit: int, *, may_mark: bool = True) -> Batch | None:
        """A batch for an executor that runs it in sequence; None if nothing can run now. ``may_mark`` False: nothing
        that needs a start mark, for it would not start at once."""
        if self.halted or self.closing:
            return None
        buffer = self.buffer
        if not self.lanes.lanes and not self.revoked and (not buffer or self._all_fresh()):
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

    def take_free(self, link: Link, limit: int, *, at_once: int | None = None) -> list[Batch]:
        """Up to ``limit`` deliveries of different lanes, each a batch of its own, for executors that run side by side.
        Each closes its lane until it has ended. ``at_once``: how many of them start at once, where not all do: what needs a
        start mark is among these, for whoever dies is charged with it."""
        if self.halted or self.closing:
            return []
        self._load_heads(link, self.lanes.peek_ready(), limit, 1)
        chosen: list[Delivery] = []
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
        buffer = self.buffer
        while buffer and len(chosen) < limit:
            item = buffer[0]
            delivery = Delivery(*item) if isinstance(item, list) else item
            if self._must_wait(delivery, len(chosen), at_once):
                break
            buffer.popleft()
            lane_or_none = self.lanes.get(delivery.lane_key)
            if lane_or_none is not None:
                self.lanes.add(lane_or_none, delivery)
                continue
            if self._may_run(delivery):
                self.lanes.start(delivery.lane_key)
                chosen.append(delivery)
        self._mark(link, chosen)
        return [self._hand([delivery], []) for delivery in chosen]

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
        died = counted(note.crashes, "time")
        return f"its process died {died} while the body ran (max_crashes is {self.settings.max_crashes})"

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
            self.before_mark()
            self._write_notes(link, [(d.entry_id, d.note) for d in marked if d.note is not None])
        except BaseException:
            for delivery in chosen:
                self._give_back(delivery)
            raise

    def before_mark(self) -> None:
        """Called before a start is written down: that body may take its process down. The worker sets this."""

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
            if any(map(lacks_body, islice(lane.waiting, count))):
                count = max(count, KEEP_BODIES)
                loading.append((lane, count))
                wanted.update((entry_id_of(item), None) for item in islice(lane.waiting, count) if lacks_body(item))
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
        self.on_revoked(self, delivery)

    def on_revoked(self, consumer: Held, delivery: Delivery) -> None:
        """Told of each revoked message; the worker sets this to store a result."""

    # Giving back

    def take_back(self, batch: Batch, position: int) -> None:
        """What a batch was not to start any more, from there on, waits here again."""
        left = batch.items[position:]
        batch.items, batch.ids = batch.items[:position], batch.ids[:position]
        for delivery in deliveries_of(left):
            self._give_back(delivery)

    def waits(self) -> bool:
        """Whether something lies ready that has not begun, and that ``offer_again`` would put on offer."""
        return bool(self.buffer) or any(isinstance(lane.key, tuple) for lane in self.lanes.peek_ready())

    def offer_again(self, link: Link) -> int:
        """Puts what waits here of a shared stream on offer to all its consumers. Returns how many messages that are."""
        self.write_notes(link)  # whoever takes them has to know of their attempts
        items: list[Delivery | Entry | bytes] = list(self.buffer)
        self.buffer.clear()
        for lane in list(self.lanes.ready()):
            if isinstance(lane.key, tuple):  # of one message, that waited for its retry
                while lane.waiting:
                    items.append(self.lanes.pop(lane))
                self.lanes.drop(lane)
            else:
                self.lanes.open(lane)
        if not items:
            return 0
        # Should an answer be lost, they are found among the pending ones.
        ids = sorted(map(entry_id_of, items), key=id_order)
        keys = [self.lease.key, self.keys.stream, self.keys.requeued(self.settings.group), self.keys.wake]
        for i in range(0, len(ids), 200):
            self._run(link, "requeue", keys, [*self._head, self.voided, *ids[i : i + 200]])
        self.on_offer = True
        return len(ids)

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
        if kind in ("retry", "again", "dead"):
            delivery.spent = True
        if kind in CLOSES and delivery.lane is not None:
            self._closed.add(key)
        note = delivery.note
        if note is not None and note.mark and kind not in ("retry", "dead"):
            # It waits again: should this process end before its body begins, that is none of its crashes.
            note.mark = 0
            self._notes.append((delivery.entry_id, note))
        if kind == "retry":
            note = delivery.note = delivery.note or Note()
            note.attempt += 1
            note.held = 0
            note.due_ms = self.redis_ms() + max(0, int(outcome.delay_s * 1000))
            note.mark = 0
            self._notes.append((delivery.entry_id, note))
            self.lanes.close(key, delivery, mono_s() + max(0.0, outcome.delay_s), self._numbers)
        elif kind == "requeue":
            self.lanes.close(key, delivery, mono_s() + outcome.delay_s, self._numbers)
        elif kind == "again":
            delivery.given_back += 1
            pause_s = min(PAUSE_S * 2 ** min(delivery.given_back - 1, 20), LONGEST_PAUSE_S)
            self.lanes.close(key, delivery, mono_s() + pause_s, self._numbers)
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


__all__ = ["OWNER", "Batch", "ConsumerSettings", "Outcome", "ShardConsumer"]
