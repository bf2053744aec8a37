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

*The keeper is another process than the one that runs tasks*, so that a body that holds the GIL keeps its shard; and it
renews only while its child is alive and not stopped.

Sources: C. Gray, D. Cheriton, "Leases" (SOSP 1989); M. Kleppmann on fencing tokens (2016).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..clock import mono_s
from ..errors import LeaseLost
from ..redis.keys import ShardKeys
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
                (self.key, self.keys.consumers(self.group), self.keys.token(self.group)), args
            )
        return script("renew").pack((self.key, self.keys.token(self.group)), args)

    def renewed(self, answer: object, sent_at: float) -> None:
        """Takes the answer to ``pack_renew``. Raises ``LeaseLost``."""
        if answer == Code.LEASE_LOST:
            raise LeaseLost(f"the lease of {self.keys.prefix} is another's now")
        self.trusted_until = self.trust_from(sent_at)

    def renew(self, link: Link) -> None:
        sent_at = mono_s()
        self.renewed(link.call(self.pack_renew()), sent_at)

    def release(self, link: Link) -> bool:
        """Gives a shard's lease back. False if it was lost before."""
        return bool(link.run("release", [self.key], [self.token, self.incarnation]) == 1)

    def charge(self, link: Link, ran: Mapping[str, bool]) -> int:
        """Counts one crash for each of the entries whose body ran when the process died and that are at fault (true); the
        others' starts are forgotten. Answers how many were charged."""
        if not ran:
            return 0
        args: list[str | int] = [self.token, self.incarnation, self.group]
        for entry_id, at_fault in ran.items():
            args += [entry_id, int(at_fault)]
        return int(link.run("charge", [self.key, self.keys.stream, self.keys.notes(self.group)], args))


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
) -> Lease | Refused:
    """Takes a shard's lease if it is free.

    ``since_ms``: since when this process has been heard without a gap; ``missed_at_ms``: when it first found a record
    gone that it had seen (a flush), or 0; both on Redis' clock.
    """
    sent_at = mono_s()
    answer = link.run(
        "acquire",
        [keys.lease(group), keys.token(group)],
        [incarnation, lease_ms, since_ms, lowest_token, missed_at_ms],
    )
    if answer[0] == 0:
        return Refused(int(answer[1]))
    lease = Lease(keys, group, incarnation, lease_ms, False, int(answer[0]), 0.0, bool(answer[2]))
    lease.trusted_until = lease.trust_from(sent_at)
    return lease


def join_shared(link: Link, keys: ShardKeys, group: str, incarnation: str, lease_ms: int) -> Lease:
    """Makes an incarnation a consumer of a shared stream."""
    sent_at = mono_s()
    answer = link.run(
        "join_shared",
        [keys.lease(group, incarnation), keys.consumers(group), keys.token(group)],
        [incarnation, lease_ms],
    )
    lease = Lease(keys, group, incarnation, lease_ms, True, int(answer[0]), 0.0)
    lease.trusted_until = lease.trust_from(sent_at)
    return lease


def reap(
    link: Link, keys: ShardKeys, group: str, incarnation: str, lease_ms: int, *, gone: bool, since_ms: int = 0
) -> bool:
    """Ends a consumer of a shared stream and puts its entries on offer. ``gone``: it is known to be dead.

    True if it is gone now. False while its lease holds, or while nobody else lives to take its entries.
    """
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
            ],
            [group, incarnation, 1 if gone else 0, since_ms, lease_ms, 1000],
        )
        if ended or not moved:
            return bool(ended)
