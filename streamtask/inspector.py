"""What operators ask of an app's queues, and what they do to them: status, consumers, dead letters, purge, doctor.

Reading declares nothing and writes nothing. A shard is read in one MULTI block, so that its numbers fit together, and
all shards of all queues go out in one write per server.
"""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .clock import mono_s, wall_ms
from .errors import BrokerOutOfMemory, BrokerUnavailable, ConfigError, DecodeError, ReplyError, StreamTaskError
from .queue.fence import OWNER
from .redis import wire
from .redis.connection import MIN_VERSION
from .redis.keys import SHARED, QueueKeys, ShardKeys, app_queues, expiring, is_shared, lease_times
from .redis.link import Link, pack
from .redis.misplaced import WRONGTYPE, misplaced
from .redis.replies import EXHAUSTED_ADVICE
from .redis.scripts import by_sha, script
from .redis.wire import id_order
from .results import Origin
from .text import counted

if TYPE_CHECKING:
    from .app import StreamTask

Row = dict[str, Any]

BATCH = 100
"""Dead letters that one call reads, replays or drops."""

PURGE_BATCH = 1000
LAST_ID = (2**64 - 1, 2**64 - 1)
AHEAD_MS = 86_400_000
PIPELINE = 2000
"""Commands that are sent in one write."""

_MULTI, _EXEC = pack("MULTI"), pack("EXEC")


@dataclass(slots=True)
class Shape:
    """A queue as Redis has it recorded. ``groups``: the registered ones, the app's own first. ``priorities``: those beside 0
    that have a shared stream of their own (queues of the kombu transport)."""

    keys: QueueKeys
    shards: int
    epoch: int
    groups: list[str]
    priorities: list[int] = field(default_factory=list)
    cluster: bool = False

    def all_shards(self) -> list[int | str]:
        return [*range(self.shards), SHARED, *(f"{SHARED}.{priority}" for priority in self.priorities)]

    def shard(self, shard: int | str) -> ShardKeys:
        return self.keys.shard(self.epoch, shard)


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


@dataclass(slots=True)
class Snapshot:
    """A queue at one instant; ``now_ms`` on Redis' clock, ``members`` of each group: incarnation -> info."""

    name: str
    shape: Shape
    now_ms: int = 0
    shards: dict[int | str, ShardState] = field(default_factory=dict)
    members: dict[str, dict[str, Row]] = field(default_factory=dict)


