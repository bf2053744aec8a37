"""The supervisor: starts worker processes, keeps their leases, and spreads the shards over them.

Its duties, in the order of a round:

1. See which children died, stopped or went on (SIGCHLD), and end what they had: charge the bodies that ran, free the
   leases, start a replacement.
2. End a child whose body is past its ``time_limit``.
3. Say to Redis that its children live, and renew their leases, three times in a lease time.
4. Compare who owns what with who should (``coordination.assignment``), hand over what is to move, take what is free.

It runs no task, so a body that holds the GIL can't keep it from renewing. Everything it knows can be read from Redis
again: when it dies, its children die with it and other pods take over when the leases expire.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..backoff import delays
from ..clock import mono_s, wall_ms
from ..coordination.assignment import assign
from ..coordination.lease import Lease, Refused, acquire, join_shared, reap
from ..coordination.membership import Membership
from ..errors import BrokerUnavailable, LeaseLost, QueueFull, StreamTaskError
from ..queue.declare import Queue
from ..redis.keys import SHARED
from ..redis.link import Link, ReplyError, pack
from .child import ENV_FDS
from .ports import WorkerSettings
from .shared import MAX_LEASES, SharedMemory, create_file
from .wire import Closed, Wire

log = logging.getLogger("streamtask.supervisor")

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CHILD_UNUSABLE = 3
"""What a child exits with when its app can't be loaded: starting another would not help."""

BEATS = 3
"""Renewals in one lease time."""


@dataclass(slots=True, eq=False)
class Held:
    """A lease of a child, and how far its hand-over has come."""

    number: int
    queue: Queue
    shard: int | str
    lease: Lease
    handover_until: float | None = None
    not_before: float = 0.0


@dataclass(slots=True, eq=False)
class Child:
    """One worker process."""

    index: int
    incarnation: str
    process: subprocess.Popen[bytes]
    wire: Wire
    memory: SharedMemory
    started: float
    started_wall: float
    ready: bool = False
    stopped: bool = False  # by SIGSTOP
    stopping: bool = False
    killed_for: str = ""
    overran: list[int] = field(default_factory=list)
    held: dict[int, Held] = field(default_factory=dict)
    numbers: int = 0

    def next_number(self) -> int:
        for _ in range(MAX_LEASES):
            self.numbers = (self.numbers + 1) % MAX_LEASES
            if self.numbers not in self.held:
                return self.numbers
        raise StreamTaskError(f"a worker process can own at most {MAX_LEASES} shards: start more processes")

    def holding(self, queue: Queue, shard: int | str) -> Held | None:
        return next((h for h in self.held.values() if h.queue is queue and h.shard == shard), None)


class QueueWatch:
    """What the supervisor knows of one queue's group."""

    def __init__(self, queue: Queue, group: str, lease_ms: int) -> None:
        self.queue = queue
        self.membership = Membership(queue.keys, group, lease_ms)
        self.look_at = 0.0  # monotonic: when to compare ownership next
        self.seen_owner: set[int | str] = set()  # shards whose lease record was there once
        self.missed_ms: dict[int | str, int] = {}
        self.revoked: list[str] = []
        self.said: list[Any] = []


