"""The supervisor: starts worker processes, keeps their leases, and spreads the shards over them.

Its duties, in the order of a round:

1. See which children died, stopped or went on (SIGCHLD), and end what they had: charge the bodies that ran, free the
   leases, start a replacement.
2. End a child whose body is past its ``time_limit``.
3. Let the coordinator keep the leases and spread the shards; join the shared streams.

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
from ..coordination.lease import join_shared
from ..errors import BrokerUnavailable, QueueFull, ReplyError, StreamTaskError
from ..redis.keys import SHARED
from ..text import counted, logger
from .child import ENV_FDS
from .coordinator import Coordinator, Held, Member, QueueWatch
from .ports import WorkerSettings
from .shared import MAX_LEASES, SharedMemory, create_file
from .wire import Closed, PatientWire

log = logger("streamtask.supervisor")

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CHILD_UNUSABLE = 3
"""What a child exits with when its app can't be loaded: starting another would not help."""


@dataclass(slots=True, eq=False, kw_only=True)
class Child(Member):
    """One worker process. ``crew``: what its supervisor says of all its processes."""

    process: subprocess.Popen[bytes]
    wire: PatientWire
    memory: SharedMemory
    crew: Mapping[str, Any]
    started: float
    started_wall: float
    ready: bool = False
    stopped: bool = False  # by SIGSTOP
    stopping: bool = False
    killed_for: str = ""
    overran: list[int] = field(default_factory=list)
    told: dict[str, set[str]] = field(default_factory=dict)  # by queue, the revoked ids that it knows or is about to

    @property
    def kept(self) -> bool:
        return self.ready and not self.stopped and not self.killed_for

    @property
    def leaving(self) -> bool:
        return self.stopping

    def info(self) -> Mapping[str, Any]:
        return {**self.crew, "started": self.started_wall, "pid": self.process.pid, "process": self.index}

    def own(self, held: Held) -> None:
        lease = held.lease
        self.trust(held, lease.trusted_until)
        self.revoked(held.watch)  # before it runs anything of it
        self.wire.send(
            "own",
            number=held.number,
            queue=held.watch.name,
            shard=held.shard,
            epoch=held.watch.epoch,
            token=lease.token,
            shared=lease.shared,
            by_expiry=lease.by_expiry,
            incarnation=self.incarnation,
        )

    def release(self, held: Held) -> None:
        self.wire.send("release", number=held.number)

    def resume(self, held: Held) -> None:
        self.wire.send("resume", number=held.number)

    def lost(self, held: Held) -> None:
        self.trust(held, 0.0)
        self.kill(f"it lost the lease of queue={held.watch.name} shard={held.shard}")

    def trust(self, held: Held, until: float) -> None:
        self.memory.trusted[held.number] = until

    def revoked(self, watch: QueueWatch) -> None:
        if watch.revoked != self.told.get(watch.name, set()):
            self.wire.send_late("revoked", watch.name, lambda: self._newly_revoked(watch))

    def _newly_revoked(self, watch: QueueWatch) -> Mapping[str, Any]:
        told, self.told[watch.name] = self.told.get(watch.name, set()), watch.revoked
        return {"queue": watch.name, "ids": list(watch.revoked - told), "over": list(told - watch.revoked)}

    def kill(self, why: str) -> None:
        if not self.killed_for:
            self.killed_for = why
            if why not in ("stopped", "stopped before it was ready"):
                log.warning("ending a worker process pid=%d: %s", self.process.pid, why)
        try:
            os.kill(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


class Supervisor:
    """See the module. ``argv``: the command that starts a child; ``processes``: how many."""

    def __init__(self, settings: WorkerSettings, argv: Sequence[str], processes: int) -> None:
        self.settings = settings
        self._argv = list(argv)
        self._processes = processes
        self._lease_ms = settings.lease_ms
        self._group = settings.consumer.group
        self._watches = [
            QueueWatch(queue.name, queue.keys, self._group, settings.lease_ms) for queue in settings.queues
        ]
        self._children: list[Child] = []
        self._estates: list[tuple[Child, list[tuple[int, int, str]]]] = []  # dead children, and what they ran
        self._estates_at = 0.0
        self._crew = {
            "host": socket.gethostname(),
            "version": settings.version,
            "supervisor": os.getpid(),
            "processes": processes,
            "concurrency": settings.concurrency,
        }
        self._spawn_at: list[tuple[float, int]] = []
        self._spawn_delays = delays(0.2, 5.0)
        self._selector = selectors.DefaultSelector()
        self._coordinator = Coordinator(
            settings.broker,
            group=self._group,
            lease_ms=settings.lease_ms,
            handover_timeout_s=settings.handover_timeout_s,
            members=self._children,
            watches=self._watches,
            selector=self._selector,
            beaten=self._join_shared,
            log=log,
        )
        self._said_ready = False
        self._stop_signals = 0
        self._exit_status = EXIT_OK
        self._wake_read, self._wake_write = socket.socketpair()

    # The loop

    def run(self) -> int:
        """Works until it is told to stop by SIGTERM or SIGINT. Returns the exit status."""
        for watch, queue in zip(self._watches, self.settings.queues, strict=True):
            watch.shape = queue.declare((self._group,))
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
        for key, events in self._selector.select(self._timeout_s()):
            if key.data == "signal":
                self._drain_signals()
            elif key.data == "news":
                self._coordinator.take_news()
            else:
                for child in self._children:
                    if child.wire is key.fileobj:
                        self._serve(child, events)
        self._reap_children()
        now = mono_s()
        if self.settings.has_time_limits:
            self._end_overdue(now)
        for at, index in [due for due in self._spawn_at if due[0] <= now]:
            self._spawn_at.remove((at, index))
            if not self._stop_signals:
                self._spawn(index)
        if now >= self._estates_at:
            self._settle_estates()  # before any lease is taken
        self._coordinator.closing = bool(self._stop_signals)
        self._coordinator.work()
        self._say_ready()

    def _say_ready(self) -> None:
        """Once: all processes have started, and own something."""
        if not self._said_ready and len(self._children) == self._processes and all(c.held for c in self._children):
            self._said_ready = True
            log.info(
                "ready: %s, %s at once in each queues=%s",
                counted(self._processes, "process", "processes"),
                counted(self.settings.concurrency, "message"),
                ",".join(watch.name for watch in self._watches),
            )

    def _timeout_s(self) -> float:
        now = mono_s()
        wake = min([self._coordinator.wake_at(), *(at for at, _ in self._spawn_at)])
        if self.settings.has_time_limits:
            wake = min(wake, now + 0.05)
        return max(0.0, wake - now)

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
                    child.trust(held, 0.0)
                if not child.held and child.ready:
                    self._stop_child(child)
                if not child.ready:
                    child.kill("stopped before it was ready")
        elif self._stop_signals > 1:
            log.warning("cold shutdown: running bodies are cut off and will run again")
            for child in self._children:
                child.kill("cold shutdown")

    # Children

    def _spawn(self, index: int) -> None:
        ours, theirs = socket.socketpair()
        memory_fd = create_file(self.settings.concurrency)
        env = {**os.environ, ENV_FDS: f"{theirs.fileno()},{memory_fd},{os.getpid()}"}
        process = subprocess.Popen(self._argv, env=env, pass_fds=(theirs.fileno(), memory_fd), stdin=subprocess.DEVNULL)
        theirs.close()
        memory = SharedMemory(memory_fd, self.settings.concurrency)
        os.close(memory_fd)
        child = Child(
            incarnation=uuid.uuid4().hex[:16],
            index=index,
            most=MAX_LEASES,
            process=process,
            wire=PatientWire(ours, self._selector, "child"),
            memory=memory,
            crew=self._crew,
            started=mono_s(),
            started_wall=wall_ms() / 1000,
        )
        self._children.append(child)
        # Of the first ones nothing is said before all are ready.
        how = logging.INFO if self._said_ready else logging.DEBUG
        log.log(how, "started a worker process pid=%d process=%d id=%s", process.pid, index, child.incarnation)

    def _serve(self, child: Child, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            child.wire.flush()
        if events & selectors.EVENT_READ:
            self._take_messages(child)

    def _take_messages(self, child: Child) -> None:
        try:
            for message in child.wire.receive():
                op = message["op"]
                if op == "ready":
                    self._child_ready(child)
                elif op == "released":
                    self._child_released(child, message["number"])
                elif op == "lost":
                    child.kill("it lost a lease")
        except Closed:
            child.wire.close()

    def _child_ready(self, child: Child) -> None:
        child.ready = True
        if self._stop_signals:
            self._stop_child(child)
            return
        self._coordinator.soon()

    def _child_released(self, child: Child, number: int) -> None:
        self._coordinator.released(child, number)
        if child.stopping and not child.held:
            self._stop_child(child)

    def _stop_child(self, child: Child) -> None:
        """Ends a child that owns nothing."""
        child.stopping = True
        child.kill("stopped")

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
                self._coordinator.soon()
            else:
                child.process.returncode = os.waitstatus_to_exitcode(status)
                self._child_died(child)

    def _child_died(self, child: Child) -> None:
        code = child.process.returncode
        self._children.remove(child)
        child.wire.close()
        running = child.memory.running()
        if child.killed_for != "stopped":
            log.log(
                logging.INFO if child.killed_for else logging.ERROR,
                "a worker process ended pid=%d status=%s bodies=%d%s",
                child.process.pid, code, len(running), f" ({child.killed_for})" if child.killed_for else "",
            )  # fmt: skip
        self._estates.append((child, running))
        self._settle_estates()
        if code == EXIT_CHILD_UNUSABLE and not child.ready:
            self._exit_status = EXIT_FAILED
            self._stop_signals += 1
            for other in self._children:
                other.kill("stopped")
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

    def _settle_estates(self) -> None:
        """Settles what dead children left; while Redis is away it is kept, for a crash that is not charged may repeat for
        ever."""
        while self._estates:
            try:
                self._settle_estate(*self._estates[0])
            except BrokerUnavailable as exc:
                self._coordinator.outage(exc)
                self._estates_at = self._coordinator.wake_at()
                return
            except (QueueFull, ReplyError) as exc:
                log.error("what a process left was not settled; its leases run out: %s", exc)
            self._estates.pop(0)

    def _settle_estate(self, child: Child, running: list[tuple[int, int, str]]) -> None:
        """What a dead child leaves: bodies that ran are charged, or spared, then the leases are freed."""
        read = None if child.killed_for else child.memory.being_read()
        ran: dict[int, dict[str, bool]] = {}
        for slot, number, entry_id in running:
            # Where we ended it, that is no body's fault, but of those that overran.
            at_fault = (
                slot in child.overran if child.killed_for == "time limit" else not child.killed_for and read is None
            )
            ran.setdefault(number, {})[entry_id] = at_fault
        if read is not None:
            ran.setdefault(read[0], {})[read[1]] = True
        self._coordinator.bury(child, ran, all_that_ran=True)

    def _end_overdue(self, now: float) -> None:
        for child in self._children:
            overdue = child.memory.overdue(now)
            if overdue and not child.killed_for:
                child.overran = overdue
                child.kill("time limit")

    # Shared streams

    def _join_shared(self, live: Sequence[Member]) -> None:
        """Each live child is a consumer of each queue's shared stream."""
        for watch in self._watches:
            keys = watch.shard_keys(SHARED)
            link = self._coordinator.links.at(keys.stream)
            alive = watch.keys.alive(self._group, keys, cluster=self.settings.broker.is_cluster)
            for child in live:
                if not child.leaving and child.holding(keys) is None and self._coordinator.has_room(child):
                    with self._coordinator.one_by_one(watch, SHARED):
                        lease = join_shared(link, keys, self._group, child.incarnation, self._lease_ms, alive=alive)
                        self._coordinator.give(child, watch, SHARED, lease)
                        self._coordinator.soon()  # what the dead have left is its to take

    # The end

    def _end(self) -> None:
        for child in list(self._children):
            child.kill("stopped")
            child.process.wait()
            self._children.remove(child)
            self._estates.append((child, child.memory.running()))
        for estate in self._estates:
            try:
                self._settle_estate(*estate)
            except StreamTaskError:
                pass
        self._coordinator.close()
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()
        log.info("stopped status=%d", self._exit_status)
