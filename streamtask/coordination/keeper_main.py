"""A keeper: the process that keeps the leases of its parent, which runs foreign code. ``keeper.py`` starts it.

Its duties, in the order of a round:

1. See whether its client died, is stopped or goes on. What a dead one had is given back at once; while it is stopped
   nothing is renewed.
2. Do what the client asks.
3. Let the coordinator renew the leases, and spread the shards of the client's queues over it and others.
4. Three times in a lease time, remove dead consumers from the shared streams that the client consumes, and put off the
   end of queues that expire unless they are used.

It holds nothing of the client open but one end of a socket, of which the client's forked children may hold the other one:
that it is open proves nothing.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

from ..backoff import delays
from ..clock import mono_s, wall_ms
from ..errors import ReplyError, StreamTaskError
from ..redis import commands
from ..redis.keys import QueueKeys, ShardKeys, expiring
from ..redis.wire import Note
from ..text import logger
from ..version import installed
from .coordinator import Coordinator, Held, Member, QueueWatch
from .keeper import ENV_KEEPER, LEASES, unpack_broker
from .lease import Lease, reap
from .orders import (
    Cancel,
    Close,
    Closed,
    Consume,
    Forget,
    Keep,
    Lost,
    LostShared,
    Order,
    Own,
    PatientWire,
    Release,
    Released,
    Resume,
    Start,
    Touch,
    Up,
)  # fmt: skip
from .shared import SharedMemory

log = logger("streamtask.keeper")

TICK_S = 0.5
"""How long at most until it is seen that the client was stopped or goes on."""

BURY_LEASES = 2
"""For so many lease times it is tried to give back what a dead client had: then it has run out anyway."""


class Process:
    """Another process, this one's parent: whether it lives, and whether it is stopped."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.fd = -1
        """Readable when it is dead; -1 where there is no such thing."""
        self._stat = -1
        if sys.platform == "linux":
            # Where one of them fails there is an old kernel, a sandbox, or no such process: then we have another parent.
            with suppress(OSError, AttributeError):
                self.fd = os.pidfd_open(pid)
            with suppress(OSError):
                self._stat = os.open(f"/proc/{pid}/stat", os.O_RDONLY)

    def is_dead(self) -> bool:
        return os.getppid() != self.pid

    def is_stopped(self) -> bool:
        if self._stat >= 0:
            try:
                return os.pread(self._stat, 1024, 0).rpartition(b")")[2].split()[0] == b"T"
            except (OSError, IndexError):
                return False  # dead
        try:
            found = subprocess.run(["ps", "-o", "state=", "-p", str(self.pid)], capture_output=True, check=False)
        except OSError:
            return False
        return found.stdout.strip().startswith(b"T")


@dataclass(slots=True, eq=False, kw_only=True)
class Client(Member):
    """The process that leases are kept for."""

    wire: PatientWire
    memory: SharedMemory
    about: Mapping[str, Any]
    most: int = LEASES
    stopped: bool = False

    @property
    def kept(self) -> bool:
        return not self.stopped

    @property
    def leaving(self) -> bool:
        return False

    def info(self) -> Mapping[str, Any]:
        return self.about

    def own(self, held: Held) -> None:
        lease = held.lease
        self.trust(held, lease.trusted_until)
        self.wire.send(
            Own(
                held.number,
                held.watch.name,
                held.shard,
                held.watch.epoch,
                lease.token,
                self.incarnation,
                shared=False,
                by_expiry=lease.by_expiry,
            )
        )

    def release(self, held: Held) -> None:
        self.wire.send(Release(held.number))

    def resume(self, held: Held) -> None:
        self.wire.send(Resume(held.number))

    def lost(self, held: Held) -> None:
        token = held.lease.token
        self.trust(held, 0.0)
        if held.lease.shared:
            self.wire.send(LostShared(held.lease.keys.prefix, token))
        else:
            self.wire.send(Lost(held.number, held.watch.name, held.shard, token))

    def trust(self, held: Held, until: float) -> None:
        """It asks for that before a body of a shard; of what is nobody's by order, Redis alone says whose it is."""
        if not held.lease.shared:
            self.memory.trusted[held.number] = until

    def revoked(self, watch: QueueWatch) -> None:
        """Celery's workers tell each other what is revoked."""