class Inspector:
    """Reads and changes an app's queues for operators; see the methods. Used by one thread; close it after use.

    ``app``: whose queues. Every method raises ``BrokerUnavailable`` where Redis can't be reached, ``ConfigError`` where
    it refuses the password, and ``StreamTaskError`` for a queue that is not recorded.
    """

    def __init__(self, app: StreamTask) -> None:
        self.app = app
        self._links: dict[str, Link] = {}

    def __enter__(self) -> Inspector:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections that this inspector has opened."""
        links, self._links = self._links, {}
        for link in links.values():
            link.close()

    # Asking Redis

    def _link(self, node: str, key: str) -> Link:
        if node not in self._links:
            self._links[node] = self.app.broker.link(key)
        return self._links[node]

    def _ask(self, calls: Sequence[tuple[str, bytes]]) -> list[Any]:
        """The replies to packed commands, each with a key that says which server it is for."""
        with self._naming_keys():
            return [replies[0] for replies in self._send([(key, [packed]) for key, packed in calls])]

    def _ask_at_once(self, blocks: Sequence[tuple[str, list[bytes]]]) -> list[list[Any]]:
        """The replies to blocks of commands, each block of one slot and in one transaction. Errors of single commands,
        as of a stream that is not there, stay in the lists."""
        try:
            return [replies[-1] for replies in self._send([(key, [_MULTI, *block, _EXEC]) for key, block in blocks])]
        except BrokerOutOfMemory:
            # Above maxmemory, Redis before 8 refuses whatever is queued in a transaction.
            return self._send(blocks, raising=False)

    def _send(self, blocks: Sequence[tuple[str, list[bytes]]], raising: bool = True) -> list[list[Any]]:
        by_node: dict[str, list[int]] = {}
        for index, (key, _) in enumerate(blocks):
            by_node.setdefault(self.app.broker.node(key), []).append(index)
        answers: list[list[Any]] = [[] for _ in blocks]
        for node, indexes in by_node.items():
            link = self._link(node, blocks[indexes[0]][0])
            for chunk in _chunks(indexes, [len(blocks[i][1]) for i in indexes]):
                replies = iter(self._pipeline(link, [packed for i in chunk for packed in blocks[i][1]]))
                for i in chunk:
                    answers[i] = [next(replies) for _ in blocks[i][1]]
                    if raising:
                        for reply in answers[i]:
                            _raised(reply, blocks[i][0])
        return answers

    def _pipeline(self, link: Link, packed: list[bytes]) -> list[Any]:
        try:
            return link.pipeline(packed)
        except BaseException:
            link.close()  # a reply may be under way, and must not answer the next question
            raise

    # Queues

    def queues(self) -> list[str]:
        """The names of the queues that Redis has recorded for this app, ``default`` first."""
        key = app_queues(self.app.settings.namespace, self.app.name)
        names = [_text(name) for name in self._ask([(key, pack("SMEMBERS", key))])[0]]
        return sorted(names, key=lambda name: (name != "default", name))

    def _shapes(self, names: Sequence[str]) -> dict[str, Shape]:
        """What is recorded of each queue; queues that are not recorded are left out."""
        settings = self.app.settings
        keys = {name: QueueKeys(settings.namespace, self.app.name, name) for name in names}
        replies = self._ask([(keys[name].meta, pack("HGETALL", keys[name].meta)) for name in names])
        found = {}
        for name, reply in zip(names, replies, strict=True):
            meta = _texts(reply)
            if "epoch" in meta:
                groups = sorted(one[6:] for one in meta if one.startswith("group:"))
                groups.sort(key=lambda group: group != settings.group)
                priorities = sorted(int(one[9:]) for one in meta if one.startswith("priority:"))
                shards, epoch = int(meta.get("shards", 0)), int(meta["epoch"])
                found[name] = Shape(keys[name], shards, epoch, groups, priorities, self.app.broker.is_cluster)
        return found

    def _asked(self, queue: str | None) -> dict[str, Shape]:
        if queue is None:
            return self._shapes(self.queues())
        found = self._shapes([queue])
        if not found:
            known = self.queues()
            raise StreamTaskError(
                f"app {self.app.name!r} has no queue {queue!r} in Redis: "
                + (f"there {'are' if len(known) > 1 else 'is'} {', '.join(known)}" if known else "it has none yet")
                + ". A queue is recorded when its first message is sent or its first worker starts"
            )
        return found

    def _one(self, queue: str) -> Shape:
        return self._asked(queue)[queue]

    # Status

    def status(self, queue: str | None = None, interval: float = 0.5) -> dict[str, Row]:
        """What each queue holds and who works on it, by the queue's name.

        ``queue``: only this one; ``interval``: seconds between the two samples that the rates are taken from, 0 for no
        rates. Each queue has ``shards`` (rows of shard, owner, token, lag, pending, delayed, dead, length; the last is
        the shared stream), ``consumers``, ``workers`` (rows of id, host, pid, shards, ...), ``in_per_s``, ``out_per_s``
        (None without an interval), ``groups``, ``epoch``, ``backlog``. Shard rows, backlog and rates are those of the
        app's own group where it is registered, else of the first group. Raises: see the class.
        """
        shapes = self._asked(queue)
        before: dict[str, Snapshot] = {}
        if interval > 0:
            before = self._snapshots(shapes)
            time.sleep(interval)
        after = self._snapshots(shapes, consumers=True)
        return {name: _status_row(shot, before.get(name)) for name, shot in after.items()}

    def consumers(self, queue: str | None = None) -> list[Row]:
        """The consumers that Redis has registered, of all groups.

        ``queue``: only this one's. Each row has queue, shard, group, consumer, pending, alive (its lease holds), worker
        (the incarnation that holds it, or None), host, pid and stale: it is registered but its lease has expired or is
        gone. Raises: see the class.
        """
        shots = self._snapshots(self._asked(queue), consumers=True)
        return [{"queue": name, **row} for name, shot in shots.items() for row in _consumer_rows(shot)]

    def full(self) -> str:
        """What is to be said where Redis' memory limit is reached, else ''; also where INFO is refused."""
        key = app_queues(self.app.settings.namespace, self.app.name)
        try:
            info = _info(self._ask([(key, pack("INFO", "memory"))])[0])
        except (ReplyError, ConfigError):
            return ""
        return next(
            (
                f"Redis is full, and takes no messages: {row['message']}. Workers drain it; see 'doctor'"
                for row in _check_memory(info)
                if row["name"] == "memory" and row["ok"] is False
            ),
            "",
        )

    def _snapshots(self, shapes: dict[str, Shape], *, consumers: bool = False) -> dict[str, Snapshot]:
        blocks: list[tuple[str, list[bytes]]] = []
        for shape in shapes.values():
            blocks.append((shape.keys.meta, _pack_members(shape)))
            blocks += [
                (shape.shard(s).state, _pack_shard(shape.shard(s), s, shape, consumers)) for s in shape.all_shards()
            ]
        shots = {}
        with self._naming_keys():
            replies = iter(self._ask_at_once(blocks))
            for name, shape in shapes.items():
                shot = shots[name] = Snapshot(name, shape)
                _read_members(shot, next(replies))
                for shard in shape.all_shards():
                    shot.shards[shard] = _read_shard(shape, shard, next(replies))
        return shots

    # Dead letters

    def dead_letters(
        self, queue: str, limit: int = 50, newest_first: bool = True, task: str | None = None
    ) -> list[Row]:
        """The dead letters of a queue, in the order in which they died.

        ``limit``: most to return; ``newest_first``: from the last one back; ``task``: only this task's. Rows: see
        ``dead_letter``. Raises: see the class.
        """
        shape = self._one(queue)
        found: dict[int | str, list[Row]] = {shard: [] for shard in shape.all_shards()}
        cursors: dict[int | str, str] = dict.fromkeys(found, "+" if newest_first else "-")
        page = min(limit, BATCH) if task is None else BATCH
        while cursors and limit > 0:
            shards = list(cursors)
            calls = []
            for shard in shards:
                key = shape.shard(shard).dlq
                ends = ("XREVRANGE", key, cursors[shard], "-") if newest_first else ("XRANGE", key, cursors[shard], "+")
                calls.append((key, pack(*ends, "COUNT", page)))
            for shard, entries in zip(shards, self._ask(calls), strict=True):
                rows = [_dead_letter(self.app, queue, shard, entry_id, fields) for entry_id, fields in entries]
                found[shard] += [row for row in rows if task is None or row["task"] == task]
                if len(entries) < page or len(found[shard]) >= limit:
                    del cursors[shard]
                else:
                    cursors[shard] = "(" + entries[-1][0].decode()
        rows = [row for some in found.values() for row in some]
        rows.sort(key=lambda row: _entry_order(row["id"]), reverse=newest_first)
        return rows[:limit]

    def count_dead(self, queue: str | None = None) -> dict[str, int]:
        """How many dead letters each queue has. ``queue``: only this one. Raises: see the class."""
        counts: dict[str, int] = {}
        keys = [(name, shape.shard(s).dlq) for name, shape in self._asked(queue).items() for s in shape.all_shards()]
        for (name, _), count in zip(keys, self._ask([(key, pack("XLEN", key)) for _, key in keys]), strict=True):
            counts[name] = counts.get(name, 0) + int(count)
        return counts

    def dead_letter(self, dead_id: str, queue: str | None = None) -> Row:
        """One dead letter by its id, ``SHARD:ENTRYID``.

        ``queue``: where it lies; None looks in all queues. The row has id, queue, shard, group, held (its lane is
        closed until it is replayed or dropped), reason, error (the message), traceback, task, task_id, key, attempts,
        crashes, appended_at, dead_at (ISO 8601), args, kwargs, headers, and fields: the raw entry, where it can't be
        decoded. Raises ``StreamTaskError`` for an id that is not there, or that several queues have; else see the class.
        """
        shapes = self._asked(queue)
        found = []
        for name, shape in shapes.items():
            shard, entry_id = _split_id(dead_id)
            if shard in shape.all_shards():
                key = shape.shard(shard).dlq
                found += [
                    _dead_letter(self.app, name, shard, *entry)
                    for entry in self._ask([(key, pack("XRANGE", key, entry_id, entry_id))])[0]
                ]
        if len(found) > 1:
            raise StreamTaskError(
                f"{dead_id} is a dead letter in each of the queues {', '.join(row['queue'] for row in found)}: name one"
            )
        if not found:
            where = f"in queue {queue!r}" if queue else f"in any queue of app {self.app.name!r}"
            raise StreamTaskError(
                f"there is no dead letter {dead_id} {where}: it was replayed or dropped, or never there"
            )
        return found[0]

    def replay(self, queue: str, ids: Sequence[str] | None = None, task: str | None = None) -> int:
        """Puts dead letters back at the end of their lanes (a held one at its lane's head), ids and keys as before.
        Their results are pending again.

        ``ids``: which, None for all that are there now; ``task``: of these only this task's. Returns how many were put
        back; those no longer there don't count. Raises ``StreamTaskError`` for an id that is none; else see the class.
        """
        return self._for_dead("replay", queue, ids, task)

    def drop(self, queue: str, ids: Sequence[str] | None = None, task: str | None = None) -> int:
        """Removes dead letters for good; a lane that one of them holds goes on behind it. Else as ``replay``."""
        return self._for_dead("drop_dead", queue, ids, task)

    def _for_dead(self, name: str, queue: str, ids: Sequence[str] | None, task: str | None) -> int:
        shape = self._one(queue)
        done = 0
        for shard, entries in self._dead_batches(shape, ids):
            keys = shape.shard(shard)
            chosen = []
            ended: list[tuple[str, Origin]] = []
            for entry_id, fields in entries:
                row = _dead_letter(self.app, queue, shard, entry_id, fields)
                if task is None or row["task"] == task:
                    chosen.append((entry_id, keys.notes(row["group"])))
                    if row["task_id"] is not None:
                        ended.append(
                            (row["task_id"], (queue, str(shard), _texts(fields[:8]).get("entry", "").encode()))
                        )
            if name == "replay" and ended and self.app.results is not None:
                # Before they run again: the next end of each is none that must not be overwritten. Who dies here leaves them
                # among the dead letters, to be replayed by the next; after the other order an end could be lost for good.
                self.app.results.forget(ended)
            if chosen:
                call = script(name).pack(
                    (keys.dlq, keys.stream, keys.wake, *(notes for _, notes in chosen)),
                    tuple(entry_id for entry_id, _ in chosen),
                )
                done += int(self._ask([(keys.dlq, call)])[0])
        return done

    def _dead_batches(
        self, shape: Shape, ids: Sequence[str] | None
    ) -> Iterator[tuple[int | str, list[tuple[bytes, list[bytes]]]]]:
        """Dead letters of one shard at a time, the oldest first; without ids, those that are there at the start: what a
        replayed message leaves when it dies again is not replayed again."""
        if ids is not None:
            yield from self._dead_by_id(shape, ids)
            return
        keys = {shard: shape.shard(shard).dlq for shard in shape.all_shards()}
        newest = self._ask([(key, pack("XREVRANGE", key, "+", "-", "COUNT", 1)) for key in keys.values()])
        for (shard, key), last in zip(keys.items(), newest, strict=True):
            start = "-"
            while last:
                entries = self._ask([(key, pack("XRANGE", key, start, last[0][0], "COUNT", BATCH))])[0]
                if not entries:
                    break
                start = "(" + entries[-1][0].decode()
                yield shard, entries

    def _dead_by_id(
        self, shape: Shape, ids: Sequence[str]
    ) -> Iterator[tuple[int | str, list[tuple[bytes, list[bytes]]]]]:
        by_shard: dict[int | str, set[str]] = {}
        for dead_id in ids:
            shard, entry_id = _split_id(dead_id)
            if shard in shape.all_shards():
                by_shard.setdefault(shard, set()).add(entry_id)
        for shard, wanted in by_shard.items():
            key = shape.shard(shard).dlq
            ordered = sorted(wanted, key=lambda one: id_order(one.encode()))
            for i in range(0, len(ordered), BATCH):
                replies = self._ask([(key, pack("XRANGE", key, one, one)) for one in ordered[i : i + BATCH]])
                entries = [entry for reply in replies for entry in reply]
                if entries:
                    yield shard, entries

    # Purge

    def purge(self, queue: str, delayed: bool = True) -> int:
        """Removes what waits in a queue, for good: entries that no group has been given, and delayed messages.

        ``delayed``: these too. Returns how many messages were removed. What a worker has been given stays and runs:
        what runs now, what waits for a retry and what was read ahead; with several groups, what one of them has been
        given. Ids stay known: a ``dedupe_id`` of a removed message can't be sent again within
        ``dedupe_ttl``, and its result stays pending. Raises: see the class.
        """
        shape = self._one(queue)
        states = [shape.shard(shard) for shard in shape.all_shards()]
        if delayed:
            counts = self._ask([(keys.delayed, pack("ZCARD", keys.delayed)) for keys in states])
        else:
            counts = [0] * len(states)
        left = [(keys, b"", int(count)) for keys, count in zip(states, counts, strict=True)]
        purge = script("purge_shard")
        total = 0
        while left:
            calls = [
                (keys.state, purge.pack((keys.stream, keys.state, keys.delayed), (PURGE_BATCH, last, due)))
                for keys, last, due in left
            ]
            following = []
            for (keys, _, due), (entries, moved, last) in zip(left, self._ask(calls), strict=True):
                total += int(entries) + int(moved)
                if entries + moved >= PURGE_BATCH:
                    following.append((keys, last, max(0, due - int(moved))))
            left = following
        return total

    # Doctor

    def doctor(self) -> list[Row]:
        """Checks the server, its settings and the app's queues.

        Returns rows of name, ok (True, False, or None for a warning), message and advice ('' where all is well). An
        unreachable Redis is a failed check, and the only one. Shards without an owner and stale consumers are looked at
        twice, a lease time apart, since both come and go while workers start and stop. Raises nothing of its own.
        """
        checks: list[Row] = []
        try:
            self._check_all(checks)
        except (BrokerUnavailable, ConfigError) as exc:
            checks.append(_check("redis", False, str(exc), "nothing else can be checked before Redis answers"))
        except ReplyError as exc:
            advice = "a key of a wrong type? Its shard rests until that is mended; no other is the worse for it"
            checks.append(_check("queues", False, f"a queue can't be looked at: {exc}", advice))
        return checks

    def _check_all(self, checks: list[Row]) -> None:
        link, row = self._check_reachable()
        checks.append(row)
        checks.append(self._check_access(link))
        try:
            info = _info(link.command("INFO"))
        except (ReplyError, ConfigError) as exc:
            advice = "allow this user INFO: without it version, memory and persistence are unknown"
            checks.append(_check("server", None, f"INFO is refused: {exc}", advice))
        else:
            checks += [_check_version(info), _check_role(info), *_check_memory(info), *_check_persistence(info, link)]
        checks.append(_check_clock(link))
        checks.append(_check_scripts(link))
        checks.append(self._check_writes(link))
        checks.append(_check_id_sets(link))
        checks += self._check_queues()

    def _check_reachable(self) -> tuple[Link, Row]:
        key = app_queues(self.app.settings.namespace, self.app.name)
        link = self._link(self.app.broker.node(key), key)
        link.command("PING")
        rounds = []
        for _ in range(5):
            start = mono_s()
            link.command("PING")
            rounds.append(mono_s() - start)
        best, slow = min(rounds) * 1000, max(rounds) * 1000
        message = f"{self.app.broker.safe_url} answers in {best:.2f} ms (the slowest of 5: {slow:.2f} ms)"
        if best > 50:
            advice = "workers need a Redis nearby: every batch waits for round trips"
            return link, _check("redis", None, message, advice)
        return link, _check("redis", True, message)

    def _check_access(self, link: Link) -> Row:
        """Whether Redis does what somebody asks who has nothing but its address."""
        broker = self.app.broker
        if broker.scheme not in ("redis", "rediss", "redis+sentinel", "redis+cluster"):
            return _check("access", True, "no network: the permissions of the socket say who may connect")
        key = app_queues(self.app.settings.namespace, self.app.name)
        with closing(broker.link(key, anonymous=True)) as stranger:
            try:
                stranger.command("EXISTS", key)
            except StreamTaskError:
                return _check("access", True, "a connection without a password is refused")
            near = stranger.is_local() and _config(link, "protected-mode") == "yes"
        return _check(
            "access",
            None,
            f"{'every user of this machine' if near else 'whoever reaches Redis'} may use it: it asks for no password",
            "give it users (deploy/users.acl is a start) or requirepass, and bind it to addresses that only workers reach",
        )

    def _check_writes(self, link: Link) -> Row:
        """By a script that writes nothing, which Redis refuses as any that does (above maxmemory it allows that one)."""
        try:
            link.run("touch_queues", [expiring(self.app.settings.namespace, self.app.name)], [])
        except (BrokerUnavailable, ReplyError) as exc:
            return _check(
                "writes", False, str(exc), "until then nothing is stored and nothing runs: see docs/operations.md"
            )
        return _check("writes", True, "Redis lets scripts write")

    def _check_queues(self) -> list[Row]:
        row, names = self._check_types()
        if row["ok"] is False:
            return [row]
        shapes = self._shapes(names)
        checks = [row, self._check_shard_counts(shapes)]
        shots = self._snapshots(shapes, consumers=True)
        stale, ownerless = _stale(shots, True), _ownerless(shots)
        if stale or ownerless:
            time.sleep(self.app.settings.lease + 1)
            shots = self._snapshots(shapes, consumers=True)
            stale &= _stale(shots, True)
            ownerless &= _ownerless(shots)
        left = _stale(shots, False)
        checks.append(
            _check(
                "shard-owners",
                False,
                f"workers live, but nobody owns {_listed(ownerless)}",
                "look at the workers' logs; restart the workers of these queues if they say nothing",
            )
            if ownerless
            else _check("shard-owners", True, "every shard has an owner, where workers live")
        )
        checks.append(
            _check(
                "stale-consumers",
                False,
                f"{counted(len(stale), 'consumer')} without a live process: {_listed(stale)}",
                "live workers take over what these had within a lease time, and none did: look at the workers' logs",
            )
            if stale
            else _check(
                "stale-consumers",
                None,
                f"{counted(len(left), 'consumer')} of processes that are gone, and no worker lives: {_listed(left)}",
                "the next worker that starts takes over what these had",
            )
            if left
            else _check("stale-consumers", True, "no consumer is left over from a dead process")
        )
        checks.append(_check_groups(shots))
        checks.append(self._check_ids(shapes))
        checks.append(_check_dead(shots))
        return checks

    def _check_types(self) -> tuple[Row, list[str]]:
        """Keys that are there with another type; and the names of the queues, where they can be read."""
        app = self.app
        at_fault = self._misplaced([app_queues(app.settings.namespace, app.name)])
        names = [] if at_fault else self.queues()
        keys = {name: QueueKeys(app.settings.namespace, app.name, name) for name in names}
        at_fault += self._misplaced([one.meta for one in keys.values()])
        sound = [name for name in names if not self._misplaced([keys[name].meta])] if at_fault else names
        for shape in self._shapes(sound).values():
            for group in shape.groups or [app.settings.group]:
                asked = [
                    *shape.keys.all(group)[1:],
                    *(key for s in shape.all_shards() for key in shape.shard(s).all(group)),
                ]
                alive = shape.keys.alive(group, shape.shard(SHARED), cluster=shape.cluster)
                at_fault += self._misplaced([*asked, alive, lease_times(alive)])
        if at_fault:
            message = "; ".join(dict.fromkeys(at_fault[:20]))
            advice = (
                "remove or rename these keys, and see who may write there; their shards, or queues, rest until then"
            )
            return _check("keys", False, message, advice), names
        return _check("keys", True, "all keys are of their types"), names

    @contextmanager
    def _naming_keys(self) -> Iterator[None]:
        """Says which keys are of a wrong type, where one is: Redis' error says no more than that."""
        try:
            yield
        except ReplyError as exc:
            row = self._check_types()[0] if exc.code == WRONGTYPE else {"ok": True}
            if row["ok"] is not False:
                raise
            raise ReplyError(f"{row['message']} (remove or rename it): {exc}", exc.code) from None

    def _misplaced(self, keys: Sequence[str]) -> list[str]:
        def ask(commands: Sequence[tuple[str, bytes]]) -> list[Any]:
            return [reply for (reply,) in self._send([(key, [packed]) for key, packed in commands], raising=False)]

        return list(misplaced(keys, ask).values())

    def _check_ids(self, shapes: dict[str, Shape]) -> Row:
        """Entries whose ids their producers chose: a stream may take no more of them, or has times that are none."""
        keys = [
            key
            for shape in shapes.values()
            for one in map(shape.shard, shape.all_shards())
            for key in (one.stream, one.dlq, one.wake)
        ]
        replies = self._send([(key, [pack("XINFO", "STREAM", key)]) for key in keys], raising=False)
        full, ahead = set(), set()
        for key, (reply,) in zip(keys, replies, strict=True):
            if isinstance(reply, Exception):
                continue  # a stream that is not there
            last = id_order(dict(zip(reply[::2], reply[1::2], strict=True))[b"last-generated-id"])
            if last == LAST_ID:
                full.add(key)
            elif last[0] > wall_ms() + AHEAD_MS:
                ahead.add(key)
        if full:
            message = f"the largest id that there is was appended to {_listed(full)}: nothing more can be stored there"
            return _check("stream-ids", False, message, EXHAUSTED_ADVICE)
        if ahead:
            message = f"ids of the future were appended to {_listed(ahead)}: all that comes after has the time of these"
            return _check("stream-ids", None, message, EXHAUSTED_ADVICE)
        return _check("stream-ids", True, "all streams take messages")

    def _check_shard_counts(self, shapes: dict[str, Shape]) -> Row:
        settings = self.app.settings
        wrong = []
        for name in {*self.app.queue_names(), *settings.queue_shards}:
            configured = settings.queue_shards.get(name, settings.shards)
            if name in shapes and shapes[name].shards != configured:
                wrong.append(f"{name} has {shapes[name].shards} in Redis, the app says {configured}")
        if wrong:
            return _check(
                "shard-counts",
                False,
                "; ".join(sorted(wrong)),
                "set shards= or queue_shards= to what Redis has: until then these queues take neither messages nor workers",
            )
        if not shapes:
            return _check("shard-counts", True, "no queue is recorded yet")
        return _check("shard-counts", True, "as configured: " + ", ".join(f"{n} {s.shards}" for n, s in shapes.items()))


