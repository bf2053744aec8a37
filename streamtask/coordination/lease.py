"""Leases: who owns a shard, until when, and how every process comes to the same answer.

*Redis decides.* The lease record has ``expires_at`` on Redis' clock and no key TTL: an expired lease stays its last
owner's until somebody takes it, and taking it changes the token in the same step. Each owner gets a larger fencing token
than the one before, ``max(last + 1, Redis' time in microseconds)``, so that it grows also over a flush or a lost second
of the append-only file. Every change to a shard's group state names the token and the incarnation and is refused when
they are not the record's.

*The process itself stops earlier.* ``trusted_until`` is ``time before the renewal was sent + lease - margin`` on the
monotonic clock, which counts also the time that a machine was suspended; a body does not start after it. It is no proof:
between the check and the body's first write a process may be paused for an hour. That is what the token is for.

*An outage moves no shard.* When Redis was away, all leases expired together. A process that was itself cut off (no
heartbeat for most of a lease time, or a broken connection) lets a former owner go first, for one lease time from its own
return (``acquire.lua``; ``since`` below).

*Each lease has its own length*, which stands with its record: processes with different settings live side by side while
they are replaced, and none judges another by its own lease time.

*A process is heard once for all its shared streams.* What its leases there say is who it is; until when they hold is one
number for all of them (``QueueKeys.alive``), where a server holds them all: see ``Contact``.

*Who renews is another process than the owner*, so that one that is busy, or holds the GIL, keeps its shard; and it renews only
while the owner is alive and not stopped.

Sources: C. Gray, D. Cheriton, "Leases" (SOSP 1989); M. Kleppmann on fencing tokens (2016).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..clock import mono_s
from ..errors import LeaseLost
from ..redis.keys import ShardKeys, lease_times
from ..redis.link import Link
from ..redis.scripts import Code, script

MARGIN = 0.1
"""The part of the lease time by which an owner stops trusting its lease early."""


@dataclass(slots=True)
class Lease:
    """A lease held by one incarnation: of a shard, or as a consumer of a shared stream."""

    keys: ShardKeys
    group: str
    incarnation: str
    lease_ms: int
    shared: bool
    token: int
    trusted_until: float
    by_expiry: bool = False
    alive: str = ""
    """Shared streams: the key that says until when the incarnation lives."""

    @property
    def key(self) -> str:
        return self.keys.lease(self.group, self.incarnation if self.shared else None)

    @property
    def guard(self) -> str:
        """The key to WATCH: it changes when the lease gets another owner, and not when it is renewed."""
        return self.key if self.shared else self.keys.token(self.group)

    def trust_from(self, sent_at: float) -> float:
        return sent_at + self.lease_ms / 1000 * (1 - MARGIN)

    def pack_renew(self) -> bytes:
        args = (self.token, self.incarnation, self.lease_ms)
        if self.shared:
            return script("renew_shared").pack(
                (
                    self.key,
                    self.keys.consumers(self.group),
                    self.keys.token(self.group),
                    self.alive,
                    lease_times(self.alive),
                ),
                args,
            )
        return script("renew").pack((self.key, self.keys.token(self.group)), args)

    def renewed(self, answer: object, sent_at: float) -> None:
        """Takes the answer to ``pack_renew``, of a shared stream with the names of consumers whose time is over. Raises
        ``LeaseLost``."""
        if answer == Code.LEASE_LOST:
            raise LeaseLost(f"the lease of {self.keys.prefix} is another's now")
        self.trusted_until = self.trust_from(sent_at)

    def renew(self, link: Link) -> None:
        sent_at = mono_s()
        self.renewed(link.call(self.pack_renew()), sent_at)

    def release(self, link: Link) -> bool:
        """Gives a shard's lease back. False if it was lost before."""
        return bool(link.run("release", [self.key], [self.token, self.incarnation]) == 1)

    def charge(self, link: Link, ran: Mapping[str, int]) -> int:
        """Says of entries whose bodies ran when the process died what they were to that: ``AT_FAULT`` counts one crash,
        ``OVERRAN`` a failed run, and of those that are ``SPARED`` it is forgotten that they started. Answers how many were
        charged."""
        if not ran:
            return 0
        args: list[str | int] = [self.token, self.incarnation, self.group]
        for entry_id, at_fault in ran.items():
            args += [entry_id, int(at_fault)]
        return int(link.run("charge", [self.key, self.keys.stream, self.keys.notes(self.group)], args))


SPARED, AT_FAULT, OVERRAN = range(3)


