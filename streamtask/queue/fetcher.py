"""The connection that a worker process drains its shards by, with one fetch for all of them on its way or blocked. On a
Cluster, where one call is of one slot, it serves the shards of one.

A worker's fetch is one write: ``[XREAD] MULTI XREADGROUP... EXEC WATCH guards HMGET leases``. The WATCH of one guards the next,
so the fence costs no round trip: if a shard's token has changed, EXEC reads nothing. A shard that is new here is guarded by
one fetch and read by the next. A script costs Redis twice as much for each message (4 to 6 us against 1.5 to 2.5, with 100
bytes, 200 at once), so it is for what is no part of a drain: what wakes tell of, a full Redis, kombu (``arrivals.pack_fetch``).

XREAD reads what wakes a shard's owner (a message that falls due, a lane that opens, entries on offer). One that blocks waits
for messages, too, from the last delivered id, never from ``$``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from ..errors import BrokerOutOfMemory, BrokerUnavailable, LeaseLost, ReplyError, StreamTaskError
from ..redis import commands
from ..redis.connection import Broker
from ..redis.link import LARGE, Link
from ..redis.links import Links
from ..redis.misplaced import WRONGTYPE, by, misplaced, of_one_key
from .consumer import ShardConsumer
from .delivery import Entry

BLOCK_MS = 5000


@dataclass(slots=True)
class Fetched:
    """What a fetch has brought. ``unrecorded``: whose lease has no record (a flush); ``lost``: another process' now;
    ``refused``: which Redis answered with an error of theirs."""

    read: list[tuple[ShardConsumer, list[Entry] | StreamTaskError]] = field(default_factory=list)
    woken: list[ShardConsumer] = field(default_factory=list)
    unrecorded: list[ShardConsumer] = field(default_factory=list)
    lost: list[ShardConsumer] = field(default_factory=list)
    refused: list[tuple[ShardConsumer, ReplyError]] = field(default_factory=list)


class Fetcher:
    """See the module. Used by one thread."""

    def __init__(self, broker: Broker) -> None:
        self._links = Links(broker, BLOCK_MS / 1000 + broker.timeout_s, buffer_bytes=LARGE, idle_s=inf)
        self.link: Link
        """The connection, after the first fetch was sent."""
        self.asked: list[ShardConsumer] | None = None
        """The shards that the fetch under way reads; None where none is."""
        self.blocked = False
        self.guarded: list[ShardConsumer] = []
        """The shards that the next fetch may read."""
        self._where = broker.safe_url
        self._client_id = 0
        self._looks_at: Sequence[ShardConsumer] = ()
        self._guarding: tuple[list[ShardConsumer], bytes] = ([], b"")

    def send(self, owned: list[ShardConsumer], chosen: list[ShardConsumer], *, look: bool, block: bool) -> None:
        """Reads new entries of ``chosen``, all of which are guarded, and guards all that are ``owned`` for the next fetch.
        ``look`` at what wakes these; with ``block`` until something comes."""
        link = self.link = self._links.at(owned[0].fence.keys.stream)
        if not link.connected:
            link.connect()
            self._client_id = int(link.call(commands.CLIENT_ID))
        parts = [
            commands.MULTI,
            *(consumer.arrivals.read_command() for consumer in chosen),
            commands.EXEC,
            self._guard(owned),
        ]
        if look:
            parts.insert(0, _look(owned, chosen, block))
        self.asked, self.blocked = chosen, look and block
        self._looks_at = owned if look else ()
        link.send(b"".join(parts))

    def _guard(self, owned: list[ShardConsumer]) -> bytes:
        """What to send to watch these shards and to learn who owns them; nearly always what was sent last."""
        if owned != self._guarding[0]:
            watch = [commands.watch(consumer.fence.lease.guard for consumer in owned)] if owned else []
            self._guarding = (owned, b"".join([*watch, *(consumer.fence.guard_command for consumer in owned)]))
        return self._guarding[1]

    def receive(self) -> Fetched:
        """The answer; waits for it. Raises ``BrokerUnavailable``, ``ReplyError``: what was read by then is pending."""
        if self.asked is None:
            # Nothing was asked: the server closed the connection.
            raise BrokerUnavailable(f"Redis at {self._where} closed the connection")
        asked, watched = self.asked, self._guarding[0]
        looked = bool(self._looks_at)
        replies = iter(self.link.read_many(looked + 1 + len(asked) + 1 + bool(watched) + len(watched)))
        looked_at = self._looks_at
        woken = next(replies) if looked else None
        queued = [next(replies) for _ in range(1 + len(asked))]
        read = next(replies)
        self.asked, self.blocked = None, False
        fetched = Fetched()
        failed: ReplyError | None = None
        told: dict[bytes, bytes] = {}  # the first entry of each stream behind what was known
        if isinstance(woken, list):
            told = {name: entries[0][0] for name, entries in woken}
            fetched.woken = self._see_wakes(woken)
        elif isinstance(woken, ReplyError) and woken.code == WRONGTYPE:
            failed = woken
        if watched:
            next(replies)  # WATCH
        self._check_owners(fetched, watched, replies)
        if isinstance(read, list):
            fetched.read = [(c, _entries(reply)) for c, reply in zip(asked, read, strict=True)]
            for consumer, entries in fetched.read:
                # Another process was given it, and it would wake this one until it is acknowledged.
                if not entries and (others := told.get(consumer.fence.keys.stream.encode())) is not None:
                    consumer.arrivals.last_id = others.decode()
        elif any(isinstance(reply, BrokerOutOfMemory) for reply in queued):
            # Above maxmemory Redis before 8 refuses whatever is queued in a transaction; yet a full Redis must be drained.
            fetched.read = [(consumer, self._read_by_script(consumer)) for consumer in asked]
        elif isinstance(read, Exception):
            # EXECABORT: what was queued was refused.
            raise next((reply for reply in queued if isinstance(reply, Exception)), read)
        if failed is not None:
            self._find_broken(fetched, looked_at, failed)
        return fetched  # EXEC was refused where a guard has changed

    def _find_broken(self, fetched: Fetched, looked_at: Sequence[ShardConsumer], exc: ReplyError) -> None:
        """One XREAD looks at what wakes all shards: which of them made it fail?"""
        at_fault = misplaced([consumer.fence.keys.wake for consumer in looked_at], by(self.link))
        fetched.refused += [(consumer, exc) for consumer in looked_at if consumer.fence.keys.wake in at_fault]

    def _see_wakes(self, woken: list[Any]) -> list[ShardConsumer]:
        streams = {consumer.fence.keys.wake.encode(): consumer for consumer in self._looks_at}
        found = []
        for name, entries in woken:
            consumer = streams.get(name)
            if consumer is not None:
                # What the entry says is not looked at: it may stand for others before it.
                consumer.arrivals.wake_id = entries[-1][0].decode()
                found.append(consumer)
        return found

    def _check_owners(self, fetched: Fetched, watched: list[ShardConsumer], answers: Iterator[Any]) -> None:
        self.guarded = []
        for consumer, answer in zip(watched, answers, strict=True):
            if isinstance(answer, ReplyError) and of_one_key(answer):
                fetched.refused.append((consumer, answer))
            elif isinstance(answer, Exception):
                raise answer
            elif consumer.fence.owns(answer):
                self.guarded.append(consumer)
            else:
                (fetched.unrecorded if answer[1] is None else fetched.lost).append(consumer)

    def _read_by_script(self, consumer: ShardConsumer) -> list[Entry] | StreamTaskError:
        try:
            return consumer.arrivals.fetch(consumer.arrivals.asked)
        except (LeaseLost, ReplyError) as exc:
            return exc

    def unblock(self) -> bool:
        """Ends a blocked fetch, by another connection. True if its answer is on its way."""
        return bool(self._looks_at[0].fence.link.call(commands.unblock(self._client_id)) == 1)

    def drop(self) -> None:
        """Closes the connection: nothing is under way and nothing guarded any more."""
        self._links.close()
        self.asked, self.blocked, self.guarded = None, False, []


def _look(owned: list[ShardConsumer], chosen: list[ShardConsumer], block: bool) -> bytes:
    streams: dict[str | bytes, str | bytes] = {c.fence.keys.wake: c.arrivals.wake_id for c in owned}
    if block:
        streams |= {c.fence.keys.stream: c.arrivals.last_id for c in chosen}
    return commands.first_behind(streams, BLOCK_MS if block else None)


def _entries(reply: Any) -> Any:
    """The entries that were read of one stream, or the error."""
    return reply if isinstance(reply, Exception) else commands.given(reply)