def _raised(reply: Any, key: str) -> Any:
    """A reply, where an error is to raise; of one that is of a key alone Redis does not say which key that is."""
    if isinstance(reply, ReplyError) and not isinstance(reply, ConfigError):
        raise ReplyError(f"{reply} (a call for {key})", reply.code)
    if isinstance(reply, Exception):
        raise reply
    return reply


# One queue's state


def _pack_members(shape: Shape) -> list[bytes]:
    block = [pack("TIME")]
    for group in shape.groups:
        block.append(pack("ZRANGE", shape.keys.members(group), 0, -1, "WITHSCORES"))
        block.append(pack("HGETALL", shape.keys.member_info(group)))
    return block


def _read_members(shot: Snapshot, replies: list[Any]) -> None:
    shot.now_ms = int(replies[0][0]) * 1000 + int(replies[0][1]) // 1000
    for i, group in enumerate(shot.shape.groups):
        infos = _texts(replies[2 + 2 * i])
        shot.members[group] = {
            member: _member(infos.get(member, ""))
            for member, expires_at in _texts(replies[1 + 2 * i]).items()
            if float(expires_at) > shot.now_ms
        }


def _pack_shard(keys: ShardKeys, shard: int | str, shape: Shape, consumers: bool) -> list[bytes]:
    block = [
        pack("XLEN", keys.stream),
        pack("ZCARD", keys.delayed),
        pack("XLEN", keys.dlq),
        pack("HGETALL", keys.state),
        pack("XINFO", "GROUPS", keys.stream),
    ]
    for group in shape.groups:
        if is_shared(shard):
            block.append(pack("ZRANGE", keys.consumers(group), 0, -1, "WITHSCORES"))
            block.append(pack("ZRANGE", shape.keys.alive(group, keys, cluster=shape.cluster), 0, -1, "WITHSCORES"))
        else:
            block.append(pack("HMGET", keys.lease(group), "owner", "token", "expires_at"))
        if consumers:
            block.append(pack("XINFO", "CONSUMERS", keys.stream, group))
    return block


