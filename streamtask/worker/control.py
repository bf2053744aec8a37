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
from ..coordination.orders import End, Order, Own, Release, Resume, Revoked, Stop
from ..coordination.shared import SharedMemory
from ..errors import BrokerUnavailable, LeaseLost, QueueFull, ReplyError, StreamTaskError
from ..queue.consumer import ShardConsumer
from ..queue.fetcher import Fetcher
from ..redis import wire
from ..redis.link import Link
from ..redis.links import Links
from ..redis.outage import Outage, Rarely
from ..text import logger
from .ending import end_process
from .handing import AHEAD_S, Handing
from .outbox import Outbox
from .owned import Executor, Owned, Shards
from .ports import TaskRunner, WorkerSettings
from .reading import Intake
from .running import EVERY, Running
from .writing import Writing

log = logger("streamtask.worker")


class Supervisor(Protocol):
    """The supervisor's end of the wire, as the control thread sees it."""

    def fileno(self) -> int: ...
    def receive(self) -> Iterator[Order]: ...
    def send(self, order: Order) -> None: ...


class Control:
    """See the module. ``turn`` is one round of the loop."""

    def __init__(
        self,
        settings: WorkerSettings,
        runner: TaskRunner,
        memory: SharedMemory,
        supervisor: Supervisor,
        executor_of: Callable[[Running], Executor],
    ) -> None:
        """``executor_of``: makes the executor, given what it is to share with this loop."""
        self._settings = settings
        self._memory = memory
        self._supervisor = supervisor
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._queues = {queue.name: queue for queue in settings.queues}
        self._revoked_ids: dict[str, set[bytes | str]] = {name: set() for name in self._queues}
        self._parallel = settings.concurrency > 1
        self.running = Running(memory, settings.concurrency, self.wake)
        self.executor = executor = executor_of(self.running)
        broker = settings.broker
        self._links = Links(broker, broker.timeout_s)
        self._fetcher = fetcher = Fetcher(broker)
        self._outbox = outbox = Outbox(settings.result_broker, runner)
        self._shards = shards = Shards(settings.consumer.group, executor, outbox, supervisor)
        self._writing = writing = Writing(settings, executor, shards, outbox, fetcher, self._listen)
        self._handing = handing = Handing(settings, memory, executor, shards, outbox, writing)
        self._intake = Intake(settings, memory, executor, shards, handing, writing, fetcher, self._links, self._listen)
        self._down_until = 0.0
        self._outage = Outage(log, 0.02, 1.0)
        self._full = Rarely()
        self._stopping = False
        self.over = False
        """Whether the process is to end: nothing of it runs, and what it owned is given back, or can't be."""
        self._hurried = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._drain_wake)
        self._selector.register(supervisor.fileno(), selectors.EVENT_READ, self._obey)
        # Sockets that get another number whenever they connect anew: of what takes what they bring.
        self._sockets: dict[Callable[[], None], tuple[int, int]] = {}

    def forked(self) -> None:
        """In a child that a body has forked: nothing more starts there."""
        for owned in self._shards.owned.values():
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
        self._handing.collect()
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
        if self._handing.progress_at is not None:
            wake = min(wake, self._handing.progress_at)
        if self._shards.look_at is not None:
            wake = min(wake, self._shards.look_at)
            self._shards.look_at = None
        for owned in self._shards.owned.values():
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
                elif self._handing.busy() and (backlog.waits() or self._handing.left_in_batch(consumer)):
                    wake = min(wake, max(self._handing.moved_at + AHEAD_S, now + 0.005))  # to be offered again
            wake = min(wake, owned.next_audit)
            due = backlog.lanes.next_due()
            if due is not None:
                wake = min(wake, due)
        if self._fetcher.asked is None and self._intake.cold_at > now:
            wake = min(wake, self._intake.cold_at)
        return max(0.0, wake - now)

    def _is_quick(self, now: float) -> bool:
        """Whether bodies that run side by side end all the time, and others wait."""
        if (
            not self._parallel
            or not self._handing.pace_s
            or any(o.consumer.backlog.closing for o in self._shards.owned.values())
        ):
            return False
        return (
            max(self._handing.pace_s, now - self._handing.moved_at) < self._settings.ack_interval_s / 8
            and self.running.waiting() > 0
        )

    # Working

    def _work(self) -> None:
        self._intake.make_room()
        now = mono_s()
        for owned in [o for o in self._shards.owned.values() if o.quiet_until <= now and o.has_to_prepare(now)]:
            try:
                self._intake.prepare(owned)
            except LeaseLost:
                self._shards.suspect(owned)
            except ReplyError as exc:
                self._shards.refused(owned, exc)
        self._intake.read_in_turn()
        few = self._handing.hand_out() and self._fetcher.asked is None
        self._hurried = few and not self._hurried
        if self._hurried:
            # A few messages have come after a wait: they start before anything else is done. But not time and again: what
            # comes back at once would keep all others out.
            self._shards.look_at = now
            self._writing.acknowledge()
            return
        self._intake.offer_again()
        self._intake.make_room()
        self._intake.send_fetch()
        for owned in [o for o in self._shards.owned.values() if o.consumer.has_to_write() or self._outbox]:
            self._writing.write(owned)
        self._writing.acknowledge()

    # What goes wrong

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
        self._writing.drop()
        self._fetcher.drop()
        # Of every shard: Redis may be another one now, or the same without its last second.
        for owned in self._shards.owned.values():
            owned.consumer.claimer.connection_lost()
        self._down_until = mono_s() + self._outage.met(exc)

    # Sockets

    def _drain_wake(self) -> None:
        try:
            while len(os.read(self._wake_read, 4096)) == 4096:
                pass
        except BlockingIOError:
            pass

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
        self._shards.add(owned)
        log.debug("owns queue=%s shard=%s token=%d", order.queue, shard, order.token)

    def _release(self, number: int) -> None:
        owned = self._shards.owned.get(number)
        if owned is not None:
            owned.consumer.backlog.closing = True
            owned.consumer.backlog.halted = True
            self.executor.withdraw(owned.consumer.backlog)

    def _resume(self, number: int) -> None:
        owned = self._shards.owned.get(number)
        if owned is not None and not self._stopping:
            owned.consumer.backlog.closing = False

    def _stop(self) -> None:
        self._stopping = True
        for number in list(self._shards.owned):
            self._release(number)

    def idle(self) -> bool:
        """Whether nothing is buffered, running or unwritten; for the supervisor's display."""
        return all(o.consumer.settler.idle() and not o.consumer.backlog.buffer for o in self._shards.owned.values())