@dataclass(frozen=True, slots=True)
class Refused:
    """The lease is not free; ``ask_at_ms`` (Redis' clock) is when to ask again."""

    ask_at_ms: int


def acquire(
    link: Link,
    keys: ShardKeys,
    group: str,
    incarnation: str,
    lease_ms: int,
    *,
    since_ms: int = 0,
    lowest_token: int = 0,
    missed_at_ms: int = 0,
    its_lease_ms: int = 0,
) -> Lease | Refused:
    """Takes a shard's lease if it is free.

    ``since_ms``: since when this process has been heard without a gap; ``missed_at_ms``: when it first found a record
    gone that it had seen (a flush), or 0; both on Redis' clock. ``its_lease_ms``: the lease time of the owner that it saw
    there.
    """
    sent_at = mono_s()
    answer = link.run(
        "acquire",
        [keys.lease(group), keys.token(group)],
        [incarnation, lease_ms, since_ms, lowest_token, missed_at_ms, its_lease_ms or lease_ms],
    )
    if answer[0] == 0:
        return Refused(int(answer[1]))
    lease = Lease(keys, group, incarnation, lease_ms, False, int(answer[0]), 0.0, bool(answer[2]))
    lease.trusted_until = lease.trust_from(sent_at)
    return lease


def join_shared(link: Link, keys: ShardKeys, group: str, incarnation: str, lease_ms: int, *, alive: str = "") -> Lease:
    """Makes an incarnation a consumer of a shared stream. ``alive``: see ``QueueKeys.alive``; by default the stream's own."""
    sent_at = mono_s()
    alive = alive or keys.alive(group)
    answer = link.run(
        "join_shared",
        [keys.lease(group, incarnation), keys.consumers(group), keys.token(group), alive, lease_times(alive)],
        [incarnation, lease_ms],
    )
    lease = Lease(keys, group, incarnation, lease_ms, True, int(answer[0]), 0.0, alive=alive)
    lease.trusted_until = lease.trust_from(sent_at)
    return lease


@dataclass(slots=True)
class Contact:
    """A key that says which consumers of shared streams live, as one who keeps some of them alive knows it."""

    alive: str
    lease_ms: int
    since_ms: int = 0
    """Since when it has been heard without a gap, on Redis' clock."""
    heard_ms: int = 0
    next_ms: int = 0
    """When the next one's time is over, unless that is heard."""
    over: list[str] = field(default_factory=list)
    """Whose time is over."""
    used_at: float = 0.0
    """When (monotonic) somebody was last kept alive with it."""
    _sent_at: float = -math.inf
    _outages: int = -1

    def pack_beat(self, incarnations: Iterable[str]) -> bytes:
        return script("beat").pack((self.alive, lease_times(self.alive)), (self.lease_ms, self.since_ms, *incarnations))

    def heard(self, answer: Any, sent_at: float, outages: int) -> list[bool]:
        """Takes the answer to ``pack_beat``: for each incarnation whether all its leases are prolonged, else each is to be
        renewed. ``outages``: how many there were."""
        now_ms, self.next_ms, over, in_time = answer
        gap_ms = max(now_ms - self.heard_ms, (sent_at - self._sent_at) * 1000)
        steady = outages == self._outages and gap_ms <= self.lease_ms * 0.6 and now_ms >= self.heard_ms
        if not steady:
            self.since_ms = now_ms
        self.heard_ms, self._sent_at, self._outages = now_ms, sent_at, outages
        self.over = [name.decode() for name in over]
        return [steady and one == 1 for one in in_time]


def reap(
    link: Link,
    keys: ShardKeys,
    group: str,
    incarnation: str,
    lease_ms: int,
    *,
    gone: bool,
    since_ms: int = 0,
    alive: str = "",
    token: int = 0,
    charged: bool = False,
) -> bool:
    """Ends a consumer of a shared stream and puts its entries on offer. ``gone``: it is known to be dead. ``token``: only if
    that is its lease's. ``charged``: whose bodies ran when it died is counted already, so what else has started had ended.

    True if it is gone now. False while its lease holds, or while nobody else lives to take its entries.
    """
    alive = alive or keys.alive(group)
    while True:
        ended, moved = link.run(
            "reap_consumer",
            [
                keys.lease(group, incarnation),
                keys.consumers(group),
                keys.stream,
                keys.requeued(group),
                keys.wake,
                keys.notes(group),
                alive,
                lease_times(alive),
            ],
            [group, incarnation, 1 if gone else 0, since_ms, lease_ms, 1000, token, 1 if charged else 0],
        )
        if ended or not moved:
            return bool(ended)