class Supervisor:
    """See the module. ``argv``: the command that starts a child; ``processes``: how many."""

    def __init__(self, settings: WorkerSettings, argv: Sequence[str], processes: int) -> None:
        self.settings = settings
        self._argv = list(argv)
        self._processes = processes
        self._lease_ms = settings.lease_ms
        self._group = settings.consumer.group
        self._link: Link = settings.broker.link(timeout_s=max(0.5, settings.lease_ms / 3000))
        self._watches = [QueueWatch(queue, self._group, settings.lease_ms) for queue in settings.queues]
        self._channels = {w.queue.keys.channel(self._group).encode(): w for w in self._watches}
        self._children: list[Child] = []
        self._spawn_at: list[tuple[float, int]] = []
        self._spawn_delays = delays(0.2, 5.0)
        self._selector = selectors.DefaultSelector()
        self._news: Link | None = None
        self._next_beat = 0.0
        self._down_delays: Any = None
        self._stop_signals = 0
        self._exit_status = EXIT_OK
        self._wake_read, self._wake_write = socket.socketpair()
        self._host = socket.gethostname()

    # The loop

    def run(self) -> int:
        """Works until it is told to stop by SIGTERM or SIGINT. Returns the exit status."""
        for watch in self._watches:
            watch.queue.declare((self._group,))
        with self._signals():
            for index in range(self._processes):
                self._spawn(index)
            try:
                while not self._finished():
                    self._round()
            finally:
                self._end()
        return self._exit_status

    def _round(self) -> None:
        for key, _ in self._selector.select(self._timeout_s()):
            if key.data == "signal":
                self._drain_signals()
            elif key.data == "news":
                self._take_news()
            else:
                self._take_messages(key.data)
        self._reap_children()
        now = mono_s()
        if self.settings.has_time_limits:
            self._end_overdue(now)
        for at, index in [due for due in self._spawn_at if due[0] <= now]:
            self._spawn_at.remove((at, index))
            if not self._stop_signals:
                self._spawn(index)
        try:
            if now >= self._next_beat:
                self._beat()
            for watch in self._watches:
                if now >= watch.look_at and not self._stop_signals:
                    self._coordinate(watch)
            self._end_handovers(now)
        except BrokerUnavailable as exc:
            self._outage(exc)
        except (QueueFull, ReplyError) as exc:
            log.error("%s", exc)
            self._next_beat = mono_s() + 0.2
            for watch in self._watches:
                watch.look_at = max(watch.look_at, self._next_beat)

    def _timeout_s(self) -> float:
        wake = self._next_beat
        if not self._stop_signals:
            wake = min([wake, *(w.look_at for w in self._watches)])
        wake = min([wake, *(at for at, _ in self._spawn_at)])
        now = mono_s()
        if self._down_delays is not None:
            wake = max(wake, self._next_beat)
        elif self.settings.has_time_limits:
            wake = min(wake, now + 0.05)
        for child in self._children:
            for held in child.held.values():
                if held.handover_until is not None:
                    wake = min(wake, held.handover_until)
        return max(0.0, wake - now)

    def _outage(self, exc: StreamTaskError) -> None:
        if self._down_delays is None:
            log.warning("%s", exc)
            self._down_delays = delays(0.05, 0.5)
        self._link.close()
        self._close_news()
        for watch in self._watches:
            watch.membership.cut_off = True
        wait = next(self._down_delays)
        self._next_beat = mono_s() + wait
        for watch in self._watches:
            watch.look_at = max(watch.look_at, self._next_beat)

    def _finished(self) -> bool:
        if self._exit_status != EXIT_OK and not self._children:
            return True
        return bool(self._stop_signals) and not self._children

    # Signals

    def _signals(self) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def installed() -> Any:
            self._wake_read.setblocking(False)
            self._wake_write.setblocking(False)
            old_fd = signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
            old = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
            old[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda signum, frame: None)
            self._selector.register(self._wake_read, selectors.EVENT_READ, "signal")
            try:
                yield
            finally:
                signal.set_wakeup_fd(old_fd)
                for signum, handler in old.items():
                    signal.signal(signum, handler)

        return installed()

    def _on_signal(self, signum: int, frame: object) -> None:
        self._stop_signals += 1

    def _drain_signals(self) -> None:
        try:
            self._wake_read.recv(4096)
        except BlockingIOError:
            return
        if self._stop_signals == 1 and not all(child.stopping for child in self._children):
            log.info("warm shutdown: running bodies end first; a second signal stops at once")
            for child in self._children:
                child.stopping = True
                child.wire.send("stop")
                for held in child.held.values():
                    child.memory.trusted[held.number] = 0.0
                if not child.held and child.ready:
                    self._stop_child(child)
                if not child.ready:
                    self._kill(child, "stopped before it was ready")
        elif self._stop_signals > 1:
            log.warning("cold shutdown: running bodies are cut off and will run again")
            for child in self._children:
                self._kill(child, "cold shutdown")

    # Children

    def _spawn(self, index: int) -> None:
        ours, theirs = socket.socketpair()
        memory_fd = create_file(self.settings.concurrency)
        env = {**os.environ, ENV_FDS: f"{theirs.fileno()},{memory_fd},{os.getpid()}"}
        process = subprocess.Popen(self._argv, env=env, pass_fds=(theirs.fileno(), memory_fd), stdin=subprocess.DEVNULL)
        theirs.close()
        memory = SharedMemory(memory_fd, self.settings.concurrency)
        os.close(memory_fd)
        ours.setblocking(True)
        child = Child(index, uuid.uuid4().hex[:16], process, Wire(ours), memory, mono_s(), wall_ms() / 1000)
        self._children.append(child)
        self._selector.register(ours, selectors.EVENT_READ, child)
        log.info("started a worker process pid=%d process=%d id=%s", process.pid, index, child.incarnation)

    def _take_messages(self, child: Child) -> None:
        try:
            for message in child.wire.receive():
                op = message["op"]
                if op == "ready":
                    self._child_ready(child)
                elif op == "released":
                    self._child_released(child, message["number"])
                elif op == "lost":
                    self._kill(child, "it lost a lease")
        except Closed:
            self._selector.unregister(child.wire)
            child.wire.close()

    def _child_ready(self, child: Child) -> None:
        child.ready = True
        if self._stop_signals:
            self._stop_child(child)
            return
        self._next_beat = 0.0

    def _child_released(self, child: Child, number: int) -> None:
        held = child.held.pop(number, None)
        if held is None:
            return
        child.memory.trusted[number] = 0.0
        try:
            self._free(held, gone=True)
            self._announce(held.queue, "released")
        except BrokerUnavailable as exc:
            # The lease runs out by itself.
            self._outage(exc)
        except (QueueFull, ReplyError) as exc:
            log.error("a lease was not given back; it runs out: %s", exc)
        self._look_soon(held.queue)
        if child.stopping and not child.held:
            self._stop_child(child)

    def _stop_child(self, child: Child) -> None:
        """Ends a child that owns nothing."""
        child.stopping = True
        self._kill(child, "stopped")

    def _kill(self, child: Child, why: str) -> None:
        if not child.killed_for:
            child.killed_for = why
            if why not in ("stopped", "stopped before it was ready"):
                log.warning("ending a worker process pid=%d: %s", child.process.pid, why)
        try:
            os.kill(child.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def _reap_children(self) -> None:
        for child in list(self._children):
            try:
                pid, status = os.waitpid(child.process.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                pid, status = child.process.pid, 0
            if pid == 0:
                continue
            if os.WIFSTOPPED(status):
                log.warning("a worker process is stopped (SIGSTOP); its leases are not renewed pid=%d", pid)
                child.stopped = True
            elif os.WIFCONTINUED(status):
                log.warning("a stopped worker process goes on pid=%d", pid)
                child.stopped = False
                self._next_beat = 0.0
            else:
                child.process.returncode = os.waitstatus_to_exitcode(status)
                self._child_died(child)

    def _child_died(self, child: Child) -> None:
        code = child.process.returncode
        self._children.remove(child)
        try:
            self._selector.unregister(child.wire)
            child.wire.close()
        except (KeyError, ValueError):
            pass
        running = child.memory.running()
        if child.killed_for != "stopped":
            log.log(
                logging.INFO if child.killed_for else logging.ERROR,
                "a worker process ended pid=%d status=%s bodies=%d%s",
                child.process.pid, code, len(running), f" ({child.killed_for})" if child.killed_for else "",
            )  # fmt: skip
        try:
            self._settle_estate(child, running)
        except BrokerUnavailable as exc:
            self._outage(exc)
        except (QueueFull, ReplyError) as exc:
            log.error("what a process left was not settled; its leases run out: %s", exc)
        if code == EXIT_CHILD_UNUSABLE and not child.ready:
            self._exit_status = EXIT_FAILED
            self._stop_signals += 1
            for other in self._children:
                self._kill(other, "stopped")
            return
        if self._stop_signals or child.stopping:
            return
        now = mono_s()
        quick = now - child.started < 2.0
        if not quick:
            self._spawn_delays = delays(0.2, 5.0)
        self._spawn_at.append(
            (now + (next(self._spawn_delays) if quick and not child.killed_for else 0.0), child.index)
        )

    def _settle_estate(self, child: Child, running: list[tuple[int, int, str]]) -> None:
        """What a dead child leaves: bodies that ran are charged, then the leases are freed."""
        if child.killed_for == "time limit":
            running = [entry for entry in running if entry[0] in child.overran]
        elif child.killed_for:
            running = []  # we ended it: no body's fault
        for held in list(child.held.values()):
            entries = [entry_id for _, number, entry_id in running if number == held.number]
            if entries:
                held.lease.charge(self._link, entries)
            self._free(held, gone=True)
            self._look_soon(held.queue)
        child.held.clear()
        for watch in self._watches:
            watch.membership.leave(self._link, [child.incarnation])
            self._announce(watch.queue, "left")
            watch.membership.members = [m for m in watch.membership.members if m != child.incarnation]
            watch.look_at = 0.0

    def _free(self, held: Held, *, gone: bool) -> None:
        if held.lease.shared:
            reap(self._link, held.lease.keys, self._group, held.lease.incarnation, self._lease_ms, gone=gone)
        else:
            held.lease.release(self._link)

    def _end_overdue(self, now: float) -> None:
        for child in self._children:
            overdue = child.memory.overdue(now)
            if overdue and not child.killed_for:
                child.overran = overdue
                self._kill(child, "time limit")

    # Leases

    def _beat(self) -> None:
        """Heartbeat and renewals of all children in one write."""
        live = [child for child in self._children if child.ready and not child.stopped and not child.killed_for]
        members = {child.incarnation: self._info(child) for child in live if not child.stopping}
        leases = [(child, held) for child in live for held in child.held.values()]
        leases.sort(key=lambda pair: pair[1].lease.token)  # after a flush the token counters grow again in this order
        sent_at, sent_ms = mono_s(), wall_ms()
        packed = [watch.membership.pack_beat(members) for watch in self._watches]
        packed += [held.lease.pack_renew() for _, held in leases]
        replies = self._link.pipeline(packed)
        for watch, reply in zip(self._watches, replies, strict=False):
            if isinstance(reply, Exception):
                raise reply
            if watch.membership.heard(reply, sent_ms):
                watch.look_at = 0.0
        for (child, held), reply in zip(leases, replies[len(self._watches) :], strict=True):
            if isinstance(reply, Exception):
                log.error("a renewal failed queue=%s shard=%s: %s", held.queue.name, held.shard, reply)
                continue
            try:
                held.lease.renewed(reply, sent_at)
            except LeaseLost:
                child.held.pop(held.number, None)
                child.memory.trusted[held.number] = 0.0
                self._kill(child, f"it lost the lease of queue={held.queue.name} shard={held.shard}")
                continue
            if held.handover_until is None:
                child.memory.trusted[held.number] = held.lease.trusted_until
        if self._down_delays is not None:
            log.info("connected again broker=%s", self.settings.broker.safe_url)
            self._down_delays = None
        self._next_beat = mono_s() + self._lease_ms / 1000 / BEATS
        self._join_shared(live)
        self._listen()

    def _info(self, child: Child) -> Mapping[str, Any]:
        return {
            "host": self._host,
            "started": child.started_wall,
            "version": self.settings.version,
            "pid": child.process.pid,
            "supervisor": os.getpid(),
            "process": child.index,
            "processes": self._processes,
            "concurrency": self.settings.concurrency,
        }

    def _join_shared(self, live: list[Child]) -> None:
        """Each live child is a consumer of each queue's shared stream."""
        for child in live:
            if child.stopping:
                continue
            for watch in self._watches:
                queue = watch.queue
                if child.holding(queue, SHARED) is None:
                    keys = queue.shard_keys(SHARED)
                    lease = join_shared(self._link, keys, self._group, child.incarnation, self._lease_ms)
                    self._give(child, queue, SHARED, lease)
        for watch in self._watches:
            self._reap_consumers(watch)

    def _reap_consumers(self, watch: QueueWatch) -> None:
        """Ends consumers of the shared stream whose processes are gone with their pod."""
        keys = watch.queue.shard_keys(SHARED)
        now_ms = watch.membership.redis_now_ms()
        expired = self._link.command("ZRANGEBYSCORE", keys.consumers(self._group), "-inf", now_ms)
        for name in expired:
            incarnation = name.decode()
            if any(child.incarnation == incarnation for child in self._children):
                continue
            if reap(
                self._link,
                keys,
                self._group,
                incarnation,
                self._lease_ms,
                gone=False,
                since_ms=watch.membership.since_ms,
            ):
                log.warning(
                    "removed the consumer of a process that is gone queue=%s consumer=%s", watch.queue.name, incarnation
                )

    def _give(self, child: Child, queue: Queue, shard: int | str, lease: Lease) -> None:
        number = child.next_number()
        child.held[number] = Held(number, queue, shard, lease)
        child.memory.trusted[number] = lease.trusted_until
        child.wire.send(
            "own",
            number=number,
            queue=queue.name,
            shard=shard,
            epoch=queue.shape().epoch,
            token=lease.token,
            shared=lease.shared,
            by_expiry=lease.by_expiry,
            incarnation=child.incarnation,
        )
        watch = next(w for w in self._watches if w.queue is queue)
        if watch.revoked:
            child.wire.send("revoked", queue=queue.name, ids=watch.revoked)
        log.info(
            "took a lease queue=%s shard=%s token=%d process=%d%s",
            queue.name, shard, lease.token, child.index, " (it had expired)" if lease.by_expiry else "",
        )  # fmt: skip

    # Who owns what

    def _coordinate(self, watch: QueueWatch) -> None:
        """One comparison of who owns the shards with who should; all supervisors come to the same answer."""
        queue, membership, now = watch.queue, watch.membership, mono_s()
        watch.look_at = now + self._lease_ms / 1000 / BEATS
        shards = range(queue.shape().shards)
        mine = {
            c.incarnation: c
            for c in self._children
            if c.ready and not c.stopping and not c.killed_for and not c.stopped
        }
        # What was renewed just now needs no look.
        owners = {
            int(held.shard): child.incarnation
            for child in mine.values()
            for held in child.held.values()
            if held.queue is queue and held.shard != SHARED and held.lease.trusted_until > now
        }
        watch.seen_owner.update(owners)
        for shard in owners:
            watch.missed_ms.pop(shard, None)
        others = [shard for shard in shards if shard not in owners]
        records = self._link.pipeline(
            [pack("HMGET", queue.shard_keys(s).lease(self._group), "owner", "expires_at") for s in others]
        )
        redis_now = membership.redis_now_ms()
        expiry: dict[int, int] = {}
        for shard, record in zip(others, records, strict=True):
            if isinstance(record, Exception):
                raise record
            if record[0]:
                owners[shard] = record[0].decode()
                expiry[shard] = int(record[1] or 0)
                watch.seen_owner.add(shard)
                watch.missed_ms.pop(shard, None)
            elif record[0] is None and shard in watch.seen_owner:
                watch.missed_ms.setdefault(shard, redis_now)
            elif record[0] == b"":
                watch.seen_owner.add(shard)
                watch.missed_ms.pop(shard, None)
        target = assign(list(shards), membership.members, owners, queue.name)
        for shard, member in target.items():
            owner = owners.get(shard)
            if owner in mine and owner != member:
                self._begin_handover(mine[owner], queue, shard, now)
            if member in mine and owner != member:
                until = 0 if owner is None else expiry.get(shard, redis_now + self._lease_ms)
                if until > redis_now:
                    # Its owner hands it over, or its lease runs out: look again then.
                    watch.look_at = min(watch.look_at, now + max(0.01, (until - redis_now) / 1000))
                    continue
                self._take(watch, mine[member], shard, now)
            elif member in mine and mine[member].holding(queue, shard) is None:
                # The record names a process of ours that does not know of it: a lost reply. Taking it again is the same.
                self._take(watch, mine[member], shard, now)

        self._say_owned(watch)

    def _say_owned(self, watch: QueueWatch) -> None:
        """One line on who owns what here, whenever that has changed."""
        owned = [
            (child.index, sorted(h.shard for h in child.held.values() if h.queue is watch.queue and h.shard != SHARED))
            for child in sorted(self._children, key=lambda child: child.index)
        ]
        if owned != watch.said and any(child.ready for child in self._children):
            watch.said = owned
            log.info(
                "shards owned here queue=%s: %s",
                watch.queue.name,
                "; ".join(f"process {i}: {', '.join(map(str, shards)) or 'none'}" for i, shards in owned) or "none",
            )

    def _take(self, watch: QueueWatch, child: Child, shard: int, now: float) -> None:
        queue = watch.queue
        if child.holding(queue, shard) is not None:
            return
        answer = acquire(
            self._link,
            queue.shard_keys(shard),
            self._group,
            child.incarnation,
            self._lease_ms,
            since_ms=watch.membership.since_ms,
            missed_at_ms=watch.missed_ms.get(shard, 0),
        )
        if isinstance(answer, Refused):
            wait = max(0.01, (answer.ask_at_ms - watch.membership.redis_now_ms()) / 1000)
            watch.look_at = min(watch.look_at, now + wait)
            return
        watch.missed_ms.pop(shard, None)
        self._give(child, queue, shard, answer)

    def _begin_handover(self, child: Child, queue: Queue, shard: int, now: float) -> None:
        held = child.holding(queue, shard)
        if held is None or held.handover_until is not None or now < held.not_before:
            return
        held.handover_until = now + self.settings.handover_timeout_s
        child.memory.trusted[held.number] = 0.0
        child.wire.send("release", number=held.number)

    def _end_handovers(self, now: float) -> None:
        """A hand-over that takes too long is called off, for a body still runs; it is tried again later."""
        for child in self._children:
            if child.stopping:
                continue
            for held in child.held.values():
                if held.handover_until is not None and now >= held.handover_until:
                    log.info("a body still runs: hand-over put off queue=%s shard=%s", held.queue.name, held.shard)
                    held.handover_until = None
                    held.not_before = now + self.settings.handover_timeout_s
                    child.memory.trusted[held.number] = held.lease.trusted_until
                    child.wire.send("resume", number=held.number)

    def _look_soon(self, queue: Queue) -> None:
        for watch in self._watches:
            if watch.queue is queue:
                watch.look_at = 0.0

    # News of other supervisors

    def _announce(self, queue: Queue, what: str) -> None:
        watch = next(w for w in self._watches if w.queue is queue)
        self._link.call(watch.membership.pack_announce(what))

    def _listen(self) -> None:
        """Subscribes to what other supervisors tell: it only makes things faster, so a lost message costs a beat."""
        if self._news is not None:
            return
        self._news = self.settings.broker.link(timeout_s=5.0)
        self._news.send(pack("SUBSCRIBE", *self._channels))
        for _ in self._channels:
            self._news.read()
        self._selector.register(self._news, selectors.EVENT_READ, "news")
        for watch in self._watches:
            self._read_revoked(watch)
            self._announce(watch.queue, "joined")

    def _close_news(self) -> None:
        if self._news is not None:
            try:
                self._selector.unregister(self._news)
            except (KeyError, ValueError):
                pass
            self._news.close()
            self._news = None

    def _take_news(self) -> None:
        assert self._news is not None
        try:
            while True:
                _, channel, what = self._news.read()
                watch = self._channels.get(channel)
                if watch is not None:
                    if what == b"revoked":
                        self._read_revoked(watch)
                    elif what == b"joined":
                        self._next_beat = 0.0
                    else:
                        self._next_beat = 0.0
                        watch.look_at = 0.0
                if not self._news.buffered():
                    return
        except BrokerUnavailable as exc:
            self._outage(exc)

    def _read_revoked(self, watch: QueueWatch) -> None:
        ids = self._link.command("ZRANGEBYSCORE", watch.queue.keys.revoked, wall_ms(), "+inf")
        revoked = [one.decode() for one in ids]
        if revoked != watch.revoked:
            watch.revoked = revoked
            for child in self._children:
                child.wire.send("revoked", queue=watch.queue.name, ids=revoked)

    # The end

    def _end(self) -> None:
        for child in list(self._children):
            self._kill(child, "stopped")
            child.process.wait()
            self._children.remove(child)
            try:
                self._settle_estate(child, [])
            except StreamTaskError:
                pass
        self._close_news()
        self._link.close()
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()