class KeeperProcess:
    """See the module. ``memory``: what it shares with the client; ``start``: the client's first order."""

    def __init__(
        self,
        process: Process,
        wire: PatientWire,
        selector: selectors.BaseSelector,
        memory: SharedMemory,
        start: Start,
    ) -> None:
        self._process = process
        self._memory = memory
        self._wire = wire
        self._selector = selector
        self._namespace, self._app, self._group = start.namespace, start.app, start.group
        self._lease_ms = start.lease_ms
        self._broker = unpack_broker(start.broker)
        if self._broker.is_cluster:
            # A node that swallows packets must not cost the leases that lie on others.
            self._broker.timeout_s = min(self._broker.timeout_s, max(0.5, self._lease_ms / 3000))
        about = {
            "host": socket.gethostname(),
            "started": wall_ms() / 1000,
            "version": installed(),
            "pid": process.pid,
            "keeper": os.getpid(),
        }
        self._client = Client(incarnation=start.incarnation, wire=wire, memory=memory, about=about, numbers=start.last)
        self._below = count(-1, -1)  # the numbers of leases that have no place in the memory
        self._watches: list[QueueWatch] = []
        self._shared = self._watch("(shared streams)")  # of all leases that the client has itself joined
        self._let_go: dict[ShardKeys, tuple[Lease, float]] = {}  # and when (monotonic) they end
        self._touched: dict[str, int] = {}
        self._touch_at = 0.0
        self._up = False
        self._closed = self._gone = False
        self._coordinator = Coordinator(
            self._broker,
            group=self._group,
            lease_ms=self._lease_ms,
            handover_timeout_s=start.handover_timeout_s,
            members=[self._client],
            watches=self._watches,
            selector=selector,
            beaten=self._beaten,
            log=log,
        )

    def _watch(self, queue: str) -> QueueWatch:
        keys = QueueKeys(self._namespace, self._app, queue)
        return QueueWatch(queue, keys, self._group, self._lease_ms, follows=True)

    # The loop

    def run(self, orders: Iterable[Order]) -> None:
        """Works until the client is dead, or wants no more of it."""
        for order in orders:
            self._obey(order)
        while not self._closed:
            if self._gone or self._process.is_dead():
                self._bury()
                break
            self._round()
        self._coordinator.close()
        self._broker.close()

    def _round(self) -> None:
        try:
            for key, _ in self._selector.select(self._timeout_s()):
                if key.data == "wire":
                    self._wire.flush()
                    self._take_orders()
                elif key.data == "news":
                    self._coordinator.take_news()
                elif key.data == "client":
                    self._gone = True
                    return
            self._look_at_client()
            if not self._idle:
                self._coordinator.work()
                self._touch()
        except StreamTaskError as exc:
            self._coordinator.outage(exc)  # also a password that was changed: it may be changed back

    @property
    def _idle(self) -> bool:
        return not (self._client.held or self._watches or self._touched or self._let_go)

    def _timeout_s(self) -> float | None:
        if self._idle:
            return None if self._process.fd >= 0 else TICK_S
        wake = self._coordinator.wake_at()
        if self._touched and not self._client.stopped:
            wake = min(wake, self._touch_at)
        return min(TICK_S, max(0.0, wake - mono_s()))

    def _look_at_client(self) -> None:
        stopped = self._process.is_stopped()
        if stopped == self._client.stopped:
            return
        self._client.stopped = stopped
        if stopped:
            log.warning("the process is stopped (SIGSTOP); its leases are not renewed pid=%d", self._process.pid)
        else:
            log.warning("the stopped process goes on pid=%d", self._process.pid)
            self._coordinator.soon()

    def _bury(self) -> None:
        """Gives back what the dead client had."""
        until = mono_s() + self._lease_ms / 1000 * BURY_LEASES
        try:
            marked = self._marked()
        except StreamTaskError as exc:
            # Not counting a crash is better than holding up the rest: of a Cluster one node may be away.
            log.warning("crashes were not counted: %s", exc)
            marked = {}
        read = self._memory.being_read()
        for token, entry_id in [read] if read else [entry[1:] for entry in self._memory.running()]:
            for held in self._client.held.values():
                if held.lease.token == token:
                    marked.setdefault(held.number, {})[entry_id] = True
        for wait in delays(0.05, 0.5):
            try:
                self._coordinator.bury(self._client, marked)
                return
            except StreamTaskError as exc:
                self._coordinator.outage(exc)
            if mono_s() + wait > until:
                log.warning("what a process had was not given back; its leases run out pid=%d", self._process.pid)
                return
            time.sleep(wait)

    def _marked(self) -> dict[int, dict[str, bool]]:
        """By lease of a shard, the entries of which the client has written down that their bodies start in it. Who takes over
        what it had of a shared stream sees that there."""
        owned = [held for held in self._client.held.values() if not held.lease.shared]
        notes = [held.lease.keys.notes(self._group) for held in owned]
        replies = self._coordinator.links.pipeline([(key, commands.all_fields(key)) for key in notes])
        found = {}
        for held, flat in zip(owned, replies, strict=True):
            if isinstance(flat, Exception):
                log.warning("crashes were not counted queue=%s shard=%s: %s", held.watch.name, held.shard, flat)
                continue
            marks = commands.pairs(flat).items()
            started = [entry_id.decode() for entry_id, text in marks if Note.parse(text).mark == held.lease.token]
            found[held.number] = dict.fromkeys(started, True)
        return found

    # Orders of the client

    def _take_orders(self) -> None:
        try:
            for order in self._wire.receive():
                self._obey(order)
        except Closed:
            # Nobody is there any more to say what becomes of its messages, also if it went on as another program.
            self._gone = True

    def _obey(self, order: Order) -> None:
        try:
            match order:
                case Keep():
                    self._keep(order)
                case Forget(prefix, token):
                    self._forget(prefix, token)
                case Consume(queue, owned):
                    self._consume(queue, owned)
                case Cancel(queue):
                    self._cancel(queue)
                case Released(number):
                    self._coordinator.released(self._client, number)
                    self._drop_left()
                case Touch(queue, expires_ms):
                    self._set_touch(queue, expires_ms)
                case Close():
                    self._closed = True
                    for watch in list(self._watches):
                        self._coordinator.leave(watch)
        except StreamTaskError as exc:
            self._coordinator.outage(exc)

    def _keep(self, order: Keep) -> None:
        keys = ShardKeys(order.prefix)
        held = self._client.holding(keys)
        if held is not None:
            del self._client.held[held.number]
        lease = Lease(
            keys, order.group, order.incarnation, order.lease_ms, shared=True, token=order.token, trusted_until=0.0,
            alive=order.alive,
        )  # fmt: skip
        self._let_go.pop(keys, None)
        number = next(self._below)
        self._client.held[number] = Held(number, self._shared, keys.prefix, lease)

    def _forget(self, prefix: str, token: int) -> None:
        keys = ShardKeys(prefix)
        held = self._client.holding(keys)
        if held is not None and held.lease.token == token:
            del self._client.held[held.number]
            self._let_go[keys] = held.lease, mono_s() + held.lease.lease_ms / 1000

    def _consume(self, queue: str, owned: Iterable[Own]) -> None:
        watch = next((watch for watch in self._watches if watch.name == queue), None)
        if watch is None:
            watch = self._watch(queue)
            self._watches.append(watch)
            self._coordinator.soon()
        elif watch.leaving:
            self._coordinator.return_to(watch)
        for one in owned:
            keys = watch.keys.shard(one.epoch, one.shard)
            if self._client.holding(keys) is None:
                lease = Lease(keys, self._group, self._client.incarnation, self._lease_ms, False, one.token, 0.0)
                self._client.held[one.number] = Held(one.number, watch, one.shard, lease)
                self._coordinator.soon()

    def _cancel(self, queue: str) -> None:
        for watch in self._watches:
            if watch.name == queue and not watch.leaving:
                try:
                    self._coordinator.leave(watch)
                finally:
                    self._drop_left()
                return

    def _drop_left(self) -> None:
        """Forgets queues of which the last shard was given back."""
        busy = [held.watch for held in self._client.held.values()]
        self._watches[:] = [watch for watch in self._watches if not watch.leaving or watch in busy]

    def _set_touch(self, queue: str, expires_ms: int) -> None:
        self._touched.pop(queue, None)
        if expires_ms > 0:
            self._touched[queue] = expires_ms
            self._touch_at = 0.0

    # What is done beside the renewals

    def _beaten(self, live: Sequence[Member]) -> None:
        self._touch_at = 0.0
        if live and not self._up:
            self._up = True
            self._wire.send(Up())
        for keys, (lease, ends_at) in list(self._let_go.items()):
            if mono_s() >= ends_at and live:
                self._end(lease)
                del self._let_go[keys]

    def _end(self, lease: Lease) -> None:
        """Ends a lease that the client has let go of: while that lives it does not run out."""
        link = self._coordinator.links.at(lease.keys.stream)
        try:
            # The client may have joined again meanwhile, and this process not have been told yet.
            reap(
                link, lease.keys, lease.group, lease.incarnation, lease.lease_ms,
                gone=True, alive=lease.alive, token=lease.token,
            )  # fmt: skip
        except ReplyError as exc:
            log.info("a lease was not ended: %s", exc)  # its queue was deleted

    def _touch(self) -> None:
        if not self._touched or self._client.stopped or mono_s() < self._touch_at:
            return
        self._touch_at = mono_s() + min(self._touched.values()) / 3000  # after an outage the first beat does it
        key = expiring(self._namespace, self._app)
        args: list[str | int] = []
        for queue, expires_ms in self._touched.items():
            args += [expires_ms, queue]
        self._coordinator.links.at(key).run("touch_queues", [key], args)


def main() -> None:
    """Keeps the leases of the parent process until that is dead."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Meant for the client, which may go on for long: it is followed, not overtaken.
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="[%(asctime)s: %(levelname)s/%(name)s] %(message)s")
    fd, pid, shared = (int(part) for part in os.environ[ENV_KEEPER].split(","))
    memory = SharedMemory(shared, 1, LEASES)
    os.close(shared)
    process = Process(pid)
    selector = selectors.DefaultSelector()
    wire = PatientWire(socket.socket(fileno=fd), selector, "wire")
    if process.fd >= 0:
        selector.register(process.fd, selectors.EVENT_READ, "client")
    orders: list[Order] = []
    while not orders:
        selector.select(TICK_S)
        dead = process.is_dead()
        try:
            orders += wire.receive()  # also of one that died before we were there: what it had is given back
        except Closed:
            return
        if dead and not orders:
            return
    start, *further = orders
    assert isinstance(start, Start)
    KeeperProcess(process, wire, selector, memory, start).run(further)


if __name__ == "__main__":
    main()
