"""The control loop of a worker process, which owns all state of the process's shards. ``turns.py`` says who runs it.

Each turn: take what has arrived (orders of the supervisor, a fetch's reply, ended deliveries), hand out what can run,
send the next fetch, then write (results, notes, dead letters, acknowledgements). Executors and the supervisor only post
to it. Three connections: that of the ``Fetcher``, on which a fetch is always on its way or blocked, that of the
``Acknowledger``, and one for everything else, whose answers are waited for. What wakes the owner of a shard is looked at every
few milliseconds however busy the process is.
"""

from __future__ import annotations

import functools
import os
import selectors
from collections.abc import Callable, Iterator
from typing import Protocol

from ..clock import mono_s
from ..coordination.orders import End, Lost, Order, Own, Release, Released, Resume, Revoked, Stop
from ..coordination.shared import MAX_BATCH, SharedMemory
from ..errors import BrokerUnavailable, LeaseLost, QueueFull, ReplyError, StreamTaskError
from ..queue.acknowledger import Acknowledger
from ..queue.backlog import Backlog, Batch
from ..queue.consumer import ShardConsumer
from ..queue.delivery import Entry, Kind
from ..queue.fetcher import Fetcher
from ..redis import wire
from ..redis.link import Link
from ..redis.links import Links
from ..redis.misplaced import by, naming
from ..redis.outage import Outage, Rarely
from ..text import logger
from .ending import end_process
from .executor import SequentialExecutor
from .outbox import Outbox
from .owned import Owned
from .ports import TaskRunner, WorkerSettings, results_of
from .running import EVERY, Running
from .side_by_side import ParallelExecutor

log = logger("streamtask.worker")

COLD_FETCH_S = (0.005, 0.02)
"""How often idle shards are read, and what wakes any, while there is more to do: the interval doubles while nothing comes.
After the longest one a fetch blocks until something does, or a shard has room for more."""

FEW = 4
"""Messages that are started before the next are fetched, where no more wait."""

AHEAD_S = 0.05
"""How much work of shared streams is read ahead, as bodies have gone lately: others could do it."""

READ_AHEAD = 2
"""Fetches' worth of messages that lie ready, where there are more in Redis."""

LYING_S = 0.01
"""How much work lies with executors that run side by side, beyond what runs, as bodies have gone lately."""


class Supervisor(Protocol):
    """The supervisor's end of the wire, as the control thread sees it."""

    def fileno(self) -> int: ...
    def receive(self) -> Iterator[Order]: ...
    def send(self, order: Order) -> None: ...