def _read_shard(shape: Shape, shard: int | str, replies: list[Any]) -> ShardState:
    length, delayed, dead, raw_state, groups, *rest = replies
    for reply in (length, delayed, dead, raw_state):
        _raised(reply, shape.shard(shard).prefix)
    fields = _texts(raw_state)
    state = ShardState(int(length), int(delayed), int(dead), int(fields.get("purged", 0)))
    # An error stands for a stream or a group that is not there yet.
    infos = {} if isinstance(groups, Exception) else {row["name"]: row for row in map(_texts, groups)}
    each = iter(rest)
    with_consumers = len(rest) > len(shape.groups) * (2 if is_shared(shard) else 1)
    for name in shape.groups:
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
            times = _texts(next(each))
            group.leases = {
                member: int(float(times.get(member, 0))) for member, mark in _texts(lease).items() if mark != "0"
            }
        else:
            owner, token, expires_at = lease
            group.owner = (owner or b"").decode()
            group.token = int(token) if token else None
            group.expires_at = int(expires_at or 0)
        listed = next(each) if with_consumers else []
        if not isinstance(listed, Exception):
            group.consumers = [(row["name"], int(row["pending"])) for row in map(_texts, listed)]
    return state


def _member(text: str) -> Row:
    """What a process says of itself, as far as it can be that."""
    types = {"host": (str,), "pid": (int,), "started": (int, float), "concurrency": (int,)}
    return {name: value for name, value in _load(text).items() if type(value) in types.get(name, (type(value),))}


