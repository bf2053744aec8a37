"""Keeps the leases of processes, and spreads the shards over them and those of others.

The processes are *members*, and what they do with what they own is theirs: who keeps leases for them (a supervisor, a keeper,
or whatever else starts processes or is one) says by a kind of ``Member`` how each is told. In the order of a round:

1. Say to Redis that the members live, and renew their leases, three times in a lease time.
2. Compare who owns what with who should (``coordination.assignment``), hand over what is to move, take what is free.
3. Call off hand-overs that take too long.

It has no loop of its own: its owner calls ``work`` no later than ``wake_at`` says, and ``take_news`` when the news link
is readable. Everything it knows can be read from Redis again.
"""

from __future__ import annotations

import logging
import math
import selectors
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..clock import mono_s, wall_ms
from ..errors import BrokerUnavailable, LeaseLost, QueueFull, ReplyError, StreamTaskError
from ..redis import commands
from ..redis.connection import Broker
from ..redis.keys import QueueKeys, Shape, ShardKeys
from ..redis.link import Link
from ..redis.links import Links
from ..redis.misplaced import naming, number, of_one_key
from ..redis.outage import Outage, Rarely
from ..text import counted
from .assignment import assign
from .lease import Contact, Lease, Refused, acquire, reap
from .membership import Membership

BEATS = 3
"""Renewals in one lease time."""

LOOK_S = 60.0
"""How often each lease of a shared stream is looked at, though nothing shows that one could have been lost."""

SHAPE_BEATS = 10
"""In so many beats what Redis has recorded of each followed queue is read: who changes it tells, too."""


class QueueWatch:
    """What is known of one queue's group. ``follows``: its shape is what Redis has recorded, once it has; else it is set."""

    def __init__(self, name: str, keys: QueueKeys, group: str, lease_ms: int, *, follows: bool = False) -> None:
        self.name = name
        self.keys = keys
        self.channel = keys.channel(group).encode()
        self.membership = Membership(keys, group, lease_ms)
        self.shape: Shape | None = None
        self.follows = follows
        self.leaving = False
        """Nothing more of it is to be owned here."""
        self.joined = False  # others were told
        self.look_at = 0.0  # monotonic: when to compare ownership next
        self.seen_owner: dict[int, int] = {}  # shards whose lease record was there once: its lease time
        self.missed_ms: dict[int, int] = {}
        self.ask = True  # for its shape, at the next beat
        self.revoked: set[str] = set()
        self.said: list[Any] = []
        self.taken_over: list[int | str] = []  # and not said yet

    @property
    def shared_out(self) -> bool:
        """Whether its shards are to be spread."""
        return self.shape is not None and not self.leaving

    @property
    def epoch(self) -> int:
        return self.shape.epoch if self.shape else 0

    def shard_keys(self, shard: int | str) -> ShardKeys:
        return self.keys.shard(self.epoch, shard)


@dataclass(slots=True, eq=False)
class Held:
    """A lease of a member, and how far its hand-over has come."""

    number: int
    watch: QueueWatch
    shard: int | str
    lease: Lease
    handover_until: float | None = None
    not_before: float = 0.0
    looked_at: float = -math.inf
    """When (monotonic) it was renewed by itself, and not with all leases of its member."""


@dataclass(slots=True, eq=False, kw_only=True)
class Member:
    """A process that leases are kept for; its kinds say how it is told of them. ``most``: how many it can hold."""

    incarnation: str
    index: int = 0
    most: int
    held: dict[int, Held] = field(default_factory=dict)
    numbers: int = 0
    said_full: bool = False

    @property
    def kept(self) -> bool:
        """Whether it works now: else nothing of it is renewed."""
        raise NotImplementedError

    @property
    def leaving(self) -> bool:
        """Whether it is to own nothing more."""
        raise NotImplementedError

    def info(self) -> Mapping[str, Any]:
        """What others may read of it."""
        raise NotImplementedError

    def own(self, held: Held) -> None:
        """It owns a lease now."""
        raise NotImplementedError

    def release(self, held: Held) -> None:
        """It is to end what it runs of a shard, and to say then that it has released it."""
        raise NotImplementedError

    def resume(self, held: Held) -> None:
        """It is to go on with a shard after all."""
        raise NotImplementedError

    def lost(self, held: Held) -> None:
        """A lease is another's now."""
        raise NotImplementedError

    def trust(self, held: Held, until: float) -> None:
        """It may begin with a message of a shard until then (monotonic)."""
        raise NotImplementedError

    def revoked(self, watch: QueueWatch) -> None:
        """The revoked ids of a queue, in ``watch.revoked``, have changed."""
        raise NotImplementedError

    @property
    def full(self) -> bool:
        """Whether it owns as much as it can."""
        return len(self.held) >= self.most

    def next_number(self) -> int:
        """A number that no lease has; there is none if it is full."""
        while True:
            self.numbers = (self.numbers + 1) % self.most
            if self.numbers not in self.held:
                return self.numbers

    def holding(self, keys: ShardKeys) -> Held | None:
        return next((held for held in self.held.values() if held.lease.keys == keys), None)


