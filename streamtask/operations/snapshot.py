"""Queues at one instant: who works on them, and what each shard holds. All that shows numbers takes them from here.

A shard is read in one MULTI block, so that its numbers fit together, and all shards of all queues go out in one write per
server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..queue.fence import OWNER
from ..redis import commands
from ..redis.keys import is_shared
from .reader import Reader, RecordedQueue, Row, as_object, as_texts, raised


@dataclass(slots=True)
class GroupState:
    """One group in one shard. ``owner``: '' where the lease was given back or never taken; times are Redis', in ms."""

    lag: int = 0
    pending: int = 0
    done: int = 0
    dead: int = 0
    owner: str = ""
    token: int | None = None
    expires_at: int = 0
    consumers: list[tuple[str, int]] = field(default_factory=list)
    leases: dict[str, int] = field(default_factory=dict)
    """Shared streams: the incarnations with a lease, by its expiry."""


@dataclass(slots=True)
class ShardState:
    length: int = 0
    delayed: int = 0
    dead: int = 0
    purged: int = 0
    groups: dict[str, GroupState] = field(default_factory=dict)

    def group(self, name: str | None) -> GroupState:
        """What a group has of it; without a group, all that lies there waits."""
        return self.groups[name] if name else GroupState(lag=self.length)


@dataclass(slots=True)
class Totals:
    """Of one group, over all shards. ``came``: how many messages have come so far, less a constant."""

    lag: int = 0
    pending: int = 0
    delayed: int = 0
    done: int = 0
    came: int = 0

    @property
    def backlog(self) -> int:
        return self.lag + self.pending + self.delayed


@dataclass(slots=True)
class Snapshot:
    """A queue at one instant; ``now_ms`` on Redis' clock, ``members`` of each group: incarnation -> info."""

    queue: RecordedQueue
    now_ms: int = 0
    shards: dict[int | str, ShardState] = field(default_factory=dict)
    members: dict[str, dict[str, Row]] = field(default_factory=dict)

    @property
    def main_group(self) -> str | None:
        """The one whose numbers stand for the queue: the app's own where it is registered."""
        return self.queue.groups[0] if self.queue.groups else None

    @property
    def dead(self) -> int:
        return sum(state.dead for state in self.shards.values())

    def owner(self, group: GroupState) -> str | None:
        """Who has the shard's lease, if it has not expired."""
        return group.owner if group.owner and group.expires_at > self.now_ms else None

    def totals(self, group: str | None) -> Totals:
        found = Totals()
        gone = 0
        for state in self.shards.values():
            one = state.group(group)
            found.lag += one.lag
            found.pending += one.pending
            found.delayed += state.delayed
            found.done += one.done
            gone += one.done + one.dead + state.purged
        found.came = found.backlog + gone
        return found

    def consumers(self) -> list[Row]:
        """The consumers that Redis has registered, where they were asked for; see ``Inspector.consumers``."""
        rows = []
        for shard, state in self.shards.items():
            for name, group in state.groups.items():
                for consumer, pending in group.consumers:
                    worker = None
                    if is_shared(shard):
                        if group.leases.get(consumer, 0) > self.now_ms:
                            worker = consumer
                    elif consumer == OWNER:
                        worker = self.owner(group)
                    # The one name of a shard's consumer stays over its owners: given back in good order it is not stale.
                    given_back = not is_shared(shard) and consumer == OWNER and not group.owner
                    info = self.members[name].get(worker or "", {})
                    rows.append(
                        {
                            "shard": shard,
                            "group": name,
                            "consumer": consumer,
                            "pending": pending,
                            "alive": worker is not None,
                            "stale": worker is None and not given_back,
                            "worker": worker,
                            "host": info.get("host"),
                            "pid": info.get("pid"),
                        }
                    )
        return rows