class Control:
    """See the module. ``turn`` is one round of the loop."""

    def __init__(
        self, settings: WorkerSettings, runner: TaskRunner, memory: SharedMemory, supervisor: Supervisor
    ) -> None:
        self._settings = settings
        self._runner = runner
        self._memory = memory
        self._supervisor = supervisor
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._owned: dict[int, Owned] = {}
        self._shared: list[Owned] = []  # those of shared streams
        self._queues = {queue.name: queue for queue in settings.queues}
        self._revoked_ids: dict[str, set[bytes | str]] = {name: set() for name in self._queues}
        self._parallel = settings.concurrency > 1
        self.running = Running(memory, settings.concurrency, self.wake)
        self.executor: SequentialExecutor | ParallelExecutor
        """Set by who puts both together."""
        # Of ``ack_batch``; with ack="each" one, or one for each executor.
        most_ended, concurrency = settings.consumer.ack_batch // 2, settings.concurrency
        self._half = max(most_ended, concurrency + min(most_ended, concurrency // 2))
        broker = settings.broker
        self._links = Links(broker, broker.timeout_s)
        self._fetcher = Fetcher(broker)
        self._acknowledger = Acknowledger(broker)
        self._outbox = Outbox(settings.result_broker)
        self._down_until = 0.0
        self._outage = Outage(log, 0.02, 1.0)
        self._full = Rarely()
        self._progress_at: float | None = None
        self._pace_s = 0.0  # after which time one more body has ended, while there was work; 0: not known yet
        self._moved_at = 0.0  # when the last one ended, or began where an executor was free
        self._look_at: float | None = None
        self._cold_at = 0.0
        self._cold_s = COLD_FETCH_S[0]
        self._stopping = False
        self.over = False
        """Whether the process is to end: nothing of it runs, and what it owned is given back, or can't be."""
        self._hurried = False
        self._turn_order: list[Owned] = []  # whoever was served goes to its end
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._drain_wake)
        self._selector.register(supervisor.fileno(), selectors.EVENT_READ, self._obey)
        # Sockets that get another number whenever they connect anew: of what takes what they bring.
        self._sockets: dict[Callable[[], None], tuple[int, int]] = {}

    def forked(self) -> None:
        """In a child that a body has forked: nothing more starts there."""
        for owned in self._owned.values():
            owned.consumer.backlog.halted = True

    def wake(self) -> None:
        """Ends the wait of the current turn."""
        try:
            os.write(self._wake_write, b".")
        except BlockingIOError:
            pass  # it is awake already

    def run(self) -> None:
        """The loop, for a process whose bodies run in other threads; any error that is not foreseen ends the process."""
        try:
            while not self.over:
                self.turn()
        except BaseException:
            end_process("the control loop")

    def turn(self, wait: bool = True) -> None:
        """One round; ``wait`` for something to do, if there is nothing."""
        events = self._selector.select(self.rest() if wait else 0)
        self.running.asleep = False
        for key, _ in events:
            key.data()
        self._collect()
        now = mono_s()
        if now >= self._down_until:
            self._guarded(self._work)

    def fileno(self) -> int:
        """Readable where there is something to do."""
        return self._selector.fileno()

    def has_events(self) -> bool:
        return bool(self._selector.select(0))

    def rest(self) -> float:
        """How long (s) there is nothing to do. From now on executors tell of what ends meanwhile, and wake the loop."""
        wait_s = self._wait_s()
        self.running.asleep = True
        # In this order: what ends after this look finds us asleep.
        return 0.0 if self.executor.due() else wait_s

    # Waiting

    def _wait_s(self) -> float:
        now = mono_s()
        wake = now + 5.0
        self.running.low = EVERY
        if now < self._down_until:
            return self._down_until - now
        if self._is_quick(now):
            # Some will have ended soon: they are looked at together.
            self.running.low = self.running.waiting() // 4
            self.running.tell_at = wake = now + self._settings.ack_interval_s
        if self._progress_at is not None:
            wake = min(wake, self._progress_at)
        if self._look_at is not None:
            wake = min(wake, self._look_at)
            self._look_at = None
        for owned in self._owned.values():
            consumer = owned.consumer
            backlog, arrivals = consumer.backlog, consumer.arrivals
            if owned.quiet_until > now:
                wake = min(wake, owned.quiet_until)
                continue
            if backlog.finished and not consumer.settler.settling:  # whose answer wakes the loop
                wake = min(wake, max(backlog.finished_since + self._settings.ack_interval_s, self._outbox.again_at))
            if backlog.halted and not backlog.closing:
                wake = min(wake, now + 0.02)
            if arrivals.next_due is not None and not backlog.closing:
                wake = min(wake, arrivals.next_due)
            if arrivals.room is not None and not backlog.closing:
                if arrivals.on_offer and arrivals.has_room():
                    wake = now
                elif self._busy() and (backlog.waits() or self._left_in_batch(consumer)):
                    wake = min(wake, max(self._moved_at + AHEAD_S, now + 0.005))  # to be offered again
            wake = min(wake, owned.next_audit)
            due = backlog.lanes.next_due()
            if due is not None:
                wake = min(wake, due)
        if self._fetcher.asked is None and self._cold_at > now:
            wake = min(wake, self._cold_at)
        return max(0.0, wake - now)

    def _is_quick(self, now: float) -> bool:
        """Whether bodies that run side by side end all the time, and others wait."""
        if not self._parallel or not self._pace_s or any(o.consumer.backlog.closing for o in self._owned.values()):
            return False
        return (
            max(self._pace_s, now - self._moved_at) < self._settings.ack_interval_s / 8 and self.running.waiting() > 0
        )

    def _obey(self) -> None:
        for order in self._supervisor.receive():
            match order:
                case Own():
                    self._own(order)
                case Release(number):
                    self._release(number)
                case Resume(number):
                    self._resume(number)
                case Revoked(queue, ids, over):
                    known = self._revoked_ids[queue]  # the set that the queue's consumers look at
                    known.update(map(wire.id_bytes, ids))
                    known.difference_update(map(wire.id_bytes, over))
                case Stop():
                    self._stop()
                case End():
                    self.over = True

    def _drain_wake(self) -> None:
        try:
            while len(os.read(self._wake_read, 4096)) == 4096:
                pass
        except BlockingIOError:
            pass

    def _guarded(self, step: Callable[[], None]) -> None:
        """Runs a step; an outage makes the loop wait and find out afterwards what was lost."""
        try:
            step()
            if self._outage and self._links.connected:
                self._outage.over(self._settings.broker.safe_url)
        except (BrokerUnavailable, ReplyError) as exc:
            # Also an answer that is of no one shard, and not known to pass: nothing that runs is the worse for it.
            self._lost_connection(exc)
        except QueueFull as exc:
            if self._full.worth_saying(str(exc)):
                log.error("%s", exc)
            self._down_until = mono_s() + 0.2

    def _lost_connection(self, exc: StreamTaskError) -> None:
        self._links.close()
        for fd, _ in self._sockets.values():
            self._selector.unregister(fd)
        self._sockets.clear()
        self._acknowledger.drop()
        self._fetcher.drop()
        # Of every shard: Redis may be another one now, or the same without its last second.
        for owned in self._owned.values():
            owned.consumer.claimer.connection_lost()
        self._down_until = mono_s() + self._outage.met(exc)

    def _listen(self, link: Link, take: Callable[[], None]) -> None:
        """Has ``take`` called when a link has something to read."""
        now = (link.fileno(), link.connects)
        before = self._sockets.get(take)
        if before != now:
            if before is not None:
                self._selector.unregister(before[0])
            self._sockets[take] = now
            self._selector.register(now[0], selectors.EVENT_READ, functools.partial(self._heard, take))

    def _heard(self, take: Callable[[], None]) -> None:
        if take in self._sockets:  # else another event has closed the links
            self._guarded(take)

    # Orders of the supervisor

    def _own(self, order: Own) -> None:
        from ..coordination.lease import Lease

        number, shard, shared = order.number, order.shard, order.shared
        group = self._settings.consumer.group
        home = self._queues[order.queue]
        keys = home.keys.shard(order.epoch, shard)
        lease = Lease(
            keys, group, order.incarnation, self._settings.lease_ms, shared, order.token, 0.0, order.by_expiry
        )
        consumer = ShardConsumer(lease, order.queue, shard, self._settings.consumer, self._links)
        consumer.backlog.revoked = self._revoked_ids[order.queue]
        consumer.backlog.number = number
        if shared:
            consumer.arrivals.room = 0
        consumer.arrivals.reading = self._memory.reading(number)
        owned = Owned(number, consumer, home, mono_s() + self._settings.audit_s)
        self._owned[number] = owned
        if shared:
            self._shared.append(owned)
        self._turn_order.append(owned)
        log.debug("owns queue=%s shard=%s token=%d", order.queue, shard, order.token)

    def _release(self, number: int) -> None:
        owned = self._owned.get(number)
        if owned is not None:
            owned.consumer.backlog.closing = True
            owned.consumer.backlog.halted = True
            self.executor.withdraw(owned.consumer.backlog)

    def _resume(self, number: int) -> None:
        owned = self._owned.get(number)
        if owned is not None and not self._stopping:
            owned.consumer.backlog.closing = False

    def _stop(self) -> None:
        self._stopping = True
        for number in list(self._owned):
            self._release(number)

    def _forget(self, owned: Owned) -> None:
        self._store_results(owned.consumer)
        self._owned.pop(owned.number, None)
        if owned in self._shared:
            self._shared.remove(owned)
        if owned in self._turn_order:
            self._turn_order.remove(owned)
        self.executor.forget(owned.consumer.backlog)

    def _lost(self, owned: Owned) -> None:
        """Another process owns the shard: everything of it is dropped, and the supervisor ends this process."""
        log.error(
            "lost the lease queue=%s shard=%s token=%d",
            owned.queue.name,
            owned.consumer.fence.shard,
            owned.consumer.fence.lease.token,
        )
        owned.consumer.backlog.halted = True
        self._forget(owned)
        fence = owned.consumer.fence
        self._supervisor.send(Lost(owned.number, owned.queue.name, fence.shard, fence.lease.token))

    def _suspect(self, owned: Owned) -> None:
        """A call was refused: is the lease another's, or is its record gone (a flush), to be written anew by the keeper?"""
        fence = owned.consumer.fence
        answer = fence.link.call(fence.guard_command)
        if fence.owns(answer):
            return
        if answer[1] is None:
            owned.quiet_until = mono_s() + 0.1
        else:
            self._lost(owned)

    # Fetching

    def _send_fetch(self) -> None:
        fetcher = self._fetcher
        if fetcher.asked is not None and not fetcher.blocked:
            return
        now = mono_s()
        ready = [
            o
            for o in self._owned.values()
            if not o.takeover and o.quiet_until <= now and not o.consumer.backlog.closing
        ]
        chosen, look, block = self._to_read(ready, now)
        if fetcher.asked is not None:
            # It waits for something. Is that still what is to be waited for?
            asked = {self._of(consumer) for consumer in fetcher.asked}
            if asked.issuperset(chosen) and not any(o is None or self._is_over(o, now) for o in asked):
                return
            if fetcher.unblock():
                self._receive_fetch()
                self._send_fetch()
            else:
                self._look_at = mono_s() + 0.001  # not blocked yet, or not any more
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
            self._cold_at = now + self._cold_s
        fetcher.send([o.consumer for o in ready], [o.consumer for o in chosen], look=look, block=block)
        self._listen(fetcher.link, self._receive_fetch)

    def _of(self, consumer: ShardConsumer) -> Owned | None:
        owned = self._owned.get(consumer.backlog.number)
        return owned if owned is not None and owned.consumer is consumer else None

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
        if now < self._cold_at:
            return hot, False, False
        return hot + [o for o in with_room if not o.full], True, not hot and self._cold_s >= COLD_FETCH_S[1]

    def _receive_fetch(self) -> None:
        asked = self._fetcher.asked or ()
        try:
            fetched = self._fetcher.receive()
            for consumer in fetched.woken:
                if (owned := self._of(consumer)) is not None:
                    owned.woken = True
            for consumer in fetched.unrecorded:
                if (owned := self._of(consumer)) is not None:
                    owned.quiet_until = mono_s() + 0.1
            for consumer in fetched.lost:
                if (owned := self._of(consumer)) is not None and not consumer.backlog.closing:
                    self._lost(owned)
            for consumer, exc in fetched.refused:
                if (owned := self._of(consumer)) is not None:
                    self._refused(owned, exc)
            self._absorb(fetched.read)
        except StreamTaskError:
            for consumer in asked:
                consumer.fence.needs_audit = True  # what came beside the error is pending, and not here
            raise
        if asked and not fetched.read:
            # Refused: a guard has changed. They are to be read all the same.
            for consumer in asked:
                if (owned := self._of(consumer)) is not None:
                    owned.full = True

    def _absorb(self, read: list[tuple[ShardConsumer, list[Entry] | StreamTaskError]]) -> None:
        anything = False
        for consumer, entries in read:
            owned = self._of(consumer)
            if owned is None:
                continue
            if isinstance(entries, LeaseLost):
                self._suspect(owned)
            elif isinstance(entries, ReplyError):
                self._refused(owned, entries)
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
                self._suspect(owned)

    def _stream_gone(self, owned: Owned) -> None:
        log.critical(
            "data loss: the stream or its group is gone (a flush, an eviction, or somebody deleted it); messages that were "
            "not read are lost; the group is made anew queue=%s shard=%s",
            owned.queue.name, owned.consumer.fence.shard,
        )  # fmt: skip
        owned.queue.forget()
        owned.queue.declare((self._settings.consumer.group,))
        owned.consumer.arrivals.last_id = "0-0"
        owned.consumer.arrivals.wake_id = "0-0"
        owned.full = True

    # Working

    def _collect(self) -> None:
        """Takes what executors have ended."""
        executor = self.executor
        if isinstance(executor, SequentialExecutor):
            ended = self._collect_in_sequence(executor)
        else:
            ended = 0
            for batch in list(executor.out):
                ended += batch.backlog.collect_free(batch)
                # Those of what has ended are among them, whatever ends meanwhile.
                self._outbox.add(batch.take_results())
                if batch.collected == len(batch.ids):
                    executor.out.remove(batch)
        if ended:
            now = mono_s()
            # One that takes long is remembered through some that don't.
            self._pace_s = max((now - self._moved_at) / ended, self._pace_s / 2, 1e-6)
            self._moved_at = now

    def _collect_in_sequence(self, executor: SequentialExecutor) -> int:
        ended = 0
        while executor.ended:
            batch = executor.ended.popleft()
            executor.out.remove(batch)
            last, outcome = batch.outcomes[-1] if batch.outcomes else (0, None)
            # Unless it came back early. What was cut off is no part of it any more, and its last body has taken long.
            if outcome is None or outcome.kind is not Kind.UNSTARTED or last >= len(batch.ids):
                ended += len(batch.ids) - batch.collected
            self._outbox.add(batch.take_results())
            batch.backlog.complete(batch)
        if not executor.out:
            self._progress_at = None
            return ended
        batch = executor.out[0]
        position = min(executor.position(batch), len(batch.ids))
        if position > batch.collected and not executor.ended:
            self._outbox.add(batch.take_results())
            ended = position - batch.collected
            batch.backlog.collect(batch, position)
            self._progress_at = mono_s() + self._settings.ack_interval_s
        elif self._progress_at is not None and mono_s() >= self._progress_at:
            self._progress_at = None  # a long body: its end wakes this thread
        return ended

    def _work(self) -> None:
        self._make_room()
        now = mono_s()
        for owned in [o for o in self._owned.values() if o.quiet_until <= now and o.has_to_prepare(now)]:
            try:
                self._prepare(owned)
            except LeaseLost:
                self._suspect(owned)
            except ReplyError as exc:
                self._refused(owned, exc)
        self._read_in_turn()
        few = self._hand_out() and self._fetcher.asked is None
        self._hurried = few and not self._hurried
        if self._hurried:
            # A few messages have come after a wait: they start before anything else is done. But not time and again: what
            # comes back at once would keep all others out.
            self._look_at = now
            self._acknowledge()
            return
        self._offer_again()
        self._make_room()
        self._send_fetch()
        for owned in [o for o in self._owned.values() if o.consumer.has_to_write() or self._outbox]:
            self._write_guarded(owned)
        self._acknowledge()

    def _write_guarded(self, owned: Owned, settle: bool = False) -> None:
        try:
            self._write(owned, settle)
        except LeaseLost:
            self._suspect(owned)
        except ReplyError as exc:
            self._refused(owned, exc)

    def _refused(self, owned: Owned, exc: ReplyError) -> None:
        if exc.code == "NOGROUP":
            try:
                self._stream_gone(owned)
                return
            except ReplyError as why:
                exc = why
        if owned.refusals.worth_saying(exc.code):
            fence = owned.consumer.fence
            text = naming(exc, fence.keys.all(fence.group), by(fence.link))
            log.error("Redis refused a call queue=%s shard=%s: %s", owned.queue.name, fence.shard, text)
        owned.quiet_until = mono_s() + 1.0

    def _prepare(self, owned: Owned) -> None:
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
            self._settle_first()
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
        self._settle_first()
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

    def _hand_out(self) -> bool:
        """Gives executors what can run. True if that is little, and all that there is to do."""
        executor = self.executor
        if self._parallel:
            most = self._settings.concurrency + self._lying() - self._out()
        elif executor.out:
            return False
        elif self._shared:
            # Messages of shards that take long are not to keep out those of shared streams: each gets its turn after a while.
            most = max(1, int(AHEAD_S / self._pace_s) if self._pace_s else 0)
        else:
            most = MAX_BATCH
        if most <= 0:
            return False
        most = min(most, self._room())
        served: list[Owned] = []
        for owned in list(self._turn_order):
            if most <= 0 or (served and not self._parallel):
                break
            if owned.takeover or owned.quiet_until > mono_s() or not owned.consumer.backlog.has_work():
                continue
            if self._memory.trusted[owned.number] <= mono_s():
                continue
            limit = min(most, self._room_of(owned.consumer))
            if limit <= 0:
                continue  # the answer to an acknowledgement makes room
            try:
                batch = self._batch_of(owned.consumer, limit)
            except LeaseLost:
                self._suspect(owned)
                continue
            except ReplyError as exc:
                self._refused(owned, exc)
                continue
            if batch is not None:
                if not self._busy():
                    self._moved_at = mono_s()
                executor.submit(batch)
                most -= len(batch.ids)
                served.append(owned)
        for owned in served:
            if owned in self._turn_order:
                self._turn_order.remove(owned)
                self._turn_order.append(owned)
        if not served or self._parallel or len(executor.out[0].ids) > FEW:
            return False
        return not any(o.full or o.consumer.backlog.has_work() or o.consumer.has_to_write() for o in self._turn_order)

    def _batch_of(self, consumer: ShardConsumer, limit: int) -> Batch | None:
        if self._parallel:
            # Of one shard after the other where bodies are short: a call that acknowledges is then of more messages.
            share = limit if len(self._turn_order) == 1 or self._lying() >= limit else max(1, limit // 2)
            at_once = self._settings.concurrency - self._out()
            return consumer.hand_out_free(share, at_once=at_once, before_mark=self._settle_first)
        self._progress_at = mono_s() + self._settings.ack_interval_s
        # A start mark is written for what starts now, not for what waits behind another batch.
        return consumer.hand_out(limit, may_mark=not self.executor.out, before_mark=self._settle_first)

    def _out(self) -> int:
        """How many messages are handed out."""
        return sum(len(batch.ids) - batch.collected for batch in self.executor.out)

    def _lying(self) -> int:
        """How many messages to hand out beyond those that run side by side: short bodies follow each other at once."""
        pace = max(self._pace_s, mono_s() - self._moved_at) if self._busy() else self._pace_s
        return int(LYING_S / pace) if pace else 0

    # Shared streams: others could run it, too

    def _busy(self) -> bool:
        """Whether whatever is handed out now waits for a body to end."""
        return (self._out() if self._parallel else len(self.executor.out)) >= self._settings.concurrency

    def _left_in_batch(self, consumer: ShardConsumer) -> bool:
        if self._parallel:
            return False
        return any(b.backlog is consumer.backlog and len(b.ids) - b.collected > 1 for b in self.executor.out)

    def _make_room(self) -> None:
        """Says of each shared stream how much of it to read: what begins at once, and so much as will have begun after
        ``AHEAD_S``. Of a new process nothing is known, nor of one whose bodies take long just now."""
        if not self._shared:
            return
        concurrency, out = self._settings.concurrency, self._out()
        free = max(0, concurrency - (out if self._parallel else len(self.executor.out)))
        pace = self._pace_s if free else max(self._pace_s, mono_s() - self._moved_at)
        ahead = int(AHEAD_S / pace) if pace else 0
        left = free + ahead - max(0, out - concurrency)
        for owned in self._shared:
            consumer = owned.consumer
            room = left - len(consumer.backlog.buffer)
            consumer.arrivals.room = min(self._settings.consumer.fetch_count, room) if room > ahead // 2 else 0

    def _read_in_turn(self) -> None:
        """Where messages of shards wait, a free executor has one of them again before the next fetch is answered, and a
        shared stream had never room. So it is read before that, once in a while."""
        now = mono_s()
        for owned in self._shared:
            consumer = owned.consumer
            if owned.read_at + AHEAD_S > now or owned.takeover or owned.quiet_until > now:
                continue
            if consumer.backlog.buffer or not consumer.arrivals.has_room() or consumer in (self._fetcher.asked or ()):
                continue
            if not any(o.consumer.backlog.has_work() for o in self._turn_order if o not in self._shared):
                return  # the next fetch reads it
            owned.read_at = now
            try:
                consumer.arrivals.asked = consumer.arrivals.read_count()
                self._take_entries(owned, consumer.arrivals.fetch(consumer.arrivals.asked))
            except LeaseLost:
                consumer.fence.needs_audit = True
                self._suspect(owned)
            except ReplyError as exc:
                consumer.fence.needs_audit = True
                self._refused(owned, exc)

    def _offer_again(self) -> None:
        """Where bodies take longer than was thought, what waits behind them is for whoever is free."""
        if not self._busy() or mono_s() < self._moved_at + AHEAD_S:
            return
        executor = self.executor
        for owned in list(self._shared):
            consumer = owned.consumer
            if consumer.backlog.closing or owned.takeover or owned.quiet_until > mono_s():
                continue
            if isinstance(executor, ParallelExecutor):
                executor.withdraw(consumer.backlog)
                self._collect()
            elif (batch := executor.out[0]).backlog is consumer.backlog and (end := executor.cut(batch)) is not None:
                consumer.backlog.cut_off(batch, end)
            if consumer.backlog.waits():
                try:
                    count = consumer.offer_again()
                    log.debug("offered again messages=%d queue=%s", count, owned.queue.name)
                except LeaseLost:
                    consumer.fence.needs_audit = True  # they are pending, and not here
                    self._suspect(owned)
                except ReplyError as exc:
                    consumer.fence.needs_audit = True
                    self._refused(owned, exc)

    def _settle_first(self) -> None:
        """Before something that may take this process down: what has ended is on its way to be acknowledged, or each new death
        would run it again, or charge it."""
        for owned in self._owned.values():
            self._store_results(owned.consumer)
        if not self._outbox.send():
            return
        for owned in list(self._owned.values()):
            consumer = owned.consumer
            while consumer.settler.settling and consumer.backlog.finished:
                self._receive_settled()
            if consumer.backlog.finished and owned.quiet_until <= mono_s():
                self._acknowledger.ask(consumer)
        self._acknowledge()

    # Writing

    def _room(self) -> int:
        """How many messages to hand out. Were this process to die now, no more than ``ack_batch`` may have ended and not be
        acknowledged: one half of these runs, or has ended, while the other's acknowledgement is on its way."""
        out = self._out()
        room = self._half - out - self._ended()
        if room <= self._half // 2:
            for owned in [o for o in self._owned.values() if o.consumer.backlog.finished]:
                self._write_guarded(owned, settle=True)
            room = self._half - out - self._ended()
        return room

    def _ended(self) -> int:
        # A shard whose acknowledgements are refused holds up no other.
        now = mono_s()
        return sum(len(o.consumer.backlog.finished) for o in self._owned.values() if o.quiet_until <= now)

    def _room_of(self, consumer: ShardConsumer) -> int:
        """As ``_room``, of a shard: what is on its way may be refused, and with ``ack="each"`` a message waits for the
        acknowledgement of the one before the last."""
        ended = len(consumer.backlog.finished)
        if ended >= max(1, self._settings.consumer.ack_batch // 2):
            return 0
        out = sum(len(batch.ids) - batch.collected for batch in consumer.backlog.handed.values())
        return 2 * self._half - out - ended - len(consumer.settler.settling)

    def _write(self, owned: Owned, settle: bool) -> None:
        consumer = owned.consumer
        if owned.quiet_until > mono_s() or owned.takeover:
            if consumer.backlog.closing and owned.takeover:
                self._handed_over(owned)
            return
        self._store_results(consumer)
        stored = self._outbox.send()
        backlog, settler = consumer.backlog, consumer.settler
        if stored and backlog.has_writes():
            while settler.settling:
                self._receive_settled()
            try:
                settler.flush()
            finally:
                self._store_results(consumer)
            self._look_at = mono_s()  # a lane may be open now
        if stored and backlog.finished and not settler.settling and (settle or self._settle_now(backlog)):
            self._acknowledger.ask(consumer)  # sent at the end of the turn
        if backlog.closing and settler.idle() and consumer not in (self._fetcher.asked or ()):
            self._handed_over(owned)

    def _settle_now(self, backlog: Backlog) -> bool:
        if len(backlog.finished) >= self._half or backlog.closing:
            return True
        if not self.executor.out:
            return True  # nothing runs that could be acknowledged with it
        return mono_s() >= backlog.finished_since + self._settings.ack_interval_s

    def _acknowledge(self) -> None:
        if self._acknowledger.send():
            self._listen(self._acknowledger.link, self._receive_settled)

    def _receive_settled(self) -> None:
        for consumer, exc in self._acknowledger.receive():
            owned = self._of(consumer)
            if owned is not None and isinstance(exc, LeaseLost):
                self._suspect(owned)
            elif owned is not None and isinstance(exc, ReplyError):
                self._refused(owned, exc)

    def _handed_over(self, owned: Owned) -> None:
        self._forget(owned)
        self._supervisor.send(Released(owned.number))

    # Results

    def _store_results(self, consumer: ShardConsumer) -> None:
        """Of what was revoked, before it is acknowledged, and of what lies among the dead letters now."""
        for one in results_of(consumer, self._runner):
            self._outbox.add([one])

    def idle(self) -> bool:
        """Whether nothing is buffered, running or unwritten; for the supervisor's display."""
        return all(o.consumer.settler.idle() and not o.consumer.backlog.buffer for o in self._owned.values())
