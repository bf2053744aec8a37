"""What comes in of a process's shards: which are read next, and how much of them; what is pending, due or on offer; and what of
that is offered again, where others could run it sooner.
"""

from __future__ import annotations

from collections.abc import Callable

from ..clock import mono_s
from ..coordination.shared import SharedMemory
from ..errors import LeaseLost, ReplyError, StreamTaskError
from ..queue.consumer import ShardConsumer
from ..queue.delivery import Entry
from ..queue.fetcher import Fetcher
from ..redis.link import Link
from ..redis.links import Links
from ..text import logger
from .handing import AHEAD_S, Handing
from .owned import Executor, Owned, Shards
from .ports import WorkerSettings
from .side_by_side import ParallelExecutor
from .writing import Writing

log = logger("streamtask.worker")

COLD_FETCH_S = (0.005, 0.02)
"""How often idle shards are read, and what wakes any, while there is more to do: the interval doubles while nothing comes.
After the longest one a fetch blocks until something does, or a shard has room for more."""

READ_AHEAD = 2
"""Fetches' worth of messages that lie ready, where there are more in Redis."""


class Intake:
    """See the module."""

    def __init__(
        self,
        settings: WorkerSettings,
        memory: SharedMemory,
        executor: Executor,
        shards: Shards,
        handing: Handing,
        writing: Writing,
        fetcher: Fetcher,
        links: Links,
        listen: Callable[[Link, Callable[[], None]], None],
    ) -> None:
        """``listen``: has a function called when a link has something to read."""
        self._settings = settings
        self._memory = memory
        self._executor = executor
        self._shards = shards
        self._handing = handing
        self._writing = writing
        self._fetcher = fetcher
        self._links = links
        self._listen = listen
        self._parallel = settings.concurrency > 1
        self.cold_at = 0.0
        """When (monotonic) idle shards are read again."""
        self._cold_s = COLD_FETCH_S[0]

    def prepare(self, owned: Owned) -> None:
        """What must be done before a shard's messages can run."""
        consumer, now = owned.consumer, mono_s()
        backlog, arrivals = consumer.backlog, consumer.arrivals
        if owned.quiet_until > now:
            return
        if owned.audit_due(now):
            if consumer in (self._fetcher.asked or ()):
                return  # what its reply brings is pending already; the next fetch leaves this shard out
            self._audit(owned)
        if consumer.claimer.has_to_recover():
            consumer.claimer.recover_more()
        due = arrivals.next_due is not None and now >= arrivals.next_due
        if not backlog.closing and (owned.woken or due or (arrivals.on_offer and arrivals.has_room())):
            self._writing.settle_first()
            arrivals.next_due = now + 0.5  # unless the answer says
            arrivals.look()
            owned.woken = False
        backlog.lanes.open_due(now)
        # A batch in sequence has to come back first, with what it did not start. Side by side each message closes its lane.
        back = backlog.halted and not backlog.closing and (self._parallel or not backlog.handed)
        if back and self._memory.trusted[owned.number] > now:
            backlog.halted = False

    def _audit(self, owned: Owned) -> None:
        """Takes what is pending and not here, and looks at all that a wake may have told of: at a takeover, when a connection
        broke, and once in a while. What only the last finds was overlooked before, and is a fault of this program."""
        consumer = owned.consumer
        in_passing = not owned.takeover and not consumer.fence.needs_audit
        left = consumer.claimer.overlooked() if in_passing and not owned.woken else 0
        self._writing.settle_first()
        found = consumer.claimer.recover(takeover=owned.takeover)
        if in_passing and (found or left):
            log.warning(
                "found by the audit: %d pending entries that were not held, %d on offer that were not taken queue=%s shard=%s",
                found, left, owned.queue.name, consumer.fence.shard,
            )  # fmt: skip
        if in_passing:
            owned.queue.see_groups(self._links.at(owned.queue.keys.meta))
        owned.takeover = False
        owned.woken = True
        owned.next_audit = mono_s() + self._settings.audit_s

    def send_fetch(self) -> None:
        fetcher = self._fetcher
        if fetcher.asked is not None and not fetcher.blocked:
            return
        now = mono_s()
        ready = [
            o
            for o in self._shards.owned.values()
            if not o.takeover and o.quiet_until <= now and not o.consumer.backlog.closing
        ]
        chosen, look, block = self._to_read(ready, now)
        if fetcher.asked is not None:
            # It waits for something. Is that still what is to be waited for?
            asked = {self._shards.of(consumer) for consumer in fetcher.asked}
            if asked.issuperset(chosen) and not any(o is None or self._is_over(o, now) for o in asked):
                return
            if fetcher.unblock():
                self.receive_fetch()
                self.send_fetch()
            else:
                self._shards.look_at = mono_s() + 0.001  # not blocked yet, or not any more
            return
        if not chosen and not look:
            return
        guarded = set(fetcher.guarded)
        if any(o.consumer not in guarded for o in ready):
            # This fetch guards them, and the next reads them.
            chosen, block = [o for o in chosen if o.consumer in guarded], False
        for owned in chosen:
            owned.read_at = now
        if look and not block:
            self.cold_at = now + self._cold_s
        fetcher.send([o.consumer for o in ready], [o.consumer for o in chosen], look=look, block=block)
        self._listen(fetcher.link, self.receive_fetch)

    def _is_over(self, owned: Owned, now: float) -> bool:
        """Whether a shard is not to be waited for any more: given back, others' to read, or to be audited with no fetch under
        way."""
        return owned.consumer.backlog.closing or owned.consumer.arrivals.room == 0 or owned.audit_due(now)

    def _to_read(self, ready: list[Owned], now: float) -> tuple[list[Owned], bool, bool]:
        """The shards to read next, whether to look at what wakes any, and whether to wait until something comes.

        Of those that have more, only as many as are run soon: what has to lie in memory until its turn comes has left the
        CPU's cache by then. The others, and all wakes, are looked at from time to time meanwhile."""
        with_room = [
            o for o in ready if o.consumer.arrivals.has_room() and not o.audit_due(now) and not o.offers_first()
        ]
        if len(with_room) == len(ready) and not any(o.full for o in ready):
            return with_room, bool(ready), True
        fetch_count = self._settings.consumer.fetch_count
        held = sum(len(o.consumer.backlog.buffer) for o in ready if not o.consumer.backlog.halted)
        room = max(0 if held else 1, READ_AHEAD - held // fetch_count)
        hot = sorted((o for o in with_room if o.full), key=lambda o: o.read_at)[:room]
        if now < self.cold_at:
            return hot, False, False
        return hot + [o for o in with_room if not o.full], True, not hot and self._cold_s >= COLD_FETCH_S[1]

    def receive_fetch(self) -> None:
        asked = self._fetcher.asked or ()
        try:
            fetched = self._fetcher.receive()
            for consumer in fetched.woken:
                if (owned := self._shards.of(consumer)) is not None:
                    owned.woken = True
            for consumer in fetched.unrecorded:
                if (owned := self._shards.of(consumer)) is not None:
                    owned.quiet_until = mono_s() + 0.1
            for consumer in fetched.lost:
                if (owned := self._shards.of(consumer)) is not None and not consumer.backlog.closing:
                    self._shards.lost(owned)
            for consumer, exc in fetched.refused:
                if (owned := self._shards.of(consumer)) is not None:
                    self._shards.refused(owned, exc)
            self._absorb(fetched.read)
        except StreamTaskError:
            for consumer in asked:
                consumer.fence.needs_audit = True  # what came beside the error is pending, and not here
            raise
        if asked and not fetched.read:
            # Refused: a guard has changed. They are to be read all the same.
            for consumer in asked:
                if (owned := self._shards.of(consumer)) is not None:
                    owned.full = True

    def _absorb(self, read: list[tuple[ShardConsumer, list[Entry] | StreamTaskError]]) -> None:
        anything = False
        for consumer, entries in read:
            owned = self._shards.of(consumer)
            if owned is None:
                continue
            if isinstance(entries, LeaseLost):
                self._shards.suspect(owned)
            elif isinstance(entries, ReplyError):
                self._shards.refused(owned, entries)
            elif isinstance(entries, StreamTaskError):
                raise entries
            else:
                self._take_entries(owned, entries)
                anything = anything or bool(entries)
        self._cold_s = COLD_FETCH_S[0] if anything else min(COLD_FETCH_S[1], self._cold_s * 2)

    def _take_entries(self, owned: Owned, entries: list[Entry]) -> None:
        owned.full = len(entries) >= owned.consumer.arrivals.asked
        if entries:
            try:
                owned.consumer.arrivals.absorb(entries)
            except LeaseLost:
                owned.consumer.fence.needs_audit = True
                self._shards.suspect(owned)

    def make_room(self) -> None:
        """Says of each shared stream how much of it to read: what begins at once, and so much as will have begun after
        ``AHEAD_S``. Of a new process nothing is known, nor of one whose bodies take long just now."""
        if not self._shards.shared:
            return
        concurrency, out = self._settings.concurrency, self._handing.out()
        free = max(0, concurrency - (out if self._parallel else len(self._executor.out)))
        pace = self._handing.pace_s if free else max(self._handing.pace_s, mono_s() - self._handing.moved_at)
        ahead = int(AHEAD_S / pace) if pace else 0
        left = free + ahead - max(0, out - concurrency)
        for owned in self._shards.shared:
            consumer = owned.consumer
            room = left - len(consumer.backlog.buffer)
            consumer.arrivals.room = min(self._settings.consumer.fetch_count, room) if room > ahead // 2 else 0

    def read_in_turn(self) -> None:
        """Where messages of shards wait, a free executor has one of them again before the next fetch is answered, and a
        shared stream had never room. So it is read before that, once in a while."""
        now = mono_s()
        for owned in self._shards.shared:
            consumer = owned.consumer
            if owned.read_at + AHEAD_S > now or owned.takeover or owned.quiet_until > now:
                continue
            if consumer.backlog.buffer or not consumer.arrivals.has_room() or consumer in (self._fetcher.asked or ()):
                continue
            if not any(o.consumer.backlog.has_work() for o in self._shards.turn_order if o not in self._shards.shared):
                return  # the next fetch reads it
            owned.read_at = now
            try:
                consumer.arrivals.asked = consumer.arrivals.read_count()
                self._take_entries(owned, consumer.arrivals.fetch(consumer.arrivals.asked))
            except LeaseLost:
                consumer.fence.needs_audit = True
                self._shards.suspect(owned)
            except ReplyError as exc:
                consumer.fence.needs_audit = True
                self._shards.refused(owned, exc)

    def offer_again(self) -> None:
        """Where bodies take longer than was thought, what waits behind them is for whoever is free."""
        if not self._handing.busy() or mono_s() < self._handing.moved_at + AHEAD_S:
            return
        executor = self._executor
        for owned in list(self._shards.shared):
            consumer = owned.consumer
            if consumer.backlog.closing or owned.takeover or owned.quiet_until > mono_s():
                continue
            if isinstance(executor, ParallelExecutor):
                executor.withdraw(consumer.backlog)
                self._handing.collect()
            elif (batch := executor.out[0]).backlog is consumer.backlog and (end := executor.cut(batch)) is not None:
                consumer.backlog.cut_off(batch, end)
            if consumer.backlog.waits():
                try:
                    count = consumer.offer_again()
                    log.debug("offered again messages=%d queue=%s", count, owned.queue.name)
                except LeaseLost:
                    consumer.fence.needs_audit = True  # they are pending, and not here
                    self._shards.suspect(owned)
                except ReplyError as exc:
                    consumer.fence.needs_audit = True
                    self._shards.refused(owned, exc)