def _live_owner(shot: Snapshot, group: GroupState) -> str | None:
    return group.owner if group.owner and group.expires_at > shot.now_ms else None


def _main_group(shot: Snapshot) -> str | None:
    return shot.shape.groups[0] if shot.shape.groups else None


def _totals(shot: Snapshot, group: str | None) -> tuple[int, int, int, int]:
    """Of a group, over all shards: lag, pending, delayed, and how many messages have come so far, less a constant."""
    lag = pending = delayed = gone = 0
    for state in shot.shards.values():
        one = state.groups[group] if group else GroupState(lag=state.length)
        lag += one.lag
        pending += one.pending
        delayed += state.delayed
        gone += one.done + one.dead + state.purged
    return lag, pending, delayed, lag + pending + delayed + gone


def _done(shot: Snapshot, group: str | None) -> int:
    return sum(state.groups[group].done for state in shot.shards.values()) if group else 0


def _status_row(shot: Snapshot, before: Snapshot | None) -> Row:
    main = _main_group(shot)
    lag, pending, delayed, came = _totals(shot, main)
    in_per_s: float | None = None
    out_per_s: float | None = None
    if before is not None:
        seconds = max(shot.now_ms - before.now_ms, 1) / 1000
        # Never below zero: a flush or a restored snapshot sets the counters back.
        in_per_s = round(max(0, came - _totals(before, main)[3]) / seconds, 1)
        out_per_s = round(max(0, _done(shot, main) - _done(before, main)) / seconds, 1)
    return {
        "queue": shot.name,
        "epoch": shot.shape.epoch,
        "backlog": lag + pending + delayed,
        "lag": lag,
        "pending": pending,
        "delayed": delayed,
        "dead": sum(state.dead for state in shot.shards.values()),
        "in_per_s": in_per_s,
        "out_per_s": out_per_s,
        "shards": [_shard_row(shot, shard, state) for shard, state in shot.shards.items()],
        "consumers": _consumer_rows(shot),
        "workers": _worker_rows(shot),
        "groups": [_group_row(shot, group) for group in shot.shape.groups],
    }