def snapshots(reader: Reader, queues: Sequence[RecordedQueue], *, consumers: bool = False) -> list[Snapshot]:
    """A snapshot of each queue. ``consumers``: with those that Redis has registered."""
    blocks: list[tuple[str, list[bytes]]] = []
    for queue in queues:
        blocks.append((queue.keys.meta, _pack_members(queue)))
        blocks += [(queue.shard(shard).state, _pack_shard(queue, shard, consumers)) for shard in queue.shards()]
    shots = [Snapshot(queue) for queue in queues]
    with reader.naming_keys():
        replies = iter(reader.ask_at_once(blocks))
        for shot in shots:
            _read_members(shot, next(replies))
            for shard in shot.queue.shards():
                shot.shards[shard] = _read_shard(shot.queue, shard, next(replies))
    return shots


def _pack_members(queue: RecordedQueue) -> list[bytes]:
    block = [commands.TIME]
    for group in queue.groups:
        block.append(commands.ranked(queue.keys.members(group), scores=True))
        block.append(commands.all_fields(queue.keys.member_info(group)))
    return block


def _read_members(shot: Snapshot, replies: list[Any]) -> None:
    shot.now_ms = commands.clock_ms(replies[0])
    for i, group in enumerate(shot.queue.groups):
        infos = as_texts(replies[2 + 2 * i])
        shot.members[group] = {
            member: _member(infos.get(member, ""))
            for member, expires_at in as_texts(replies[1 + 2 * i]).items()
            if float(expires_at) > shot.now_ms
        }


def _member(text: str) -> Row:
    """What a process says of itself, as far as it can be that."""
    types = {"host": (str,), "pid": (int,), "started": (int, float), "concurrency": (int,)}
    return {name: value for name, value in as_object(text).items() if type(value) in types.get(name, (type(value),))}


def _pack_shard(queue: RecordedQueue, shard: int | str, consumers: bool) -> list[bytes]:
    keys = queue.shard(shard)
    block = [
        commands.length(keys.stream),
        commands.count_scored(keys.delayed),
        commands.length(keys.dlq),
        commands.all_fields(keys.state),
        commands.group_infos(keys.stream),
    ]
    for group in queue.groups:
        if is_shared(shard):
            block.append(commands.ranked(keys.consumers(group), scores=True))
            block.append(commands.ranked(queue.alive(group, shard), scores=True))
        else:
            block.append(commands.fields(keys.lease(group), "owner", "token", "expires_at"))
        if consumers:
            block.append(commands.consumer_infos(keys.stream, group))
    return block


def _read_shard(queue: RecordedQueue, shard: int | str, replies: list[Any]) -> ShardState:
    length, delayed, dead, raw_state, groups, *rest = replies
    for reply in (length, delayed, dead, raw_state):
        raised(reply, queue.shard(shard).prefix)
    fields = as_texts(raw_state)
    state = ShardState(int(length), int(delayed), int(dead), int(fields.get("purged", 0)))
    # An error stands for a stream or a group that is not there yet.
    infos = {} if isinstance(groups, Exception) else {row["name"]: row for row in map(as_texts, groups)}
    each = iter(rest)
    with_consumers = len(rest) > len(queue.groups) * (2 if is_shared(shard) else 1)
    for name in queue.groups:
        info = infos.get(name, {})
        group = state.groups[name] = GroupState(
            pending=int(info.get("pending", 0)),
            done=int(fields.get(f"done:{name}", 0)),
            dead=int(fields.get(f"dead:{name}", 0)),
        )
        # What the group has finished is gone, or kept for another group: what is not pending waits.
        group.lag = max(0, state.length - group.pending - int(fields.get(f"kept:{name}", 0)))
        lease = next(each)
        if is_shared(shard):
            times = as_texts(next(each))
            group.leases = {
                member: int(float(times.get(member, 0))) for member, mark in as_texts(lease).items() if mark != "0"
            }
        else:
            owner, token, expires_at = lease
            group.owner = (owner or b"").decode()
            group.token = int(token) if token else None
            group.expires_at = int(expires_at or 0)
        listed = next(each) if with_consumers else []
        if not isinstance(listed, Exception):
            group.consumers = [(row["name"], int(row["pending"])) for row in map(as_texts, listed)]
    return state
