"""A queue's recorded shape: its number of shards, its epoch and its consumer groups."""

from __future__ import annotations

from contextlib import closing

from ..errors import ReplyError, ShardCountMismatch
from ..redis import commands
from ..redis.keys import SHARED, QueueKeys, Shape, ShardKeys, app_queues
from ..redis.link import Link
from ..redis.links import Links, Pool
from ..redis.misplaced import WRONGTYPE, naming, number
from ..sharding import shard_of
from ..text import counted


class Queue:
    """A queue of an app. ``shape()`` declares it in Redis at the first use."""

    def __init__(self, pool: Pool, namespace: str, app: str, name: str, shards: int) -> None:
        self.pool = pool
        self.broker = pool.broker
        self.namespace = namespace
        self.app = app
        self.name = name
        self.shards = shards
        self.keys = QueueKeys(namespace, app, name)
        self.known: Shape | None = None
        """What Redis has recorded of it; None where this process has to ask first."""
        self._groups: set[str] = set()  # all that were ever seen: a flush forgets them

    def shape(self) -> Shape:
        """Declares the queue if this process has not yet. Raises ``ShardCountMismatch``, ``BrokerUnavailable``.

        Several threads may do so at once, which changes nothing. There is no lock: a signal handler may send its first
        task in the midst of this, and so may a handler of the log, whose own lock another thread holds.
        """
        return self.known or self.declare()

    @property
    def declared(self) -> bool:
        """Whether this process knows the queue's shape."""
        return self.known is not None

    def forget(self) -> None:
        """Declares again at the next use: after a flush, or when a shard is sealed."""
        self.known = None

    def declare(self, groups: tuple[str, ...] = ()) -> Shape:
        """Records the queue and opens its shards, unless that is done; adds groups to all of them, from the beginning.

        A group is registered in the queue's metadata before any shard has it; so is each that this process has seen there
        before, for after a flush what is sent is for all of them. Repeating this changes nothing.
        """
        meta, pool = self.keys.meta, self.pool
        try:
            if self.known is None:
                self.broker.check_version()
                self.broker.warn_of_eviction()
            shards, epoch = pool.run("declare_queue", [meta], [self.shards])
            shape = Shape(number(shards, 0, meta, "shards"), number(epoch, 0, meta, "epoch"))
            if shape.shards != self.shards:
                raise ShardCountMismatch(
                    f"queue {self.name!r} of app {self.app!r} has {counted(shape.shards, 'shard')} in Redis, but this app is "
                    f"configured with {self.shards}. Set shards={shape.shards} (queue_shards for one queue alone), or use a "
                    "queue of another name"
                )
            for group in sorted(self._groups.union(groups)):
                pool.run("register_group", [meta], [f"group:{group}"])
            registered = pool.once_more(self.see_groups, meta)
            for shard in (*range(shape.shards), SHARED):
                keys = self.shard_keys(shard, shape)
                pool.run("open_shard", [keys.state, keys.stream], [shape.epoch, *registered])
            pool.run("record_queue", [app_queues(self.namespace, self.app)], [self.name])
        except ReplyError as exc:
            raise self.named(exc) from None
        self.known = shape
        return shape

    def named(self, exc: ReplyError) -> ReplyError:
        """An error of a call of this queue's: where a key is of a wrong type it says which, what Redis' own does not."""
        if exc.code != WRONGTYPE:
            return exc
        shape = self.known or Shape(self.shards, 0)
        shards = [self.shard_keys(shard, shape) for shard in (*range(shape.shards), SHARED)]
        keys = [app_queues(self.namespace, self.app), self.keys.meta]
        keys += [key for one in shards for key in (one.state, one.stream, one.delayed, one.wake)]
        with closing(Links(self.broker)) as links:
            return ReplyError(naming(exc, keys, links.pipeline), exc.code)

    def see_groups(self, link: Link) -> list[str]:
        """The registered groups. The process remembers them."""
        fields: list[bytes] = link.call(commands.field_names(self.keys.meta))
        groups = [field[6:].decode() for field in fields if field.startswith(b"group:")]
        self._groups.update(groups)
        return groups

    def shard_keys(self, shard: int | str, shape: Shape | None = None) -> ShardKeys:
        return self.keys.shard((shape or self.shape()).epoch, shard)

    def shard_for(self, key: bytes | None) -> int | str:
        """The shard of a canonical shard key; the shared stream for None."""
        return SHARED if key is None else shard_of(key, (self.known or self.shape()).shards)

    def all_shards(self) -> list[int | str]:
        return [*range(self.shape().shards), SHARED]