def _shard_row(shot: Snapshot, shard: int | str, state: ShardState) -> Row:
    main = _main_group(shot)
    group = state.groups[main] if main else GroupState(lag=state.length)
    return {
        "shard": shard,
        "owner": _live_owner(shot, group),
        "token": group.token,
        "lag": group.lag,
        "pending": group.pending,
        "delayed": state.delayed,
        "dead": state.dead,
        "length": state.length,
    }


def _group_row(shot: Snapshot, group: str) -> Row:
    lag, pending, delayed, _ = _totals(shot, group)
    return {
        "group": group,
        "lag": lag,
        "pending": pending,
        "backlog": lag + pending + delayed,
        "members": len(shot.members[group]),
    }


def _consumer_rows(shot: Snapshot) -> list[Row]:
    rows = []
    for shard, state in shot.shards.items():
        for name, group in state.groups.items():
            for consumer, pending in group.consumers:
                worker = None
                if is_shared(shard):
                    if group.leases.get(consumer, 0) > shot.now_ms:
                        worker = consumer
                elif consumer == OWNER:
                    worker = _live_owner(shot, group)
                # The one name of a shard's consumer stays over its owners: given back in good order it is not stale.
                given_back = not is_shared(shard) and consumer == OWNER and not group.owner
                info = shot.members[name].get(worker or "", {})
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


def _worker_rows(shot: Snapshot) -> list[Row]:
    rows = []
    for group, members in shot.members.items():
        for member, info in members.items():
            shards = [
                shard
                for shard, state in shot.shards.items()
                if _live_owner(shot, state.groups[group]) == member
                or state.groups[group].leases.get(member, 0) > shot.now_ms
            ]
            rows.append(
                {
                    **info,
                    "id": member,
                    "host": info.get("host"),
                    "pid": info.get("pid"),
                    "group": group,
                    "shards": shards,
                }
            )
    rows.sort(key=lambda row: (row["group"], str(row["host"]), row["pid"] or 0, row["id"]))
    return rows


# One dead letter


