"""The one place that spells a Redis key (see ``docs/protocol.md``).

All keys of a shard share the hash tag ``{APP.QUEUE.EPOCH.SHARD}``, so that a script touches one slot of a Redis
Cluster and a reshard never reuses a name. User text is percent-encoded where it could end a segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote

SHARED = "shared"
"""The SHARD segment of a queue's shared stream, which takes the messages without a shard key."""


def is_shared(shard: int | str) -> bool:
    """Whether that is a shared stream: the queue's, or that of a further priority (``shared.3``)."""
    return isinstance(shard, str)


def encode(text: str) -> str:
    """User text as one segment of a key: letters, digits, ``-`` and ``_`` stay, all else is percent-encoded."""
    return quote(text, safe="").replace(".", "%2E").replace("~", "%7E")


segment = lru_cache(maxsize=1024)(encode)
"""``encode`` for names, of which there are few and which are asked for all the time."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What Redis has recorded of a queue."""

    shards: int
    epoch: int


@dataclass(frozen=True, slots=True)
class ShardKeys:
    """The keys of one shard (or shared stream) of one epoch of a queue."""

    prefix: str

    @property
    def stream(self) -> str:
        return self.prefix + "stream"

    @property
    def state(self) -> str:
        return self.prefix + "state"

    @property
    def delayed(self) -> str:
        return self.prefix + "delayed"

    @property
    def wake(self) -> str:
        """A stream of at most one entry: appended to when the owner must look at something else than the stream."""
        return self.prefix + "wake"

    @property
    def dlq(self) -> str:
        return self.prefix + "dlq"

    def lease(self, group: str, incarnation: str | None = None) -> str:
        """The lease record: of the shard's owner, or of one consumer of a shared stream."""
        base = f"{self.prefix}lease:{segment(group)}"
        return base if incarnation is None else f"{base}:{incarnation}"

    def consumers(self, group: str) -> str:
        """Shared streams: the names of the consumers; behind one that is known to be gone stands 0."""
        return f"{self.prefix}consumers:{segment(group)}"

    def alive(self, group: str) -> str:
        """See ``QueueKeys.alive``."""
        return f"{self.prefix}alive:{segment(group)}"

    def token(self, group: str) -> str:
        return f"{self.prefix}token:{segment(group)}"

    def requeued(self, group: str) -> str:
        """Shared streams: entries of a consumer that is gone, by entry id; every fetch takes from here first."""
        return f"{self.prefix}requeued:{segment(group)}"

    def notes(self, group: str) -> str:
        """Attempts, due times and crash counts of pending entries that have any."""
        return f"{self.prefix}notes:{segment(group)}"

    def replaced(self, group: str) -> str:
        """Retries that are stored in the place of the pending entries that they repeat."""
        return f"{self.prefix}replaced:{segment(group)}"

    def seen(self, bucket: str) -> str:
        return f"{self.prefix}seen:{bucket}"

    def all(self, group: str) -> list[str]:
        """Those whose names need no more than a group's."""
        of_group = (self.lease, self.token, self.notes, self.consumers, self.alive, self.requeued, self.replaced)
        return [self.stream, self.state, self.delayed, self.wake, self.dlq, *(name(group) for name in of_group)]


