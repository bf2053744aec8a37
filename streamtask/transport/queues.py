"""A kombu queue in Redis: what is recorded of it, and which streams it has.

A message without a shard key lies in the shared stream of its priority; one with a key in the shard of its key. The
shards, and the streams of further priorities, are made when the first message for them comes: most queues, and all that
carry replies, never need them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

from ..queue.queues import Queue
from ..redis.connection import Broker
from ..redis.keys import SHARED, Shape, ShardKeys, app_queues, epochs
from ..redis.link import Link, pack
from ..redis.misplaced import number
from ..redis.scripts import script
from ..sharding import shard_of

GROUP = "workers"
"""The consumer group of all that consume a kombu queue."""


RINGS_MS = 600_000
"""How long the bell of a stream that was removed rings."""


def shared(priority: int) -> str:
    """The SHARD of the shared stream of a priority step; the most urgent one is the queue's shared stream."""
    return f"{SHARED}.{priority}" if priority else SHARED


class KombuQueue(Queue):
    """See the module. ``shards`` is what is recorded if nothing is yet; ``shape()`` has what is. ``call`` calls a
    function with a link to the server of a key, and once more if that turns out to be stale."""

    def __init__(
        self,
        broker: Broker,
        namespace: str,
        app: str,
        name: str,
        shards: int,
        call: Callable[[Callable[[Link], Any], str], Any],
    ) -> None:
        super().__init__(broker, namespace, app, name, shards)
        self._call = call
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
        self._shape = None

    def _open(self, wanted: set[int | str]) -> Shape:
        if self._shape is None:
            self.broker.check_version()
            self.broker.warn_of_eviction()
        keyed = any(isinstance(shard, int) for shard in wanted)
        steps = [shard.partition(".")[2] for shard in wanted if isinstance(shard, str) and shard != SHARED]

        def make(link: Link) -> tuple[Shape, list[bytes], set[int | str]]:
            epoch, shards, *priorities = link.run(
                "open_queue", [self.keys.meta], [named, str(self.shards) if keyed else "", GROUP, *steps]
            )
            shape = self._shape_of(shards, epoch)
            if shape.epoch != named:
                return shape, [], set()
            # Those that were opened before may be more than there are now.
            streams = {shard for shard in wanted if isinstance(shard, str)} | set(range(shape.shards) if keyed else ())
            opened = script("open_shard")
            for shard in streams:
                keys = self.shard_keys(shard, shape)
                self._on(keys.state, link, opened.pack((keys.state, keys.stream), (shape.epoch, GROUP)))
            if keyed or steps:
                # Consumers learn it from the bell of the shared stream, keepers from the channel. Whoever made the streams
                # may have ended before this, so all ring.
                wake = self.shard_keys(SHARED, shape).wake
                self._on(wake, link, script("ring").pack((wake,), ("streams",)))
                self._on("", link, pack("PUBLISH", self.keys.channel(GROUP), "keyed"))
            return shape, priorities, streams

        made: tuple[Shape, list[bytes], set[int | str]]
        named = self._name(0)
        while True:
            made = self._call(make, self.keys.meta)
            shape, priorities, streams = made
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

    def _name(self, least: int) -> int:
        """Records the queue's name, and says of which epoch it is; ``least``: of which it must be at least."""
        names = [app_queues(self.namespace, self.app), epochs(self.namespace, self.app)]
        return int(self._call(lambda link: link.run("name_queue", names, [self.name, least]), names[0]))

    def _begin(self, shape: Shape) -> None:
        if self._shape is not None and self._shape.epoch != shape.epoch:
            self._opened = set()
        self._shape = shape

    def remove(self, before: int) -> None:
        """Removes the streams of an epoch before that one. Harmless at any time: nothing is of it any more, who still writes to
        it finds out, and what is declared anew has other keys."""
        shards = self.recorded()
        shape = self._shape
        if not shards or shape is None or shape.epoch >= before:
            return
        self.forget()

        def unlink(names: ShardKeys, shard: int | str, link: Link) -> None:
            found = [
                names.stream, names.state, names.delayed, names.wake, names.requeued(GROUP), names.consumers(GROUP),
                names.token(GROUP), names.notes(GROUP), names.replaced(GROUP), names.lease(GROUP), names.dlq,
            ]  # fmt: skip
            if isinstance(shard, str):
                living = link.command("ZRANGE", names.consumers(GROUP), 0, -1)
                found += [names.lease(GROUP, name.decode()) for name in living]
            link.call(pack("UNLINK", *found))
            # Who waits for something in it hears of it, finds its lease gone, and goes on with what is declared anew.
            link.run("ring", [names.wake], ["gone"])
            link.call(pack("PEXPIRE", names.wake, RINGS_MS))

        for shard in shards:
            names = self.shard_keys(shard, shape)
            self._call(partial(unlink, names, shard), names.stream)
        keys = [self.keys.meta, self.keys.members(GROUP), self.keys.member_info(GROUP)]
        self._call(lambda link: link.run("forget_queue", keys, [shape.epoch]), self.keys.meta)

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
        flat = self._call(lambda link: link.command("HGETALL", self.keys.meta), self.keys.meta)
        meta = dict(zip(flat[::2], flat[1::2], strict=True))
        if not meta:
            return []
        self._begin(self._shape_of(meta.get(b"shards"), meta.get(b"epoch")))
        assert self._shape is not None
        self.keyed = self._shape.shards > 0
        self.priorities = _priorities(name[9:] for name in meta if name.startswith(b"priority:"))
        return [*(shared(priority) for priority in self.priorities), *range(self._shape.shards)]


def _priorities(steps: Iterable[bytes]) -> tuple[int, ...]:
    """Those that the queue has streams of, the most urgent first; without what somebody else has written there."""
    return (0, *sorted(int(step) for step in steps if step.isdigit() and len(step) < 7))
