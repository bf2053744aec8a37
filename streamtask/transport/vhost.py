"""What kombu calls a virtual host: the queues that are declared in a namespace, their bindings to exchanges, and how long they
live: for ever, or while they are in use (``x-expires``). Nothing here has a time to live of its own, so no binding can vanish;
a queue whose time is over is removed by whoever uses it next, or declares any."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence

from ..clock import mono_s
from ..errors import ReplyError
from ..redis import commands, keys
from ..redis.keys import SHARED
from ..redis.link import Link
from ..redis.links import Pool
from ..text import logger
from .options import Options
from .queues import GROUP, KombuQueue
from .resting import is_of_one_key

log = logger("streamtask.transport")

SEP = "\x06\x16"
FANOUT = "fanout"
"""In the place of a pattern: the binding is one of a fanout exchange, whose queues hear and have no streams."""
SWEEP_S = 10.0
"""How often this process looks for queues that have expired."""

MOST_UNUSED = 500
"""Queues of which something is remembered though nobody here consumes them. Each process that asks workers for something has a
new one for the answers."""

DUE = 500
"""Delayed messages that one call makes due."""

PURGE_REQUEUED = 500
"""Entries on offer that one call removes: about 10 ms of Redis."""

Binding = tuple[str, str, str]
"""Routing key, pattern, queue."""


class Touched:
    """A queue with ``x-expires`` that this process has declared: when its end has to be put off again, and when it is over if
    nobody else does that."""

    __slots__ = ("again_at", "expires_ms", "over_at")

    def __init__(self, expires_ms: int, at: float) -> None:
        self.expires_ms = expires_ms
        self.put_off(at)

    def put_off(self, at: float) -> None:
        self.again_at = at + self.expires_ms / 3000
        self.over_at = at + self.expires_ms / 1000


class VHost:
    """See the module, and what this process remembers of it. ``is_kept`` tells whose names are not to be forgotten."""

    def __init__(self, options: Options, pool: Pool, is_kept: Callable[[str], bool]) -> None:
        self._options = options
        self._pool = pool
        self._is_kept = is_kept
        self.queues: dict[str, KombuQueue] = {}
        self.fanout_queues: dict[str, tuple[str, str]] = {}
        """Queues that are bound to a fanout exchange: the exchange and the routing key."""
        self.touched: dict[str, Touched] = {}
        self._born = b""
        """What stands in Redis since the first binding: another value means that all was flushed."""
        self._swept_at = 0.0
        namespace, app = options.namespace, options.app
        self._names, self._expiring = keys.app_queues(namespace, app), keys.expiring(namespace, app)
        self._epochs, self._birth = keys.epochs(namespace, app), keys.born(namespace, app)

    def after_fork(self) -> None:
        for queue in self.queues.values():
            queue.after_fork()

    # What is remembered

    def queue(self, name: str) -> KombuQueue:
        found = self.queues.get(name)
        if found is None:
            if len(self.queues) >= MOST_UNUSED:
                self._forget_unused()
            options = self._options
            found = self.queues.setdefault(
                name, KombuQueue(self._pool, options.namespace, options.app, name, options.shards)
            )
        return found

    def _forget_unused(self) -> None:
        """Forgets the half that was not seen for longest, where too many are not consumed: what Redis knows of them is read
        again when they are used. A number of shards that was declared may be recorded nowhere else yet."""
        unused = [
            name
            for name, queue in list(self.queues.items())
            if queue.shards == self._options.shards and not self._is_kept(name)
        ]
        if len(unused) < MOST_UNUSED:
            return
        for name in unused[: (len(unused) + 1) // 2]:
            self.queues.pop(name, None)
        now = mono_s()
        for name, touched in list(self.touched.items()):
            if name not in self.queues and now > touched.over_at:
                self.forget_lifetime(name)

    def forget_lifetime(self, name: str) -> None:
        self.touched.pop(name, None)
        self.fanout_queues.pop(name, None)

    # Declaring and deleting

    def declare(self, queue: str, expires_ms: int | None) -> bool:
        """Records a queue. ``expires_ms``: how long it is kept unused, None for ever. False where another of its name has
        expired: that is to be ended first."""
        now = mono_s()
        epoch = self._bind(queue, "", "", expires_ms or 0)
        if epoch is None:
            return False
        # Whoever deletes the one that had its name may not be done yet, and others may still publish to that.
        try:
            self.queue(queue).remove(epoch)
        except ReplyError as exc:
            if not is_of_one_key(exc):
                raise
            log.error("what is left of a deleted queue can't be looked at queue=%s: %s", queue, exc)
        if expires_ms:
            self.touched[queue] = Touched(expires_ms, now)
        else:
            self.touched.pop(queue, None)
        return True

    def is_declared(self, queue: str) -> bool:
        """Whether a queue is declared, and has not expired."""

        def ask(link: Link) -> bool:
            there, until, now = link.pipeline(
                [commands.is_member(self._names, queue), commands.score(self._expiring, queue), commands.TIME]
            )
            return bool(there) and (until is None or float(until) > commands.clock_ms(now))

        return self._pool.once_more(ask, self._names)

    def end(self, queue: str, *, if_expired: bool = False) -> int:
        """Takes a queue's name and bindings away. Answers what ``remove`` has to know, 0 where it has not expired."""
        return self._unbind(queue, "expired" if if_expired else "all")

    def remove(self, queue: str, ended: int) -> None:
        """Removes what is left of a queue that was ended, with all that is in it."""
        self.queue(queue).remove(ended)
        self.queues.pop(queue, None)

    def expired(self) -> Iterable[str]:
        """Queues that may have expired; looks for them now and then."""
        now = mono_s()
        if now - self._swept_at <= SWEEP_S:
            return ()
        self._swept_at = now

        def overdue(link: Link) -> list[bytes]:
            now = commands.clock_ms(link.call(commands.TIME))
            found: list[bytes] = link.call(commands.scored(self._expiring, "-inf", now, 100))
            return found

        return [member.decode() for member in self._pool.once_more(overdue, self._expiring)]

    def touch(self, queue: str, expires_ms: int) -> None:
        """A queue with ``x-expires`` is in use."""
        self._pool.run("touch_queues", [self._expiring], [expires_ms, queue])

    # Bindings

    def bind(self, exchange: str, binding: Sequence[str | None]) -> None:
        """Records a binding."""
        self._bind(binding[2] or "", _escaped(exchange), _member(binding), "")

    def _bind(self, queue: str, exchange: str, member: str, expires_ms: int | str) -> int | None:
        """The queue's epoch, None where it has expired."""
        namespace, app = self._options.namespace, self._options.app
        names = [
            self._names, self._expiring, keys.bound(namespace, app, queue), keys.bindings(namespace, app, exchange),
            self._birth, self._epochs,
        ]  # fmt: skip
        bound = self._pool.run("bind_queue", names, [queue, expires_ms, exchange, member, SEP, uuid.uuid4().hex])
        if not bound:
            return None
        born, epoch = bound
        self._born = self._born or born
        return int(epoch)

    def unbind(self, queue: str, exchange: str, binding: Sequence[str | None]) -> None:
        """Takes one binding away."""
        self._unbind(queue, _escaped(exchange) + SEP + _member(binding))

    def _unbind(self, queue: str, what: str) -> int:
        """Where the queue's declaration was taken away: all of its epochs before that have ended."""
        namespace, app = self._options.namespace, self._options.app
        names = [self._names, self._expiring, keys.bound(namespace, app, queue), self._epochs]
        args = [queue, keys.bindings(namespace, app, ""), SEP, what]
        while (done := self._pool.run("unbind_queue", names, args)) == 2:
            pass  # it has very many bindings
        return int(done[0]) if isinstance(done, list) else 0

    def table(self, exchange: str) -> list[Binding]:
        """The bindings of an exchange."""
        name = keys.bindings(self._options.namespace, self._options.app, _escaped(exchange))
        members = self._pool.call(name, commands.members(name))
        found = []
        for member in members:
            parts = [part.replace("\x06\x15", "\x06") for part in member.decode(errors="replace").split(SEP)]
            if len(parts) == 3:  # else somebody else has written it
                found.append((parts[0], parts[1], parts[2]))
        return found

    def flushed(self) -> bool:
        """Whether all was removed since this process first declared something."""
        name = self._birth
        if not self._born or self._pool.call(name, commands.value(name)) == self._born:
            return False
        self._born = b""
        return True

    # What is in a queue

    def size(self, queue: str) -> int:
        """How many messages of a queue wait for a consumer or for their time."""
        found = self.queue(queue)
        total = 0
        for shard in found.recorded():
            prefix = found.shard_keys(shard)
            names = [prefix.stream, prefix.requeued(GROUP), prefix.delayed, prefix.state]
            total += int(self._pool.run("ready", names, [GROUP]))
        return total

    def held(self, queue: str) -> int:
        """How many messages of a queue were given to somebody and have not ended."""
        found = self.queue(queue)
        streams = [found.shard_keys(shard).stream for shard in found.recorded()]
        return sum(int(self._pool.call(stream, commands.count_pending(stream, GROUP))[0]) for stream in streams)

    def make_due(self, queue: str) -> None:
        """Delayed messages of a queue wait for their time no longer."""
        found = self.queue(queue)
        for shard in found.recorded():
            prefix = found.shard_keys(shard)
            while self._pool.run("make_due", [prefix.state, prefix.delayed], [DUE]) == DUE:
                pass

    def purge(self, queue: str) -> int:
        """Removes what waits in a queue; what is being worked on stays. Returns how many messages were removed."""
        found = self.queue(queue)
        run = self._pool.run
        removed = 0
        for shard in found.recorded():
            prefix = found.shard_keys(shard)
            last = ""
            while True:
                entries, delayed, last = run(
                    "purge_shard", [prefix.stream, prefix.state, prefix.delayed], [1000, last, 1000]
                )
                last = last.decode()
                removed += int(entries) + int(delayed)
                if not entries and not delayed:
                    break
            looked_at = PURGE_REQUEUED
            while looked_at == PURGE_REQUEUED:
                names = [prefix.stream, prefix.requeued(GROUP), prefix.state, prefix.notes(GROUP)]
                looked_at, gone = run("purge_requeued", names, [GROUP, PURGE_REQUEUED])
                removed += int(gone)
        return removed

    def consumers(self, queue: str) -> int:
        """How many processes consume a queue."""
        found = self.queue(queue)
        if not found.recorded():
            return 0
        name = found.shard_keys(SHARED).consumers(GROUP)
        return int(self._pool.call(name, commands.count_scored(name)))


def _escaped(text: str | None) -> str:
    """A name that holds no SEP."""
    return (text or "").replace("\x06", "\x06\x15")


def _member(binding: Sequence[str | None]) -> str:
    return SEP.join(map(_escaped, binding))