@dataclass(frozen=True, slots=True)
class QueueKeys:
    """The keys of one queue that belong to no shard; their hash tag is ``{APP.QUEUE}``."""

    namespace: str
    app: str
    queue: str

    @property
    def _tag(self) -> str:
        return f"{segment(self.app)}.{segment(self.queue)}"

    @property
    def meta(self) -> str:
        """Shard count, epoch and registered groups."""
        return f"{self.namespace}:{{{self._tag}}}:meta"

    @property
    def revoked(self) -> str:
        return f"{self.namespace}:{{{self._tag}}}:revoked"

    def members(self, group: str) -> str:
        """The live members by the instant (Redis' clock, ms) at which their membership expires."""
        return f"{self.namespace}:{{{self._tag}}}:members:{segment(group)}"

    def member_info(self, group: str) -> str:
        return f"{self.namespace}:{{{self._tag}}}:member-info:{segment(group)}"

    def all(self, group: str) -> list[str]:
        """Those whose names need no more than a group's."""
        return [self.meta, self.members(group), self.member_info(group), self.revoked]

    def channel(self, group: str) -> str:
        """The pub/sub channel on which the processes of a group tell each other that shards became free."""
        return f"{self.namespace}:{{{self._tag}}}:events:{segment(group)}"

    def alive(self, group: str, stream: ShardKeys, *, cluster: bool) -> str:
        """The consumers of shared streams by the instant (Redis' clock, ms) at which their leases expire, unless they are
        heard: one for all streams of the app. On a Cluster, where a script touches one slot, each stream has its own."""
        if cluster:
            return stream.alive(group)
        return f"{self.namespace}:{{{segment(self.app)}}}:alive:{segment(group)}"

    def shard(self, epoch: int, shard: int | str) -> ShardKeys:
        if isinstance(shard, str):
            # Those of further priorities lie in the slot of the first, so that one call reads them all.
            _, _, priority = shard.partition(".")
            prefix = f"{self.namespace}:{{{self._tag}.{epoch}.{SHARED}}}:"
            return ShardKeys(f"{prefix}{priority}:" if priority else prefix)
        return ShardKeys(f"{self.namespace}:{{{self._tag}.{epoch}.{shard}}}:")


_TYPES = {
    "stream": {"stream", "wake", "dlq"},
    "hash": {"state", "lease", "notes", "replaced", "meta", "member-info"},
    "zset": {"delayed", "requeued", "consumers", "alive", "members", "revoked"},
    "set": {"queues"},
    "string": {"token"},
}
_TYPE_OF = {name: kind for kind, names in _TYPES.items() for name in names}


def type_of(key: str) -> str | None:
    """Redis' type of a key that is spelled here; None for those whose names tell no type."""
    _, _, rest = key.partition("}:")
    name, _, more = rest.partition(":")
    if name.isdigit():  # a priority
        name, _, more = more.partition(":")
    if name == "alive" and more.endswith(":times"):
        return "hash"
    return _TYPE_OF.get(name)


def lease_times(alive: str) -> str:
    """Beside ``QueueKeys.alive``: the lease time of each of its consumers, ms."""
    return alive + ":times"


def app_queues(namespace: str, app: str) -> str:
    """The set of an app's queue names, for the commands that list them."""
    return f"{namespace}:{{{segment(app)}}}:queues"


def epochs(namespace: str, app: str) -> str:
    """Of which epoch each queue of the kombu transport is, and, under the empty name, how many were deleted."""
    return f"{namespace}:{{{segment(app)}}}:epochs"


def expiring(namespace: str, app: str) -> str:
    """Queues of the kombu transport that expire unless they are used, by the instant (Redis' clock, ms)."""
    return f"{namespace}:{{{segment(app)}}}:expiring"


def born(namespace: str, app: str) -> str:
    """A value that is written once: where it is another, or gone, all was flushed."""
    return f"{namespace}:{{{segment(app)}}}:born"


def bound(namespace: str, app: str, queue: str) -> str:
    """The bindings of a queue, to be found when it is deleted."""
    return f"{namespace}:{{{segment(app)}}}:bound:{encode(queue)}"


def bindings(namespace: str, app: str, exchange: str) -> str:
    """The bindings of an exchange, to be found when a message is routed. The exchange's name ends the key, unchanged."""
    return f"{namespace}:{{{segment(app)}}}:bindings:{exchange}"


def fanout(namespace: str, app: str, db: int, exchange: str, routing_key: str = "") -> str:
    """The pub/sub channel of a fanout exchange. Channels know no databases, so the number is part of the name. A ``/`` ends
    the exchange's name; one within it is encoded, and else the name stays as it is."""
    exchange = exchange.replace("%", "%25").replace("/", "%2F")
    name = f"{namespace}:{{{segment(app)}}}:fanout:{db}:{exchange}"
    return f"{name}/{routing_key}" if routing_key else name


def result(namespace: str, app: str, task_id: str) -> str:
    """Where a task's result lies; also the channel on which its arrival is told. Each id has a slot of its own."""
    return f"{namespace}:{segment(app)}:{{{encode(task_id)}}}:result"