def _dead_letter(app: StreamTask, queue: str, shard: int | str, entry_id: bytes, fields: list[bytes]) -> Row:
    # dead_letter.lua writes four fields of its own before those of the message.
    own, message = _texts(fields[:8]), wire.whole(fields[8:])
    error = _load(own.get("error", ""))

    def stored(name: str, *types: type) -> Any:
        # Whoever may write there may have written anything.
        return value if type(value := error.get(name)) in types else None

    row: Row = {
        "id": f"{shard}:{entry_id.decode()}",
        "queue": queue,
        "shard": shard,
        "group": own.get("group", ""),
        "held": own.get("held") == "1",
        "reason": stored("reason", str) or "",
        "error": stored("message", str) or "",
        "traceback": stored("traceback", str),
        "task": stored("task", str),
        "task_id": stored("id", str),
        "key": stored("key", str),
        "attempts": stored("attempts", int),
        "crashes": stored("crashes", int),
        "appended_at": _iso(stored("appended_at", int, float)),
        "dead_at": _iso(stored("dead_at", int, float)) or _iso(id_order(entry_id)[0]),
        "args": None,
        "kwargs": None,
        "headers": None,
        "fields": None,
    }
    try:
        if not message:
            raise DecodeError("the entry was gone from the stream")
        task, key, message_id, row["args"], row["kwargs"], row["headers"] = wire.decode(message, None, app.accepts)
    except DecodeError:
        row["fields"] = {_text(name): _text(value) for name, value in zip(message[::2], message[1::2], strict=False)}
        return row
    row["task"] = row["task"] or task
    row["task_id"] = row["task_id"] or wire.id_text(message_id)
    if row["key"] is None and key is not None:
        row["key"] = _text(key)
    return row


def _split_id(dead_id: str) -> tuple[int | str, str]:
    shard, _, entry_id = dead_id.partition(":")
    ms, _, seq = entry_id.partition("-")
    shared = shard == SHARED or (shard.startswith(f"{SHARED}.") and _is_number(shard[len(SHARED) + 1 :]))
    if not (shared or _is_number(shard)) or not _is_number(ms) or not _is_number(seq):
        raise StreamTaskError(f"{dead_id!r} is no id of a dead letter: one looks like 3:1795000000000-0 or shared:17-1")
    return (shard if shared else int(shard)), entry_id


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 20


def _entry_order(dead_id: str) -> tuple[tuple[int, int], str]:
    shard, _, entry_id = dead_id.partition(":")
    return id_order(entry_id.encode()), shard


# The doctor's checks


def _check(name: str, ok: bool | None, message: str, advice: str = "") -> Row:
    return {"name": name, "ok": ok, "message": message, "advice": advice}


def _check_version(info: dict[str, str]) -> Row:
    text = info.get("redis_version", "0")
    version = tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
    if version < MIN_VERSION:
        return _check("version", False, f"Redis {text} is too old", "streamtask needs 6.2 or later: upgrade the server")
    return _check("version", True, f"Redis {text}")


def _check_role(info: dict[str, str]) -> Row:
    if info.get("role") == "slave":
        return _check(
            "role",
            False,
            "this server is a read-only replica",
            "name the primary in the broker URL, or use redis+sentinel://",
        )
    return _check("role", True, "primary")


def _check_memory(info: dict[str, str]) -> list[Row]:
    policy, limit, used = info.get("maxmemory_policy", "noeviction"), _int(info, "maxmemory"), _int(info, "used_memory")
    advice = "CONFIG SET maxmemory-policy noeviction, and in redis.conf: otherwise Redis deletes streams, ids or leases"
    if policy == "noeviction":
        checks = [_check("eviction", True, "maxmemory-policy is noeviction")]
    elif limit == 0:
        checks = [
            _check("eviction", None, f"maxmemory-policy is {policy}: harmless only while there is no maxmemory", advice)
        ]
    else:
        what = "ids of messages, so that repeated ones run twice" if policy.startswith("volatile") else "whole queues"
        checks = [
            _check(
                "eviction", False, f"MESSAGES CAN BE LOST: with maxmemory-policy {policy} Redis evicts {what}", advice
            )
        ]
    evicted = _int(info, "evicted_keys")
    if evicted:
        checks.append(
            _check(
                "evicted",
                False,
                f"Redis has evicted {counted(evicted, 'key')} since its start",
                "raise maxmemory; see 'eviction'",
            )
        )
    total = limit or _int(info, "total_system_memory")
    if not total:
        return [*checks, _check("memory", True, f"{_size(used)} used")]
    message = f"{_size(used)} of {_size(total)} used ({used / total:.0%} of {'maxmemory' if limit else 'the machine'})"
    relief = "raise maxmemory, start more workers, or set max_backlog: at the limit produce calls raise QueueFull"
    if limit and used > 0.98 * limit:
        return [*checks, _check("memory", False, message, relief)]
    if used > 0.85 * total:
        return [*checks, _check("memory", None, message, relief)]
    return [*checks, _check("memory", True, message)]


def _check_persistence(info: dict[str, str], link: Link) -> list[Row]:
    checks = []
    for name, what in (
        ("aof_last_write_status", "the last write to the append-only file failed"),
        ("aof_last_bgrewrite_status", "the last rewrite of the append-only file failed"),
        ("rdb_last_bgsave_status", "the last snapshot failed"),
    ):
        if info.get(name, "ok") != "ok":
            checks.append(
                _check("persistence", False, what, "look at Redis' log: a full disk, or too little memory to fork?")
            )
    if checks:
        return checks
    if info.get("aof_enabled") != "1":
        save = _config(link, "save")
        lost = "everything" if save == "" else "what was stored since its last snapshot"
        return [
            _check(
                "persistence",
                None,
                f"appendonly is off: when Redis crashes, {lost} is lost, also messages whose produce call returned",
                "CONFIG SET appendonly yes, and in redis.conf; appendfsync everysec loses at most about a second",
            )
        ]
    fsync = _config(link, "appendfsync")
    if fsync == "no":
        return [
            _check(
                "persistence",
                None,
                "appendfsync is no: a crash of the machine loses what the kernel has not written, often 30 s",
                "CONFIG SET appendfsync everysec",
            )
        ]
    return [_check("persistence", True, f"append-only file, appendfsync {fsync or 'unknown'}")]


