"""A kombu queue in Redis: what is recorded of it, and which streams it has.

A message without a shard key lies in the shared stream of its priority; one with a key in the shard of its key. The
shards, and the streams of further priorities, are made when the first message for them comes: most queues, and all that
carry replies, never need them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ..queue.queues import Queue
from ..redis import commands
from ..redis.keys import SHARED, Shape, app_queues, epochs
from ..redis.links import Pool
from ..redis.misplaced import number
from ..sharding import shard_of

GROUP = "workers"
"""The consumer group of all that consume a kombu queue."""


RINGS_MS = 600_000
"""How long the bell of a stream that was removed rings."""


def shared(priority: int) -> str:
    """The SHARD of the shared stream of a priority step; the most urgent one is the queue's shared stream."""
    return f"{SHARED}.{priority}" if priority else SHARED


class KombuQueue(Queue):
    """See the module. ``shards`` is what is recorded if nothing is yet; ``shape()`` has what is."""

    def __init__(self, pool: Pool, namespace: str, app: str, name: str, shards: int) -> None:
        super().__init__(pool, namespace, app, name, shards)
        self.keyed = False
        """Whether the queue has shards: a message with a shard key was published."""
        self.priorities: tuple[int, ...] = (0,)
        self._opened: set[int | str] = set()

    def __repr__(self) -> str:
        return f"<KombuQueue {self.name}>"

    def declare(self, groups: tuple[str, ...] = ()) -> Shape:
        """Reads what is recorded, and makes the shared stream, unless that is done."""
        opened = self._opened | {SHARED}
        self._opened = set()
        return self._open(opened)

    def open(self, shard: int | str) -> None:
        """Makes a stream that a message is for, with what has to be recorded first."""
        if shard not in self._opened:
            self._open({shard})

    @property
    def opened(self) -> Collection[int | str]:
        return self._opened

    def refresh(self) -> None:
        """Reads again what is recorded: shards and further priorities may have come."""
        self._open(set())

    def after_fork(self) -> None:
        self._opened = set()
        self.known = None

    def _open(self, wanted: set[int | str]) -> Shape:
        if self.known is None:
            self.broker.check_version()
            self.broker.warn_of_eviction()
        named = self._name(0)
        while True:
            shape, priorities, streams = self._make(wanted, named)
            # It may have been deleted meanwhile: then what was opened is no part of what has its name now.
            before, named = named, self._name(shape.epoch)
            if shape.epoch == before == named:
                break
            self.remove(named)
        self._begin(shape)
        self._opened.update(streams)
        self.keyed = shape.shards > 0
        self.priorities = _priorities(priorities)
        return shape

    def _make(self, wanted: set[int | str], named: int) -> tuple[Shape, list[bytes], set[int | str]]:
        """Makes the streams that are wanted, unless the queue is of another epoch than it was named of. Returns what is
        recorded: its shape and priorities; and the streams that are there now."""
        keyed = any(isinstance(shard, int) for shard in wanted)
        steps = [shard.partition(".")[2] for shard in wanted if isinstance(shard, str) and shard != SHARED]
        args: list[str | int] = [named, str(self.shards) if keyed else "", GROUP, *steps]
        epoch, shards, *priorities = self.pool.run("open_queue", [self.keys.meta], args)
        shape = self._shape_of(shards, epoch)
        if shape.epoch != named:
            return shape, [], set()
        # Those that were opened before may be more than there are now.
        streams = {shard for shard in wanted if isinstance(shard, str)} | set(range(shape.shards) if keyed else ())
        for shard in streams:
            keys = self.shard_keys(shard, shape)
            self.pool.run("open_shard", [keys.state, keys.stream], [shape.epoch, GROUP])
        if keyed or steps:
            # Consumers learn it from the bell of the shared stream, keepers from the channel. Whoever made the streams may
            # have ended before this, so all ring.
            self.pool.run("ring", [self.shard_keys(SHARED, shape).wake], ["streams"])
            channel = self.keys.channel(GROUP)
            self.pool.call(channel, commands.publish(channel, "keyed"))
        return shape, priorities, streams

    def _name(self, least: int) -> int:
        """Records the queue's name, and says of which epoch it is; ``least``: of which it must be at least."""
        names = [app_queues(self.namespace, self.app), epochs(self.namespace, self.app)]
        return int(self.pool.run("name_queue", names, [self.name, least]))

    def _begin(self, shape: Shape) -> None:
        if self.known is not None and self.known.epoch != shape.epoch:
            self._opened = set()
        self.known = shape

    def remove(self, before: int) -> None:
        """Removes the streams of an epoch before that one. Harmless at any time: nothing is of it any more, who still writes to
        it finds out, and what is declared anew has other keys."""
        shards = self.recorded()
        shape = self.known
        if not shards or shape is None or shape.epoch >= before:
            return
        self.forget()

        for shard in shards:
            names = self.shard_keys(shard, shape)
            found = [
                names.stream, names.state, names.delayed, names.wake, names.requeued(GROUP), names.consumers(GROUP),
                names.token(GROUP), names.notes(GROUP), names.replaced(GROUP), names.lease(GROUP), names.dlq,
            ]  # fmt: skip
            if isinstance(shard, str):
                consumers = names.consumers(GROUP)
                living = self.pool.call(consumers, commands.ranked(consumers))
                found += [names.lease(GROUP, name.decode()) for name in living]
            self.pool.call(names.stream, commands.unlink(found))
            # Who waits for something in it hears of it, finds its lease gone, and goes on with what is declared anew.
            self.pool.run("ring", [names.wake], ["gone"])
            self.pool.call(names.wake, commands.expire(names.wake, RINGS_MS))
        keys = [self.keys.meta, self.keys.members(GROUP), self.keys.member_info(GROUP)]
        self.pool.run("forget_queue", keys, [shape.epoch])

    def shard_for(self, key: bytes | None) -> int | str:
        if key is None:
            return SHARED
        if not self.shape().shards:
            self.open(0)
        return shard_of(key, self.shape().shards)

    def _shape_of(self, shards: bytes | None, epoch: bytes | None) -> Shape:
        return Shape(number(shards, 0, self.keys.meta, "shards"), number(epoch, 0, self.keys.meta, "epoch"))

    def recorded(self) -> list[int | str]:
        """All streams that the queue has; none where no message came yet. Reads only."""
        meta = commands.pairs(self.pool.call(self.keys.meta, commands.all_fields(self.keys.meta)))
        if not meta:
            return []
        self._begin(self._shape_of(meta.get(b"shards"), meta.get(b"epoch")))
        assert self.known is not None
        self.keyed = self.known.shards > 0
        self.priorities = _priorities(name[9:] for name in meta if name.startswith(b"priority:"))
        return [*(shared(priority) for priority in self.priorities), *range(self.known.shards)]


def _priorities(steps: Iterable[bytes]) -> tuple[int, ...]:
    """Those that the queue has streams of, the most urgent first; without what somebody else has written there."""
    return (0, *sorted(int(step) for step in steps if step.isdigit() and len(step) < 7))
