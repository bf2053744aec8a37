"""What operators ask of an app's queues, and what they do to them: the one way for the commands, and for who looks from a
program."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..app import StreamTask
from ..errors import AccessRefused, ReplyError, StreamTaskError
from ..redis import commands
from ..redis.scripts import script
from . import dead_letters, doctor
from .reader import Reader, RecordedQueue, Row
from .snapshot import ShardState, Snapshot, snapshots

PURGE_BATCH = 1000
"""Messages of a shard that one call removes."""


class Inspector:
    """Reads and changes an app's queues for operators; see the methods. Used by one thread; close it after use.

    ``app``: whose queues. Every method raises ``BrokerUnavailable`` where Redis can't be reached, or refuses the password,
    and ``StreamTaskError`` for a queue that is not recorded.
    """

    def __init__(self, app: StreamTask) -> None:
        self.app = app
        self.reader = Reader(app)

    def __enter__(self) -> Inspector:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections that this inspector has opened."""
        self.reader.links.close()

    def _one(self, queue: str) -> RecordedQueue:
        return self.reader.asked(queue)[0]

    # Status

    def queues(self) -> list[str]:
        """The names of the queues that Redis has recorded for this app, ``default`` first."""
        return self.reader.queues()

    def status(self, queue: str | None = None, interval: float = 0.5) -> dict[str, Row]:
        """What each queue holds and who works on it, by the queue's name.

        ``queue``: only this one; ``interval``: seconds between the two samples that the rates are taken from, 0 for no
        rates. Each queue has ``shards`` (rows of shard, owner, token, lag, pending, delayed, dead, length; the last is
        the shared stream), ``consumers``, ``workers`` (rows of id, host, pid, shards, ...), ``in_per_s``, ``out_per_s``
        (None without an interval), ``groups``, ``epoch``, ``backlog``. Shard rows, backlog and rates are those of the
        app's own group where it is registered, else of the first group. Raises: see the class.
        """
        queues = self.reader.asked(queue)
        before: Sequence[Snapshot | None] = [None] * len(queues)
        if interval > 0:
            before = snapshots(self.reader, queues)
            time.sleep(interval)
        after = snapshots(self.reader, queues, consumers=True)
        return {shot.queue.name: _status_row(shot, earlier) for shot, earlier in zip(after, before, strict=True)}

    def consumers(self, queue: str | None = None) -> list[Row]:
        """The consumers that Redis has registered, of all groups.

        ``queue``: only this one's. Each row has queue, shard, group, consumer, pending, alive (its lease holds), worker
        (the incarnation that holds it, or None), host, pid and stale: it is registered but its lease has expired or is
        gone. Raises: see the class.
        """
        shots = snapshots(self.reader, self.reader.asked(queue), consumers=True)
        return [{"queue": shot.queue.name, **row} for shot in shots for row in shot.consumers()]

    def full(self) -> str:
        """What is to be said where Redis' memory limit is reached, else ''; also where INFO is refused."""
        try:
            (answer,) = self.reader.ask([(self.reader.registry, commands.info("memory"))])
        except (ReplyError, AccessRefused):
            return ""
        used = next(check for check in doctor.check_memory(commands.info_fields(answer)) if check["name"] == "memory")
        if used["ok"] is not False:
            return ""
        return f"Redis is full, and takes no messages: {used['message']}. Workers drain it; see 'doctor'"

    # Dead letters

    def dead_letters(
        self, queue: str | None = None, limit: int = 50, newest_first: bool = True, task: str | None = None
    ) -> list[Row]:
        """Dead letters, in the order in which they died.

        ``queue``: only this one's; ``limit``: most to return; ``newest_first``: from the last one back; ``task``: only
        this task's. Rows: see ``dead_letter``. Raises: see the class.
        """
        return dead_letters.find(self.reader, self.reader.asked(queue), limit, newest_first, task)

    def count_dead(self, queue: str | None = None) -> dict[str, int]:
        """How many dead letters each queue has. ``queue``: only this one. Raises: see the class."""
        return dead_letters.count(self.reader, self.reader.asked(queue))

    def dead_letter(self, dead_id: str, queue: str | None = None) -> Row:
        """One dead letter by its id, ``SHARD:ENTRYID``.

        ``queue``: where it lies; None looks in all queues. The row has id, queue, shard, group, held (its lane is
        closed until it is replayed or dropped), reason, error (the message), traceback, task, task_id, key, attempts,
        crashes, appended_at, dead_at (ISO 8601), args, kwargs, headers, and fields: the raw entry, where it can't be
        decoded. Raises ``StreamTaskError`` for an id that is not there, or that several queues have; else see the class.
        """
        found = dead_letters.with_id(self.reader, self.reader.asked(queue), dead_id)
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
        return dead_letters.replay(self.reader, self._one(queue), ids, task)

    def drop(self, queue: str, ids: Sequence[str] | None = None, task: str | None = None) -> int:
        """Removes dead letters for good; a lane that one of them holds goes on behind it. Else as ``replay``."""
        return dead_letters.drop(self.reader, self._one(queue), ids, task)

    # Purge

    def purge(self, queue: str, delayed: bool = True) -> int:
        """Removes what waits in a queue, for good: entries that no group has been given, and delayed messages.

        ``delayed``: these too. Returns how many messages were removed. What a worker has been given stays and runs:
        what runs now, what waits for a retry and what was read ahead; with several groups, what one of them has been
        given. Ids stay known: a ``dedupe_id`` of a removed message can't be sent again within
        ``dedupe_ttl``, and its result stays pending. Raises: see the class.
        """
        recorded = self._one(queue)
        states = [recorded.shard(shard) for shard in recorded.shards()]
        if delayed:
            counts = self.reader.ask([(keys.delayed, commands.count_scored(keys.delayed)) for keys in states])
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
            for (keys, _, due), (entries, moved, last) in zip(left, self.reader.ask(calls), strict=True):
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
        return doctor.examine(self.reader)