def _check_clock(link: Link) -> Row:
    sent = wall_ms()
    seconds, micros = link.command("TIME")
    off = (int(seconds) * 1000 + int(micros) // 1000 - (sent + wall_ms()) / 2) / 1000
    message = f"Redis' clock is {abs(off):.1f} s {'ahead of' if off > 0 else 'behind'} this machine's"
    advice = (
        "run NTP on both: eta, expires and the times in this output are off by as much (leases use Redis' clock alone)"
    )
    if abs(off) > 1:
        return _check("clock", False if abs(off) > 30 else None, message, advice)
    return _check("clock", True, f"Redis' clock and this machine's differ by {abs(off) * 1000:.0f} ms")


def _check_scripts(link: Link) -> Row:
    bad = []
    scripts = by_sha()
    for sha, one in scripts.items():
        try:
            if link.command("SCRIPT", "LOAD", one.source) != sha:
                bad.append(f"{one.name}: another digest")
        except (ReplyError, ConfigError) as exc:
            bad.append(f"{one.name}: {exc}")
    if bad:
        return _check(
            "scripts", False, "; ".join(bad), "the user needs EVALSHA and SCRIPT LOAD; is the server a Redis or Valkey?"
        )
    return _check("scripts", True, f"all {len(scripts)} scripts load")


def _check_id_sets(link: Link) -> Row:
    for name in ("hash-max-listpack-entries", "hash-max-ziplist-entries"):
        value = _config(link, name)
        if value is None:
            continue
        if value.isdigit() and int(value) < 64:
            return _check(
                "id-sets",
                None,
                f"{name} is {value}: remembered ids take several times the memory",
                f"CONFIG SET {name} 128",
            )
        return _check("id-sets", True, f"{name} is {value}")
    return _check(
        "id-sets", None, "CONFIG GET is not allowed here, so the hash settings are unknown", "at least 64 is needed"
    )


def _check_groups(shots: dict[str, Snapshot]) -> Row:
    unserved = []
    for name, shot in shots.items():
        for group in shot.shape.groups:
            lag, pending, delayed, _ = _totals(shot, group)
            if lag + pending + delayed and not shot.members[group]:
                unserved.append(f"group {group} of queue {name} ({counted(lag + pending + delayed, 'message')})")
        if not shot.shape.groups and (waiting := sum(_totals(shot, None)[:3])):
            unserved.append(f"queue {name}, where no worker has ever started ({counted(waiting, 'message')})")
    if unserved:
        return _check(
            "served",
            False,
            "nobody works on " + ", ".join(unserved),
            "start workers for them: until then these messages wait, and none is removed",
        )
    return _check("served", True, "every queue with messages has live workers")


def _check_dead(shots: dict[str, Snapshot]) -> Row:
    counts = {name: sum(state.dead for state in shot.shards.values()) for name, shot in shots.items()}
    found = [f"{count:,} in {name}" for name, count in counts.items() if count]
    if found:
        return _check(
            "dead-letters",
            None,
            "there are dead letters: " + ", ".join(found),
            "'dlq list' shows them, 'dlq replay' runs them again",
        )
    return _check("dead-letters", True, "none")


def _stale(shots: dict[str, Snapshot], served: bool) -> set[str]:
    """Consumers of dead processes, of groups that have a live one, which should have taken over from them, or have none."""
    return {
        f"{name}/{row['shard']}/{row['group']}/{row['consumer']}"
        for name, shot in shots.items()
        for row in _consumer_rows(shot)
        if row["stale"] and bool(shot.members[row["group"]]) == served
    }


def _ownerless(shots: dict[str, Snapshot]) -> set[str]:
    return {
        f"{name}/{shard}" + ("" if group == _main_group(shot) else f" (group {group})")
        for name, shot in shots.items()
        for shard, state in shot.shards.items()
        for group, one in state.groups.items()
        if not is_shared(shard) and shot.members[group] and _live_owner(shot, one) is None
    }


def _listed(names: set[str], most: int = 8) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")


def _config(link: Link, name: str) -> str | None:
    """A setting of the server; None if it has none of that name or does not tell."""
    try:
        reply = link.command("CONFIG", "GET", name)
    except (ReplyError, ConfigError):
        return None
    return _text(reply[1]) if reply else None


# Replies


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


def _texts(flat: Any) -> dict[str, str]:
    """A flat list of names and values as a dict of texts; numbers become text too."""
    texts = [_text(one) if isinstance(one, bytes) else str(one) for one in flat]
    return dict(zip(texts[::2], texts[1::2], strict=False))


def _info(raw: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in _text(raw).splitlines() if ":" in line and not line.startswith("#"))
    return {name: value for name, _, value in lines}


def _int(info: dict[str, str], name: str) -> int:
    value = info.get(name, "0")
    return int(value) if value.isdigit() else 0


def _load(text: str) -> Row:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _iso(ms: float | None) -> str | None:
    """None, too, for an instant that the calendar lacks: the id of an entry can be of any year."""
    if ms is None or not wire.FIRST_MS <= ms <= wire.LAST_MS:
        return None
    return dt.datetime.fromtimestamp(ms / 1000, dt.timezone.utc).isoformat(timespec="milliseconds")


def _size(count: float) -> str:
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        del units[0]
    return f"{count:.0f} {units[0]}" if units[0] == "B" else f"{count:.1f} {units[0]}"


def _chunks(items: list[int], sizes: list[int]) -> Iterator[list[int]]:
    chunk: list[int] = []
    held = 0
    for item, size in zip(items, sizes, strict=True):
        if chunk and held + size > PIPELINE:
            yield chunk
            chunk, held = [], 0
        chunk.append(item)
        held += size
    if chunk:
        yield chunk
