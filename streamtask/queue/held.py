"""What an owner holds of its shard (or shared stream): its lease, what it has read, what waits, what is to be settled.

The state alone. What is done to it stands in a module each, one upon the other: ``settler.py`` (what is written),
``arrivals.py`` (what comes in), ``claimer.py`` (what was pending before), ``consumer.py`` (what is handed out).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..clock import mono_s, wall_ms
from ..coordination.lease import Lease
from ..errors import LeaseLost
from ..redis import wire
from ..redis.link import Link, pack
from ..redis.scripts import Code
from ..redis.wire import Note
from .delivery import Batch, Delivery, Entry, Outcome, entry_id_of
from .lanes import MAX_WAITING, LaneSet

OWNER = "owner"
"""The name of the one consumer of a shard in each group. The lease says which process that is."""

MOST_SENT = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerSettings:
    """``deduped``: time to live (ms) of the dedupe middleware's ids by task name; ``dedupe_all_ms``: for all others.
    ``max_waiting``: messages of a shard that wait in this process, beyond which reading stops. ``max_message_bytes``: what is
    larger is not decoded. ``accepts``: which content types a task's messages may have."""

    group: str = "workers"
    fetch_count: int = 200
    ack_batch: int = 200
    max_crashes: int = 3
    hold_on_dead: bool = False
    max_dedupe_ids: int = 1_000_000
    unordered: frozenset[str] = frozenset()
    deduped: Mapping[str, int] = field(default_factory=dict)
    dedupe_all_ms: int = 0
    max_waiting: int = MAX_WAITING
    max_message_bytes: int = 1 << 40
    accepts: Callable[[str], Collection[str]] = wire.only_safe


class Reading(Protocol):
    """Where it stands which entry is read: whoever sees this process die then counts that entry."""

    def begin(self, entry_id: bytes) -> None: ...
    def end(self) -> None: ...


class Held:
    """See the module. Each call of Redis names the lease's token and incarnation."""

    def __init__(self, lease: Lease, queue: str, shard: int | str, settings: ConsumerSettings) -> None:
        self.lease = lease
        self.keys = lease.keys
        self.queue = queue
        self.shard = shard
        self.settings = settings
        self.consumer_name = lease.incarnation if lease.shared else OWNER
        self.lanes = LaneSet()
        self.buffer: deque[Delivery | Entry] = deque()  # what was read, in its order
        self.handed: dict[int, Batch] = {}
        self.finished: list[bytes] = []
        self.finished_since = 0.0
        self.settling: list[bytes] = []  # sent to be acknowledged, and not answered yet
        self._sent: deque[tuple[float, bytes]] = deque(maxlen=MOST_SENT)  # when, and the calls of the last SENT_S
        self.halted = False
        self.closing = False
        self.last_id = "0-0"
        self.wake_id = "0-0"
        self.next_due: float | None = None
        self.needs_audit = False
        self.on_offer = lease.shared
        """Whether entries that were given back may be there to be taken (shared streams)."""
        self.revoked: set[bytes | str] = set()
        self.reading: Reading | None = None
        self.number = -1
        """Which of its process' leases this is, as their keeper numbers them."""
        self.room: int | None = None
        """How many entries to read now, where others could run them, too: workers set it for shared streams. None: as many as
        one call reads."""
        self.asked = settings.fetch_count  # how many the last read asked for
        self.voided = 0  # how often fetches that were on their way were made void, under this lease
        self.clock_ms = 0  # what to add to wall_ms() to get Redis' clock
        # Whether a new message may stay a plain entry until something happens to it.
        self._plain = not (settings.unordered or settings.deduped or settings.dedupe_all_ms)
        self._in_order = True
        self._closed: set[Hashable] = set()  # keys that a sequential executor skips until a batch reopens them
        self._notes: list[tuple[bytes, Note]] = []
        self._dead: list[tuple[Delivery | bytes, list[bytes], Outcome]] = []
        self._numbers = 0
        self._full_said = False
        # After a takeover: from where on the pending entries are not known yet, as XPENDING is asked; None: all are.
        self._pending_from: str | None = None
        self._read_to = (0, 0)  # before a connection broke
        self._others_to = (0, 0)  # up to this entry, what is pending was given to another owner before
        self._again_to = (0, 0)  # up to this entry of a shared stream, what was another's lies among what is new
        self._layouts: dict[str, str] = {}
        self._head = (lease.token, lease.incarnation, settings.group)
        self._group = settings.group.encode()
        keys = self.keys
        self.fetch_keys = (
            lease.key, keys.stream, keys.state, keys.notes(settings.group), keys.delayed, keys.wake,
            keys.requeued(settings.group),
        )  # fmt: skip
        self._reads: dict[int, bytes] = {}  # calls that read, by how many entries
        self.guard_command = pack("HMGET", lease.key, "token", "owner")
        """What to ask for after WATCH: does this incarnation own the lease?"""
        self._record = [b"%d" % lease.token, lease.incarnation.encode()]
        self._settle_keys = (lease.key, keys.stream, keys.state, keys.notes(settings.group))

    def __repr__(self) -> str:
        return f"<ShardConsumer {self.queue}/{self.shard} token={self.lease.token}>"

    def read_count(self) -> int:
        """How many entries to read at once."""
        return self.settings.fetch_count if self.room is None else self.room

    def read_command(self) -> bytes:
        """XREADGROUP of new entries; to be run inside a transaction that watches ``lease.guard``."""
        count = self.asked = max(1, self.read_count())
        packed = self._reads.get(count)
        if packed is None:
            packed = self._reads[count] = pack(
                "XREADGROUP", "GROUP", self.settings.group, self.consumer_name, "COUNT", count,
                "STREAMS", self.keys.stream, ">",
            )  # fmt: skip
        return packed

    def owns(self, answer: Sequence[bytes | None]) -> bool:
        """Whether that is the answer to ``guard_command`` that an owner gets."""
        return answer == self._record

    def _run(self, link: Link, name: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        return self._owned(link.run(name, keys, args))

    def _owned(self, answer: Any) -> Any:
        if type(answer) is int and answer == Code.LEASE_LOST:
            raise LeaseLost(f"shard {self.shard} of queue {self.queue!r} belongs to another process now")
        return answer

    def redis_ms(self) -> int:
        """Redis' clock, in ms."""
        return wall_ms() + self.clock_ms

    def entry_ids(self) -> set[bytes]:
        """The ids of all entries that this process holds: buffered, waiting, running, or finished and not settled."""
        held = {entry_id_of(item) for item in self.buffer}
        held.update(self.lanes.entry_ids())
        for batch in self.handed.values():
            held.update(batch.ids[batch.collected :])
        held.update(self.finished)
        held.update(self.settling)
        for item, _, _ in self._dead:
            held.add(item if isinstance(item, bytes) else item.entry_id)
        return held

    def _held_deliveries(self) -> Iterable[Delivery]:
        """Those held that may have a note."""
        yield from (item for item in self.buffer if isinstance(item, Delivery))
        for lane in self.lanes.lanes.values():
            yield from (item for item in lane.waiting if isinstance(item, Delivery))
        for batch in self.handed.values():
            yield from (item for item in batch.items[batch.collected :] if isinstance(item, Delivery))

    def _finish(self, entry_id: bytes) -> None:
        if not self.finished:
            self.finished_since = mono_s()
        self.finished.append(entry_id)
        self._in_order = False