# Rows


def _status_row(shot: Snapshot, before: Snapshot | None) -> Row:
    main = shot.main_group
    total = shot.totals(main)
    in_per_s: float | None = None
    out_per_s: float | None = None
    if before is not None:
        seconds = max(shot.now_ms - before.now_ms, 1) / 1000
        earlier = before.totals(main)
        # Never below zero: a flush or a restored snapshot sets the counters back.
        in_per_s = round(max(0, total.came - earlier.came) / seconds, 1)
        out_per_s = round(max(0, total.done - earlier.done) / seconds, 1)
    return {
        "queue": shot.queue.name,
        "epoch": shot.queue.shape.epoch,
        "backlog": total.backlog,
        "lag": total.lag,
        "pending": total.pending,
        "delayed": total.delayed,
        "dead": shot.dead,
        "in_per_s": in_per_s,
        "out_per_s": out_per_s,
        "shards": [_shard_row(shot, shard, state) for shard, state in shot.shards.items()],
        "consumers": shot.consumers(),
        "workers": _worker_rows(shot),
        "groups": [_group_row(shot, group) for group in shot.queue.groups],
    }


def _shard_row(shot: Snapshot, shard: int | str, state: ShardState) -> Row:
    group = state.group(shot.main_group)
    return {
        "shard": shard,
        "owner": shot.owner(group),
        "token": group.token,
        "lag": group.lag,
        "pending": group.pending,
        "delayed": state.delayed,
        "dead": state.dead,
        "length": state.length,
    }


def _group_row(shot: Snapshot, group: str) -> Row:
    total = shot.totals(group)
    return {
        "group": group,
        "lag": total.lag,
        "pending": total.pending,
        "backlog": total.backlog,
        "members": len(shot.members[group]),
    }


def _worker_rows(shot: Snapshot) -> list[Row]:
    rows = []
    for group, members in shot.members.items():
        for member, info in members.items():
            shards = [
                shard
                for shard, state in shot.shards.items()
                if shot.owner(state.groups[group]) == member or state.groups[group].leases.get(member, 0) > shot.now_ms
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
