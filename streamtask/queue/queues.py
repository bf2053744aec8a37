"""A queue's recorded shape: its number of shards, its epoch and its consumer groups."""

from __future__ import annotations

from contextlib import closing

from ..errors import ReplyError, ShardCountMismatch
from ..redis import commands
from ..redis.connection import Broker
from ..redis.keys import SHARED, QueueKeys, Shape, ShardKeys, app_queues
from ..redis.link import Link, Reply
from ..redis.misplaced import WRONGTYPE, by, naming, number
from ..redis.scripts import script
from ..sharding import shard_of
from ..text import counted


class Queue:
    """A queue of an app. ``shape()`` declares it in Redis at the first use."""

    def __init__(self, broker: Broker, namespace: str, app: str, name: str, shards: int) -> None:
        self.broker = broker
        self.namespace = namespace
        self.app = app
        self.name = name
        self.shards = shards
        self.keys = QueueKeys(namespace, app, name)
        self._shape: Shape | None = None
        self._groups: set[str] = set()  # all that were ever seen: a flush forgets them

    def shape(self) -> Shape:
        """Declares the queue if this process has not yet. Raises ``ShardCountMismatch``, ``BrokerUnavailable``.

        Several threads may do so at once, which changes nothing. There is no lock: a signal handler may send its first
        task in the midst of this, and so may a handler of the log, whose own lock another thread holds.
        """
        return self._shape or self.declare()

    @property
    def declared(self) -> bool:
        """Whether this process knows the queue's shape."""
        return self._shape is not None

    def forget(self) -> None:
        """Declares again at the next use: after a flush, or when a shard is sealed."""
        self._shape = None

    def declare(self, groups: tuple[str, ...] = ()) -> Shape:
        """Records the queue and opens its shards, unless that is done; adds groups to all of them, from the beginning.

        A group is registered in the queue's metadata before any shard has it; so is each that this process has seen there
        before, for after a flush what is sent is for all of them. Repeating this changes nothing.
        """
        link = self.broker.link(self.keys.meta)
        try:
            if self._shape is None:
                self.broker.check_version()
                self.broker.warn_of_eviction()
            shards, epoch = link.run("declare_queue", [self.keys.meta], [self.shards])
            meta = self.keys.meta
            shape = Shape(number(shards, 0, meta, "shards"), number(epoch, 0, meta, "epoch"))
            if shape.shards != self.shards:
                raise ShardCountMismatch(
                    f"queue {self.name!r} of app {self.app!r} has {counted(shape.shards, 'shard')} in Redis, but this app is "
                    f"configured with {self.shards}. Set shards={shape.shards} (queue_shards for one queue alone), or use a "
                    "queue of another name"
                )
            for group in sorted(self._groups.union(groups)):
                link.run("register_group", [self.keys.meta], [f"group:{group}"])
            self._open_shards(link, shape, self.see_groups(link))
            names = app_queues(self.namespace, self.app)
            self._on(names, link, script("record_queue").pack((names,), (self.name,)))
        except ReplyError as exc:
            raise self.named(exc) from None
        finally:
            link.close()
        self._shape = shape
        return shape

    def named(self, exc: ReplyError) -> ReplyError:
        """An error of a call of this queue's: where a key is of a wrong type it says which, what Redis' own does not."""
        if exc.code != WRONGTYPE:
            return exc
        shape = self._shape or Shape(self.shards, 0)
        shards = [self.shard_keys(shard, shape) for shard in (*range(shape.shards), SHARED)]
        keys = [app_queues(self.namespace, self.app), self.keys.meta]
        keys += [key for one in shards for key in (one.state, one.stream, one.delayed, one.wake)]
        with closing(self.broker.link(self.keys.meta)) as link:
            each = lambda calls: [self._on(key, link, packed) for key, packed in calls]  # noqa: E731
            return ReplyError(naming(exc, keys, each if self.broker.is_cluster else by(link)), exc.code)

    def see_groups(self, link: Link) -> list[str]:
        """The registered groups. The process remembers them."""
        fields: list[bytes] = link.call(commands.field_names(self.keys.meta))
        groups = [field[6:].decode() for field in fields if field.startswith(b"group:")]
        self._groups.update(groups)
        return groups

    def _open_shards(self, link: Link, shape: Shape, groups: list[str]) -> None:
        opened = script("open_shard")
        for shard in (*range(shape.shards), SHARED):
            keys = self.shard_keys(shard, shape)
            self._on(keys.state, link, opened.pack((keys.state, keys.stream), (shape.epoch, *groups)))

    def _on(self, key: str, link: Link, packed: bytes) -> Reply:
        """Runs a command where its key lies: on a Cluster that may be another server than the link's."""
        if not self.broker.is_cluster:
            return link.call(packed)
        other = self.broker.link(key)
        try:
            return other.call(packed)
        finally:
            other.close()

    def shard_keys(self, shard: int | str, shape: Shape | None = None) -> ShardKeys:
        return self.keys.shard((shape or self.shape()).epoch, shard)

    def shard_for(self, key: bytes | None) -> int | str:
        """The shard of a canonical shard key; the shared stream for None."""
        return SHARED if key is None else shard_of(key, (self._shape or self.shape()).shards)

    def all_shards(self) -> list[int | str]:
        return [*range(self.shape().shards), SHARED]
