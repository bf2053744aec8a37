"""The supervisor: starts worker processes, keeps their leases, and spreads the shards over them.

Its duties, in the order of a round:

1. Do what signals say.
2. See which children died, stopped or went on (SIGCHLD), and end what they had: charge the bodies that ran, free the
   leases, start a replacement.
3. End a child whose body is past its ``time_limit``; let those end that have given all back.
4. Let the coordinator keep the leases and spread the shards; join the shared streams.

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
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from ..backoff import delays
from ..clock import mono_s, wall_ms
from ..coordination.coordinator import Coordinator, Held, Member, QueueWatch
from ..coordination.lease import AT_FAULT, OVERRAN, SPARED, join_shared
from ..coordination.orders import (
    Closed,
    End,
    Lost,
    Own,
    PatientWire,
    Ready,
    Release,
    Released,
    Resume,
    Revoked,
    Stop,
)  # fmt: skip
from ..coordination.shared import MAX_LEASES, SharedMemory, create_file
from ..errors import BrokerUnavailable, QueueFull, ReplyError, StreamTaskError
from ..redis.keys import SHARED
from ..text import counted, logger
from .child import ENV_FDS, reaps_orphans
from .ports import WorkerSettings
from .signals import FOLLOWED, STUCK, Signals

log = logger("streamtask.supervisor")

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CHILD_UNUSABLE = 3
"""What a child exits with when its app can't be loaded."""

RELOAD = 0
"""No signal: a source file of the app has changed."""
STEADY_S = 2.0
"""A child that has worked for so long is replaced at once; others after a pause that grows."""
SETTLE_S = 5.0
"""How long a stop waits, where no body runs any more, for what has ended to be stored and the shards to be given back. It takes
milliseconds where Redis can be reached."""
STOPPED, COLD = "stopped", "cold shutdown"
END_S = 5.0
"""How long a child has to end by itself: to write what it has buffered, and to do what its modules do at exit."""
ANSWERS_S = 1.0
"""In which time a child shows its stacks, unless something holds Python's lock."""