class Coordinator:
    """See the module.

    ``members`` and ``watches`` are looked at anew each time: their owner adds and removes. ``beaten`` is called after
    each heartbeat with the members that work. The news link is registered with the selector as ``"news"``.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        group: str,
        lease_ms: int,
        handover_timeout_s: float,
        members: Sequence[Member],
        watches: Sequence[QueueWatch],
        selector: selectors.BaseSelector,
        beaten: Callable[[Sequence[Member]], None],
        log: logging.Logger,
    ) -> None:
        self.links = Links(broker, max(0.5, lease_ms / 3000))
        self.closing = False
        """Set by the owner when no shard is to be taken any more."""
        self.outages = 0
        """How often the connection to Redis was lost."""
        self._broker = broker
        self._group = group
        self._lease_ms = lease_ms
        self._handover_timeout_s = handover_timeout_s
        self._members = members
        self._watches = watches
        self._selector = selector
        self._beaten = beaten
        self._log = log
        self._listens = Links(broker, 5.0, idle_s=math.inf)  # beside those, over a connection of its own
        self._news: Link | None = None
        self._subscribed: set[bytes] = set()
        self._next_beat = 0.0
        self._beats = 0
        self._contacts: dict[str, Contact] = {}  # by the key that says who lives
        self._ended: set[tuple[ShardKeys, str]] = set()  # consumers whose time is over and who have no part in a stream
        self._outage = Outage(log, 0.05, 0.5)
        self._refusals: dict[str, Rarely] = {}

    def work(self) -> None:
        """Does what is due."""
        now = mono_s()
        try:
            if now >= self._next_beat:
                self._beat()
            for watch in self._watches:
                if now >= watch.look_at and watch.shared_out and not self.closing:
                    try:
                        self._compare(watch)
                    except ReplyError as exc:
                        self._rests(watch, exc)
            self._end_handovers(now)
        except BrokerUnavailable as exc:
            self.outage(exc)
        except (QueueFull, ReplyError) as exc:
            self._put_off(self._outage.met(exc))

    def _rests(self, watch: QueueWatch, exc: object) -> None:
        """Redis refuses something of one queue, of which nothing changes hands until that is over. Raises what is no matter of
        one queue."""
        shards = range(watch.shape.shards if watch.shape else 0)

        def keys() -> Iterator[str]:
            yield from watch.keys.all(self._group)
            for names in map(watch.shard_keys, shards):
                yield from (names.lease(self._group), names.token(self._group))

        self._say_refused(f"queue={watch.name}", exc, keys)
        watch.look_at = mono_s() + max(1.0, self._lease_ms / 1000)

    def _shard_rests(self, watch: QueueWatch, shard: int | str, exc: Exception) -> None:
        """Redis refuses something of one shard, which is not taken until that is over; the others are. Raises as ``_rests``."""
        where = f"queue={watch.name} shard={shard}"
        self._say_refused(where, exc, lambda: watch.shard_keys(shard).all(self._group))

    @contextmanager
    def one_by_one(self, watch: QueueWatch, shard: int | str) -> Iterator[None]:
        """Around what concerns one shard or shared stream alone."""
        try:
            yield
        except ReplyError as exc:
            self._shard_rests(watch, shard, exc)

    def _say_refused(self, where: str, exc: object, keys: Callable[[], Iterable[str]] = tuple) -> None:
        """``keys``: those of which one may be at fault. Raises what is no matter of one key."""
        if not (isinstance(exc, ReplyError) and of_one_key(exc)):
            assert isinstance(exc, Exception)
            raise exc
        if self._worth_saying(where, str(exc)):
            self._log.error("Redis refused a call %s: %s", where, naming(exc, keys(), self.links.pipeline))

    def _worth_saying(self, where: str, what: str) -> bool:
        if len(self._refusals) > 1000:
            self._refusals.clear()
        return self._refusals.setdefault(where, Rarely()).worth_saying(what)

    def wake_at(self) -> float:
        """When to call ``work`` next, on the monotonic clock."""
        wake = self._next_beat
        if not self._outage and not self.closing:
            wake = min([wake, *(watch.look_at for watch in self._watches if watch.shared_out)])
        ends = [
            held.handover_until
            for member in self._members
            if not member.leaving
            for held in member.held.values()
            if held.handover_until is not None
        ]
        return min([wake, *ends])

    def soon(self) -> None:
        """The next ``work`` beats."""
        self._next_beat = 0.0

    def outage(self, exc: StreamTaskError) -> None:
        """Redis did not answer: connect anew after a wait."""
        self.outages += 1
        self.links.close()
        self._close_news()
        for watch in self._watches:
            watch.membership.cut_off = watch.ask = True
        self._put_off(self._outage.met(exc))

    def _put_off(self, wait_s: float) -> None:
        self._next_beat = mono_s() + wait_s
        for watch in self._watches:
            watch.look_at = max(watch.look_at, self._next_beat)

    def close(self) -> None:
        self._close_news()
        self.links.close()

    # Leases

    def _beat(self) -> None:
        """Heartbeat and renewals of all members in one write."""
        live = [member for member in self._members if member.kept]
        infos = {member.incarnation: member.info() for member in live if not member.leaving}
        pairs = [(member, held) for member in live for held in member.held.values()]
        pairs.sort(key=lambda pair: pair[1].lease.token)  # after a flush the token counters grow again in this order
        leases = [pair for pair in pairs if not pair[1].lease.shared]
        sent_at, sent_ms = mono_s(), wall_ms()
        shared: dict[str, list[tuple[Member, Held]]] = {}
        for pair in pairs:
            if pair[1].lease.shared:
                shared.setdefault(pair[1].lease.alive, []).append(pair)
        for alive in shared:
            self._contacts.setdefault(alive, Contact(alive, self._lease_ms)).used_at = sent_at
        # For a while also without a member, as when a lone process is replaced: who takes its place need not wait.
        self._contacts = {alive: one for alive, one in self._contacts.items() if sent_at - one.used_at <= LOOK_S}
        names = {
            alive: list(dict.fromkeys(held.lease.incarnation for _, held in shared.get(alive, ())))
            for alive in self._contacts
        }
        watches = [watch for watch in self._watches if watch.shape is not None]
        followed = self._asked()
        calls = [(watch.keys.meta, watch.membership.pack_beat({} if watch.leaving else infos)) for watch in watches]
        calls += [(watch.keys.meta, commands.fields(watch.keys.meta, "shards", "epoch")) for watch in followed]
        calls += [(alive, contact.pack_beat(names[alive])) for alive, contact in self._contacts.items()]
        calls += [(held.lease.key, held.lease.pack_renew()) for _, held in leases]
        replies = iter(self.links.pipeline(calls))
        for watch, reply in zip(watches, replies, strict=False):
            if isinstance(reply, Exception):
                self._rests(watch, reply)
            elif watch.membership.heard(reply, sent_ms):
                watch.look_at = 0.0
        found = [self._shape_read(watch, reply) for watch, reply in zip(followed, replies, strict=False)]
        late: list[tuple[Member, Held]] = []
        for (alive, contact), reply in zip(self._contacts.items(), replies, strict=False):
            late += self._prolonged(shared.get(alive, ()), names[alive], contact, reply, sent_at)
        self._renewed(leases, replies, sent_at)
        over = self._look_at(late)
        self._outage.over(self._broker.safe_url)
        self._next_beat = mono_s() + self._lease_ms / 1000 / BEATS
        self._end_consumers(shared, over, sent_at)
        if any(found):
            self.soon()
        self._beaten(live)
        self._listen()

    def _renewed(self, leases: Sequence[tuple[Member, Held]], replies: Iterable[Any], sent_at: float) -> None:
        """Takes the answers to renewals."""
        for (member, held), reply in zip(leases, replies, strict=True):
            if isinstance(reply, Exception):
                where = f"queue={held.watch.name} shard={held.shard}"
                if self._worth_saying(f"{where}: renewals", str(reply)):
                    self._log.error("a renewal failed %s: %s", where, reply)
                continue
            try:
                held.lease.renewed(reply, sent_at)
            except LeaseLost:
                member.held.pop(held.number, None)
                member.lost(held)
                continue
            if held.handover_until is None:
                member.trust(held, held.lease.trusted_until)

    def _prolonged(
        self, leases: Sequence[tuple[Member, Held]], names: Sequence[str], contact: Contact, reply: Any, sent_at: float
    ) -> list[tuple[Member, Held]]:
        """Takes the answer for all leases of shared streams under one key. Returns those that are to be renewed one by one."""
        if isinstance(reply, Exception):
            self._log.error("renewals failed key=%s: %s", contact.alive, reply)
            return []
        in_time = dict(zip(names, contact.heard(reply, sent_at, self.outages), strict=True))
        late = []
        for member, held in leases:
            if not in_time[held.lease.incarnation] or sent_at - held.looked_at > LOOK_S:
                late.append((member, held))
                continue
            held.lease.trusted_until = held.lease.trust_from(sent_at)
            if held.handover_until is None:
                member.trust(held, held.lease.trusted_until)
        return late

    def _look_at(self, leases: Sequence[tuple[Member, Held]]) -> set[tuple[ShardKeys, str]]:
        """Renews leases of shared streams one by one. Returns the consumers there whose time is over."""
        sent_at = mono_s()
        replies = self.links.pipeline([(held.lease.key, held.lease.pack_renew()) for _, held in leases])
        self._renewed(leases, replies, sent_at)
        over: set[tuple[ShardKeys, str]] = set()
        for (_, held), reply in zip(leases, replies, strict=True):
            if isinstance(reply, list):
                held.looked_at = sent_at
                over.update((held.lease.keys, name.decode()) for name in reply)
        return over

    def _end_consumers(
        self, shared: Mapping[str, Sequence[tuple[Member, Held]]], over: set[tuple[ShardKeys, str]], sent_at: float
    ) -> None:
        """Ends those who are gone, in the shared streams of our members. ``over``: who is known to be a consumer."""
        ours = {member.incarnation for member in self._members}
        told: set[tuple[ShardKeys, str]] = set()
        for alive, contact in self._contacts.items():
            streams = {held.lease.keys for _, held in shared.get(alive, ())}
            told.update((keys, name) for keys in streams for name in contact.over)
        self._ended &= told
        asked = sorted((pair for pair in told - self._ended - over if pair[1] not in ours), key=str)
        keys = [stream.consumers(self._group) for stream, _ in asked]
        scores = self.links.pipeline(
            [(key, commands.score(key, name)) for key, (_, name) in zip(keys, asked, strict=True)]
        )
        for pair, score in zip(asked, scores, strict=True):
            if isinstance(score, Exception):
                self._say_refused(f"stream={pair[0].stream}", score)
            elif score is None:
                self._ended.add(pair)
            else:
                over.add(pair)
        contacts = {held.lease.keys: self._contacts[alive] for alive, of in shared.items() for _, held in of}
        due_ms = [(contact.next_ms, contact) for contact in self._contacts.values()]
        for stream, name in sorted(over, key=str):
            if name in ours:
                continue
            contact = contacts[stream]
            try:
                ended = reap(
                    self.links.at(stream.stream), stream, self._group, name, self._lease_ms,
                    gone=False, since_ms=contact.since_ms, alive=contact.alive,
                )  # fmt: skip
            except ReplyError as exc:
                self._say_refused(f"stream={stream.stream}", exc)
                continue
            if ended:
                self._ended.add((stream, name))
                self._log.warning(
                    "removed the consumer of a process that is gone stream=%s consumer=%s", stream.stream, name
                )
            else:
                due_ms.append((contact.since_ms + self._lease_ms, contact))
        for at_ms, contact in due_ms:
            if at_ms > contact.heard_ms:  # when to look again, unless a beat comes before
                self._next_beat = min(self._next_beat, sent_at + (at_ms - contact.heard_ms) / 1000 + 0.01)

    def _asked(self) -> list[QueueWatch]:
        """The followed queues whose shapes are to be read in this beat: in turn, and what was told of at once."""
        self._beats += 1
        asked = [
            watch
            for number, watch in enumerate(self._watches)
            if watch.follows and not watch.leaving and (watch.ask or number % SHAPE_BEATS == self._beats % SHAPE_BEATS)
        ]
        for watch in asked:
            watch.ask = False
        return asked

    def _shape_read(self, watch: QueueWatch, reply: Any) -> bool:
        """Takes what Redis has recorded of a queue. True if its shards have just come."""
        if isinstance(reply, Exception):
            self._rests(watch, reply)
            return False
        if not reply[0]:
            return False  # it has none yet; or Redis was flushed, and whoever sends next records it again
        before, meta = watch.shape, watch.keys.meta
        try:
            watch.shape = Shape(number(reply[0], 0, meta, "shards"), number(reply[1], 0, meta, "epoch"))
        except ReplyError as exc:
            self._rests(watch, exc)
            return False
        if before == watch.shape:
            return False
        watch.look_at = 0.0
        watch.seen_owner.clear()
        watch.missed_ms.clear()
        return before is None

    def has_room(self, member: Member) -> bool:
        """Whether a member can own more. What it can't is left to others, and said once."""
        if member.full and not member.said_full:
            self._log.error(
                "a process can own at most %d shards; the rest has no owner: start more processes process=%d",
                member.most, member.index,
            )  # fmt: skip
        member.said_full = member.full
        return not member.full

    def give(self, member: Member, watch: QueueWatch, shard: int | str, lease: Lease) -> None:
        """Keeps a lease for a member, which has room for it, from now on."""
        held = Held(member.next_number(), watch, shard, lease)
        member.held[held.number] = held
        member.own(held)
        self._log.debug(
            "took a lease queue=%s shard=%s token=%d process=%d%s",
            watch.name, shard, lease.token, member.index, " (it had expired)" if lease.by_expiry else "",
        )  # fmt: skip
        if lease.by_expiry and not lease.shared:
            watch.taken_over.append(shard)

    def released(self, member: Member, number: int) -> None:
        """A member has ended what it ran of a shard."""
        held = member.held.pop(number, None)
        if held is None:
            return
        member.trust(held, 0.0)
        try:
            self._free(held)
            self._announce(held.watch, "released")
        except BrokerUnavailable as exc:
            # The lease runs out by itself.
            self.outage(exc)
        except (QueueFull, ReplyError) as exc:
            self._log.error("a lease was not given back; it runs out: %s", exc)
        held.watch.look_at = 0.0

    def bury(self, member: Member, ran: Mapping[int, Mapping[str, int]], *, all_that_ran: bool = False) -> None:
        """What a dead member leaves: the entries that ``ran``, by lease, are charged or spared (see ``Lease.charge``);
        then the leases are freed. ``all_that_ran``: no body of another entry ran, whatever start is written down."""
        for held in list(member.held.values()):
            try:
                if held.number in ran:
                    held.lease.charge(self.links.at(held.lease.key), ran[held.number])
                self._free(held, charged=all_that_ran)
            except ReplyError as exc:
                self._say_refused(f"queue={held.watch.name} shard={held.shard}", exc)
            held.watch.look_at = 0.0
        member.held.clear()
        for watch in self._watches:
            try:
                self._leave_members(watch, [member.incarnation])
            except ReplyError as exc:
                self._say_refused(f"queue={watch.name}", exc)

    def _leave_members(self, watch: QueueWatch, incarnations: list[str]) -> None:
        if watch.shape is None:
            return  # never joined
        watch.membership.leave(self.links.at(watch.keys.meta), incarnations)
        self._announce(watch, "left")
        watch.membership.members = [m for m in watch.membership.members if m not in incarnations]
        watch.look_at = 0.0

    def _free(self, held: Held, *, charged: bool = False) -> None:
        lease = held.lease
        link = self.links.at(lease.key)
        if lease.shared:
            reap(
                link, lease.keys, self._group, lease.incarnation, self._lease_ms,
                gone=True, alive=lease.alive, charged=charged,
            )  # fmt: skip
        else:
            lease.release(link)

    # Who owns what

    def leave(self, watch: QueueWatch) -> None:
        """Nothing of a queue is to be owned here any more: its shards are freed as they are released."""
        watch.leaving = True
        for member in self._members:
            for held in member.held.values():
                if held.watch is watch:
                    self._give_up(member, held)
        self._leave_members(watch, [member.incarnation for member in self._members])

    def return_to(self, watch: QueueWatch) -> None:
        """Takes part in a queue again that is being left."""
        watch.leaving = watch.joined = False
        for member in self._members:
            for held in member.held.values():
                if held.watch is watch and held.handover_until is not None:
                    self._take_back(member, held)
        watch.look_at = 0.0
        self.soon()

    def _compare(self, watch: QueueWatch) -> None:
        """One comparison of who owns the shards with who should; all coordinators come to the same answer."""
        membership, now = watch.membership, mono_s()
        watch.look_at = now + self._lease_ms / 1000 / BEATS
        assert watch.shape is not None
        shards = range(watch.shape.shards)
        mine = {member.incarnation: member for member in self._members if member.kept and not member.leaving}
        at = {watch.shard_keys(shard): shard for shard in shards}
        owners: dict[int, str] = {}
        for member in mine.values():
            for held in list(member.held.values()):
                if held.lease.keys in at:
                    if held.lease.trusted_until > now:  # renewed just now: it needs no look
                        owners[at[held.lease.keys]] = member.incarnation
                elif held.watch is watch and not held.lease.shared:
                    self._give_up(member, held)  # the queue was made anew, with fewer shards or another epoch
        watch.seen_owner.update(dict.fromkeys(owners, self._lease_ms))
        for shard in owners:
            watch.missed_ms.pop(shard, None)
        others = [shard for shard in shards if shard not in owners]
        keys = [watch.shard_keys(shard).lease(self._group) for shard in others]
        records = self.links.pipeline([(key, commands.fields(key, "owner", "expires_at", "lease_ms")) for key in keys])
        redis_now = membership.redis_now_ms()
        expiry: dict[int, int] = {}
        broken: set[int] = set()
        for shard, key, record in zip(others, keys, records, strict=True):
            try:
                if isinstance(record, Exception):
                    raise record
                lease_ms = number(record[2], self._lease_ms, key, "lease_ms")
                expires_at = number(record[1], 0, key, "expires_at")
            except ReplyError as exc:
                self._shard_rests(watch, shard, exc)
                broken.add(shard)
                continue
            if record[0]:
                owners[shard] = record[0].decode(errors="backslashreplace")
                expiry[shard] = expires_at
            if record[0] is not None:
                watch.seen_owner[shard] = lease_ms
                watch.missed_ms.pop(shard, None)
            elif shard in watch.seen_owner:
                watch.missed_ms.setdefault(shard, redis_now)
        for shard, named in owners.items():
            # The record names a process of ours that does not know of it: a lost reply, or the keeper before this one.
            # It takes it anew: another may have had it since, and Redis lost that.
            if named in mine and mine[named].holding(watch.shard_keys(shard)) is None:
                self._take(watch, mine[named], shard, now)
        target = assign(list(shards), membership.members, owners, watch.name)
        for shard, incarnation in target.items():
            owner = owners.get(shard)
            if owner in mine and owner != incarnation:
                self._begin_handover(mine[owner], watch, shard, now)
            if incarnation in mine and owner != incarnation and shard not in broken:
                until = 0 if owner is None else expiry.get(shard, redis_now + self._lease_ms)
                if redis_now < until <= redis_now + self._lease_ms * 2:
                    # Its owner hands it over, or its lease runs out: look again then.
                    watch.look_at = min(watch.look_at, now + max(0.01, (until - redis_now) / 1000))
                    continue
                # It is free; or its time ends so late that the clock must have been set back, of which the script judges.
                self._take(watch, mine[incarnation], shard, now)
        self._say_owned(watch)

    def _say_owned(self, watch: QueueWatch) -> None:
        """One line on who owns what here, whenever that has changed, and one on what others have left."""
        if watch.taken_over:
            shards, watch.taken_over = sorted(watch.taken_over, key=str), []
            self._log.warning(
                "took over %s whose owners are gone queue=%s: %s",
                counted(len(shards), "shard"),
                watch.name,
                ", ".join(map(str, shards)),
            )
        owned = [
            (member.index, sorted(h.shard for h in member.held.values() if h.watch is watch and not h.lease.shared))
            for member in sorted(self._members, key=lambda member: member.index)
        ]
        if owned != watch.said and any(member.kept for member in self._members):
            watch.said = owned
            self._log.debug(
                "shards owned here queue=%s: %s",
                watch.name,
                "; ".join(f"process {i}: {', '.join(map(str, shards)) or 'none'}" for i, shards in owned) or "none",
            )

    def _take(self, watch: QueueWatch, member: Member, shard: int, now: float) -> None:
        keys = watch.shard_keys(shard)
        if member.holding(keys) is not None or not self.has_room(member):
            return
        try:
            answer = acquire(
                self.links.at(keys.state),
                keys,
                self._group,
                member.incarnation,
                self._lease_ms,
                since_ms=watch.membership.since_ms,
                missed_at_ms=watch.missed_ms.get(shard, 0),
                its_lease_ms=watch.seen_owner.get(shard, 0),
            )
        except ReplyError as exc:
            self._shard_rests(watch, shard, exc)
            return
        if isinstance(answer, Refused):
            wait = max(0.01, (answer.ask_at_ms - watch.membership.redis_now_ms()) / 1000)
            watch.look_at = min(watch.look_at, now + wait)
            return
        watch.missed_ms.pop(shard, None)
        self.give(member, watch, shard, answer)

    def _begin_handover(self, member: Member, watch: QueueWatch, shard: int, now: float) -> None:
        held = member.holding(watch.shard_keys(shard))
        if held is None or held.handover_until is not None or now < held.not_before:
            return
        held.handover_until = now + self._handover_timeout_s
        member.trust(held, 0.0)
        member.release(held)

    def _give_up(self, member: Member, held: Held) -> None:
        """Hands over without taking it back."""
        if held.handover_until is None:
            member.trust(held, 0.0)
            member.release(held)
        held.handover_until = math.inf

    def _end_handovers(self, now: float) -> None:
        """A hand-over that takes too long is called off, for a body still runs; it is tried again later."""
        for member in self._members:
            if member.leaving:
                continue
            for held in member.held.values():
                if held.handover_until is not None and now >= held.handover_until:
                    self._log.info(
                        "a body still runs: hand-over put off queue=%s shard=%s", held.watch.name, held.shard
                    )
                    held.not_before = now + self._handover_timeout_s
                    self._take_back(member, held)

    def _take_back(self, member: Member, held: Held) -> None:
        held.handover_until = None
        member.trust(held, held.lease.trusted_until)
        member.resume(held)

    # News of other coordinators

    def _announce(self, watch: QueueWatch, what: str) -> None:
        self.links.at(watch.keys.meta).call(watch.membership.pack_announce(what))

    def _listen(self) -> None:
        """Subscribes to what others tell: it only makes things faster, so a lost message costs a beat."""
        missing = [watch.channel for watch in self._watches if watch.channel not in self._subscribed]
        if missing:
            if self._news is None:
                self._news = self._listens.at(self._watches[0].keys.meta)  # whatever server hears of all channels
                self._news.connect()
                self._selector.register(self._news, selectors.EVENT_READ, "news")
            self._news.send(commands.subscribe(missing))
            while not self._subscribed.issuperset(missing):
                self._take_one(self._news)
        for watch in self._watches:
            if watch.shared_out and watch.membership.heard_ms and not watch.joined:
                watch.joined = True
                self._read_revoked(watch)
                self._announce(watch, "joined")

    def _close_news(self) -> None:
        self._subscribed.clear()
        for watch in self._watches:
            watch.joined = False
        if self._news is not None:
            try:
                self._selector.unregister(self._news)
            except (KeyError, ValueError):
                pass
            self._listens.close()
            self._news = None

    def take_news(self) -> None:
        """Reads what others have told."""
        if self._news is None:
            return  # closed since the selector answered
        try:
            while True:
                self._take_one(self._news)
                if not self._news.buffered():
                    return
        except (BrokerUnavailable, QueueFull, ReplyError) as exc:
            self.outage(exc)

    def _take_one(self, news: Link) -> None:
        kind, channel, what = news.read()
        watch = next((watch for watch in self._watches if watch.channel == channel), None)
        if kind == b"subscribe":
            self._subscribed.add(channel)
        elif watch is None or kind != b"message":
            pass
        elif what == b"revoked":
            self._read_revoked(watch)
        else:
            self.soon()
            if what != b"joined":
                watch.look_at = 0.0
                watch.ask = True

    def _read_revoked(self, watch: QueueWatch) -> None:
        key = watch.keys.revoked
        try:
            found = self.links.at(key).call(commands.scored(key, wall_ms(), "+inf"))
        except ReplyError as exc:
            self._say_refused(f"key={key}", exc)
            return
        revoked = {one.decode() for one in found}
        if revoked != watch.revoked:
            watch.revoked = revoked
            for member in self._members:
                member.revoked(watch)