@dataclass(slots=True, eq=False, kw_only=True)
class Child(Member):
    """One worker process. ``crew``: what its supervisor says of all its processes."""

    process: subprocess.Popen[bytes]
    wire: PatientWire
    memory: SharedMemory
    crew: Mapping[str, Any]
    stacks: int
    """The end of the pipe on which SIGUSR1 brings the stacks of its threads."""
    started_wall: float
    ready_at: float | None = None
    stopped: bool = False  # by SIGSTOP
    stopping: bool = False
    quiet_since: float | None = None  # stopping, with no body that runs
    ends_by: float | None = None  # it was told to end
    killed_for: str = ""
    overran: list[tuple[int, int, str]] = field(default_factory=list)  # the bodies that it was killed for
    told: dict[str, set[str]] = field(default_factory=dict)  # by queue, the revoked ids that it knows or is about to
    asked_at: float | None = None  # for its stacks, which have not come yet

    @property
    def ready(self) -> bool:
        return self.ready_at is not None

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
            Own(
                held.number,
                held.watch.name,
                held.shard,
                held.watch.epoch,
                lease.token,
                self.incarnation,
                shared=lease.shared,
                by_expiry=lease.by_expiry,
            )
        )

    def release(self, held: Held) -> None:
        self.wire.send(Release(held.number))

    def resume(self, held: Held) -> None:
        self.wire.send(Resume(held.number))

    def lost(self, held: Held) -> None:
        self.trust(held, 0.0)
        self.kill(f"it lost the lease of queue={held.watch.name} shard={held.shard}")

    def trust(self, held: Held, until: float) -> None:
        self.memory.trusted[held.number] = until

    def revoked(self, watch: QueueWatch) -> None:
        if watch.revoked != self.told.get(watch.name, set()):
            self.wire.send_late(watch.name, lambda: self._newly_revoked(watch))

    def _newly_revoked(self, watch: QueueWatch) -> Revoked:
        told, self.told[watch.name] = self.told.get(watch.name, set()), watch.revoked
        return Revoked(watch.name, list(watch.revoked - told), list(told - watch.revoked))

    def kill(self, why: str) -> None:
        if not self.killed_for:
            self.killed_for = why
            if why not in (STOPPED, COLD):
                log.warning("ending a worker process pid=%d: %s", self.process.pid, why)
        try:
            os.kill(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


class Supervisor:
    """See the module. ``argv``: the command that starts a child; ``processes``: how many."""

    def __init__(self, settings: WorkerSettings, argv: Sequence[str], processes: int, signals: Signals) -> None:
        self.settings = settings
        self.restart = False
        """Whether, when ``run`` is over, the worker is to be started anew."""
        self._signals = signals
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
        self._pauses: dict[int, Iterator[float]] = {}  # by index, before the next start, where the last did not last
        self._worked = False  # any child, so far
        self._check: subprocess.Popen[bytes] | None = None  # whether the app can be loaded, before a restart
        self._check_again = False
        self._stack_lines: dict[int, bytes] = {}  # by pipe, the begun one
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
        self._stopping = False
        self._reaps = reaps_orphans()
        # Asked now: one that was closed is no terminal any more by the time its signal comes.
        self._in_terminal = sys.stdin is not None and sys.stdin.isatty()
        self._told_to_stop = False  # by a signal that does not stop cold unless it comes twice
        self._exit_status = EXIT_OK

    # The loop

    def run(self) -> int:
        """Works until a signal tells it to stop. Returns the exit status."""
        for watch, queue in zip(self._watches, self.settings.queues, strict=True):
            watch.shape = queue.declare((self._group,))
        self._signals.started()
        self._selector.register(self._signals, selectors.EVENT_READ, "signal")
        try:
            for index in range(self._processes):
                self._spawn(index)
            while not self._stopping or self._children:
                self._round()
        finally:
            self._end()
        return self._exit_status

    def _round(self) -> None:
        for key, events in self._selector.select(self._timeout_s()):
            if key.data == "signal":
                self._follow_signals()
            elif key.data == "stacks":
                self._log_stacks(key.fd)
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
            if not self._stopping:
                self._spawn(index)
        self._ask_again_for_stacks(now)
        if self._stopping:
            self._see_them_off(now)
        if now >= self._estates_at:
            self._settle_estates()  # before any lease is taken
        self._coordinator.closing = self._stopping
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
        wake = min([wake, *(c.asked_at + ANSWERS_S for c in self._children if c.asked_at is not None)])
        if self.settings.has_time_limits:
            wake = min(wake, now + 0.05)
        if self._stopping:
            wake = min(wake, now + 0.2)
        return max(0.0, wake - now)

    # Signals

    def _follow_signals(self) -> None:
        for number in self._signals.take():
            if number == signal.SIGQUIT or (number in (signal.SIGTERM, signal.SIGINT) and self._told_to_stop):
                self._stop_cold()
            elif number in (signal.SIGTERM, signal.SIGINT):
                self._told_to_stop = True
                self._stop("warm shutdown: running bodies end first; a second signal stops at once")
            elif number == signal.SIGHUP and self._in_terminal:
                self._stop("warm shutdown: the terminal was closed; running bodies end first")
            elif number == signal.SIGHUP:
                self._try_to_load("SIGHUP")
            elif number == RELOAD:
                self._try_to_load("a source file has changed")
            elif number == signal.SIGUSR1:
                self._ask_for_stacks()
            elif number == signal.SIGUSR2:
                log.warning("SIGUSR2 does nothing; SIGUSR1 shows what all threads do, SIGHUP restarts")

    def _stop(self, why: str) -> None:
        """Warmly, and for good unless ``restart`` is set afterwards."""
        log.info("%s", why)
        self.restart = False
        self._stopping = True
        for child in self._children:
            if not child.stopping:
                child.stopping = True
                child.wire.send(Stop())
                for held in child.held.values():
                    child.trust(held, 0.0)
                if not child.ready:
                    child.kill(STOPPED)
                elif not child.held:
                    self._let_end(child)

    def _stop_cold(self) -> None:
        log.warning("cold shutdown: running bodies are cut off and will run again")
        self.restart = False
        self._stopping = True
        for child in self._children:
            child.stopping = True
            child.kill(COLD)

    def _see_them_off(self, now: float) -> None:
        """Of the children that are to stop, lets those end that wait in vain, and ends those that don't."""
        for child in self._children:
            if child.ends_by is not None:
                if now >= child.ends_by:
                    child.kill(f"it did not end by itself within {END_S:g} s")
            elif child.memory.running():
                child.quiet_since = None
            elif child.quiet_since is None:
                child.quiet_since = now
            elif now >= child.quiet_since + SETTLE_S:
                log.warning(
                    "a worker process could not give back its shards, nor acknowledge all that has ended: that may run again "
                    "pid=%d", child.process.pid,
                )  # fmt: skip
                self._let_end(child)

    # Restarting

    def _try_to_load(self, why: str) -> None:
        """Before a restart it is seen whether a worker could be started: if not, all goes on as it is."""
        if self._stopping:
            return
        if self._check is not None:
            self._check_again = True
            return
        log.info("%s: if it can be started, the worker is restarted", why)
        try:
            self._check = self._popen([*self._argv, "--check"], os.environ)
        except OSError as exc:
            log.error("no process could be started: %s; the worker goes on as it is", exc)

    def _follow_check(self) -> None:
        if self._check is None or (status := self._check.poll()) is None:
            return
        self._check = None
        if self._stopping:
            return
        if self._check_again:
            self._check_again = False
            self._try_to_load("it was told again")
        elif status == 0:
            self._stop("warm restart: running bodies end first")
            self.restart = True
        else:
            log.error(
                "no restart: it could not be started, see above; the worker goes on with what it has (status %d)",
                status,
            )

    # Stacks

    def _ask_for_stacks(self) -> None:
        """Each child shows what its threads do; the log gets that line by line."""
        for child in self._children:
            for _, number, entry_id in child.memory.running():
                if (held := child.held.get(number)) is not None:
                    log.warning(
                        "runs pid=%d queue=%s shard=%s entry=%s",
                        child.process.pid,
                        held.watch.name,
                        held.shard,
                        entry_id,
                    )
            self._kill(child, signal.SIGUSR1)
            child.asked_at = mono_s()

    def _ask_again_for_stacks(self, now: float) -> None:
        """Whoever holds Python's lock shows what it does without it."""
        for child in self._children:
            if child.asked_at is not None and now >= child.asked_at + ANSWERS_S:
                child.asked_at = None
                self._kill(child, STUCK)

    def _kill(self, child: Child, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(child.process.pid, number)

    def _log_stacks(self, fd: int) -> None:
        child = next((child for child in self._children if child.stacks == fd), None)
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return
        if child is None or not data:
            self._selector.unregister(fd)
            return
        child.asked_at = None
        *lines, rest = (self._stack_lines.get(fd, b"") + data).split(b"\n")
        self._stack_lines[fd] = rest
        for line in lines:
            if line.strip():
                log.warning("stacks pid=%d %s", child.process.pid, line.decode("utf-8", "backslashreplace"))

    # Children

    def _spawn(self, index: int) -> None:
        try:
            child = self._start(index)
        except OSError as exc:
            log.error("no worker process could be started: %s", exc)
            self._start_later(index)
            return
        self._children.append(child)
        # Of the first ones nothing is said before all are ready.
        how = logging.INFO if self._said_ready else logging.DEBUG
        log.log(how, "started a worker process pid=%d process=%d id=%s", child.process.pid, index, child.incarnation)

    def _start(self, index: int) -> Child:
        with ExitStack() as theirs:
            ours, socket_ = socket.socketpair()
            theirs.callback(socket_.close)
            try:
                memory_fd = create_file(self.settings.concurrency)
                theirs.callback(os.close, memory_fd)
                stacks, stacks_fd = os.pipe()
            except OSError:
                ours.close()
                raise
            theirs.callback(os.close, stacks_fd)
            fds = (socket_.fileno(), memory_fd, stacks_fd)
            for fd in (stacks, stacks_fd):
                os.set_blocking(fd, False)  # nobody waits for the other
            try:
                process = self._popen(
                    self._argv, {**os.environ, ENV_FDS: ",".join(map(str, (*fds, os.getpid())))}, pass_fds=fds
                )
            except OSError:
                ours.close()
                os.close(stacks)
                raise
            self._selector.register(stacks, selectors.EVENT_READ, "stacks")
            return Child(
                incarnation=uuid.uuid4().hex[:16],
                index=index,
                most=MAX_LEASES,
                process=process,
                wire=PatientWire(ours, self._selector, "child"),
                memory=SharedMemory(memory_fd, self.settings.concurrency),
                stacks=stacks,
                crew=self._crew,
                started_wall=wall_ms() / 1000,
            )

    def _popen(
        self, argv: Sequence[str], env: Mapping[str, str], pass_fds: Sequence[int] = ()
    ) -> subprocess.Popen[bytes]:
        """Starts a process that no signal which this one follows ends before it has said what it does with that."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (*FOLLOWED, STUCK))
        try:
            return subprocess.Popen(argv, env=env, pass_fds=pass_fds, stdin=subprocess.DEVNULL)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _serve(self, child: Child, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            child.wire.flush()
        if events & selectors.EVENT_READ:
            self._take_messages(child)

    def _take_messages(self, child: Child) -> None:
        try:
            for order in child.wire.receive():
                match order:
                    case Ready():
                        self._child_ready(child)
                    case Released(number):
                        self._child_released(child, number)
                    case Lost():
                        child.kill("it lost a lease")
        except Closed:
            child.wire.close()

    def _child_ready(self, child: Child) -> None:
        child.ready_at = mono_s()
        self._worked = True
        if self._stopping:
            self._let_end(child)
            return
        self._coordinator.soon()

    def _child_released(self, child: Child, number: int) -> None:
        self._coordinator.released(child, number)
        if child.stopping and not child.held:
            self._let_end(child)

    def _let_end(self, child: Child) -> None:
        """Ends a child of which nothing runs: it does that itself."""
        child.stopping = True
        if child.ends_by is None:
            child.ends_by = mono_s() + END_S
            child.wire.send(End())

    def _reap_children(self) -> None:
        self._follow_check()
        if self._reaps:
            self._reap_orphans()
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
        self._forget_pipes(child)
        running = child.memory.running()
        if not (child.ends_by is not None and code == 0) and child.killed_for != STOPPED:
            log.log(
                logging.INFO if child.killed_for else logging.ERROR,
                "a worker process ended pid=%d status=%s bodies=%d%s",
                child.process.pid, code, len(running), f" ({child.killed_for})" if child.killed_for else "",
            )  # fmt: skip
        self._estates.append((child, running))
        if mono_s() >= self._estates_at:
            self._settle_estates()
        if self._stopping or child.stopping:
            return
        if code == EXIT_CHILD_UNUSABLE and not self._worked:
            log.error("the app can't be loaded in a worker process, see above: the worker ends")
            self._exit_status = EXIT_FAILED
            self._stop("nothing has begun yet")
            return
        if child.ready_at is not None and (child.killed_for or mono_s() >= child.ready_at + STEADY_S):
            self._pauses.pop(child.index, None)
            self._spawn_at.append((mono_s(), child.index))
        else:
            self._start_later(child.index, "" if child.ready else ": it could not be made ready, see above")

    def _start_later(self, index: int, why: str = "") -> None:
        """Replaces a process that did not last. Those that run are none the worse for it."""
        pause = next(self._pauses.setdefault(index, delays(0.2, 5.0)))
        log.error(
            "a worker process is started again in %.1f s%s process=%d; %d of %d are at work",
            pause, why, index, sum(child.ready for child in self._children), self._processes,
        )  # fmt: skip
        self._spawn_at.append((mono_s() + pause, index))

    def _forget_pipes(self, child: Child) -> None:
        child.wire.close()
        if child.stacks in self._selector.get_map():
            self._selector.unregister(child.stacks)
        self._stack_lines.pop(child.stacks, None)
        os.close(child.stacks)

    def _reap_orphans(self) -> None:
        """As the first process of a container, or where it was made their reaper, it gets those whose parents have died."""
        try:
            while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                known = [child.process for child in self._children] + [self._check]
                if any(process is not None and process.pid == found.si_pid for process in known):
                    return  # whose end is looked at in the next round
                os.waitpid(found.si_pid, os.WNOHANG)
        except ChildProcessError:
            pass  # there are none

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
        ran: dict[int, dict[str, int]] = {}
        for body in running:
            # Where we ended it, that is no body's fault, but of those that overran.
            fault = SPARED if child.killed_for or read is not None else AT_FAULT
            ran.setdefault(body[1], {})[body[2]] = OVERRAN if body in child.overran else fault
        if read is not None:
            ran.setdefault(read[0], {})[read[1]] = AT_FAULT
        self._coordinator.bury(child, ran, all_that_ran=True)

    def _end_overdue(self, now: float) -> None:
        for child in self._children:
            overdue = child.memory.overdue(now)
            if overdue and not child.killed_for:
                # What may run there by the time it dies is another body.
                child.overran = [body for body in child.memory.running() if body[0] in overdue]
                if child.overran:
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
            child.kill(STOPPED)
            child.process.wait()
            self._children.remove(child)
            self._estates.append((child, child.memory.running()))
        if self._check is not None:
            self._check.kill()
            self._check.wait()
        try:
            for estate in self._estates:
                with suppress(QueueFull, ReplyError):
                    self._settle_estate(*estate)
        except StreamTaskError as exc:
            log.warning("Redis can't be told that the worker has ended: its leases run out (%s)", exc)
        self._coordinator.close()
        self._selector.close()
        log.info("stopped status=%d", self._exit_status)
