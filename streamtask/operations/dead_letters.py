"""Dead letters: found, read, replayed and dropped. An operator's id of one is ``SHARD:ENTRYID``."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from typing import Any

from ..app import StreamTask
from ..errors import DecodeError, StreamTaskError
from ..redis import commands, wire
from ..redis.keys import SHARED
from ..redis.scripts import script
from ..redis.wire import id_order
from ..results import Origin
from .reader import Reader, RecordedQueue, Row, as_object, as_text, as_texts

BATCH = 100
"""Dead letters that one call reads, replays or drops."""

OWN_FIELDS = 4
"""What ``dead_letter.lua`` writes of its own before the fields of the message."""

Entry = tuple[bytes, list[bytes]]
"""An entry's id and its fields."""


# Reading


def find(
    reader: Reader, queues: Sequence[RecordedQueue], limit: int, newest_first: bool, task: str | None
) -> list[Row]:
    """See ``Inspector.dead_letters``."""
    found: list[Row] = []
    page = min(limit, BATCH) if task is None else BATCH
    # Of each list: its queue, its shard, where its next page begins, and how many were found in it.
    lists = [(queue, shard, "+" if newest_first else "-", 0) for queue in queues for shard in queue.shards()]
    while lists and limit > 0:
        calls = []
        for queue, shard, start, _ in lists:
            key = queue.shard(shard).dlq
            asked = commands.newest(key, page, last=start) if newest_first else commands.entries(key, start, most=page)
            calls.append((key, asked))
        going_on = []
        for (queue, shard, _, had), entries in zip(lists, reader.ask(calls), strict=True):
            rows = [row_of(reader.app, queue.name, shard, entry) for entry in entries]
            rows = [row for row in rows if task is None or row["task"] == task]
            found += rows
            if len(entries) == page and had + len(rows) < limit:
                going_on.append((queue, shard, _behind(entries), had + len(rows)))
        lists = going_on
    found.sort(key=lambda row: _order(row["id"]), reverse=newest_first)
    return found[:limit]


def count(reader: Reader, queues: Sequence[RecordedQueue]) -> dict[str, int]:
    """How many there are in each queue."""
    counts: dict[str, int] = {}
    keys = [(queue.name, queue.shard(shard).dlq) for queue in queues for shard in queue.shards()]
    for (name, _), length in zip(keys, reader.ask([(key, commands.length(key)) for _, key in keys]), strict=True):
        counts[name] = counts.get(name, 0) + int(length)
    return counts


def with_id(reader: Reader, queues: Sequence[RecordedQueue], dead_id: str) -> list[Row]:
    """The dead letters of that id: each of the queues may have one. Raises ``StreamTaskError`` for what is no id."""
    shard, entry_id = _split_id(dead_id)
    having = [queue for queue in queues if shard in queue.shards()]
    keys = [queue.shard(shard).dlq for queue in having]
    replies = reader.ask([(key, commands.entry(key, entry_id)) for key in keys])
    return [
        row_of(reader.app, queue.name, shard, entry)
        for queue, entries in zip(having, replies, strict=True)
        for entry in entries
    ]


def row_of(app: StreamTask, queue: str, shard: int | str, entry: Entry) -> Row:
    """A dead letter as ``Inspector.dead_letter`` says it."""
    entry_id, fields = entry
    own, message = _own_fields(fields), wire.whole(fields[2 * OWN_FIELDS :])
    error = as_object(own.get("error", ""))

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
        row["fields"] = {
            as_text(name): as_text(value) for name, value in zip(message[::2], message[1::2], strict=False)
        }
        return row
    row["task"] = row["task"] or task
    row["task_id"] = row["task_id"] or wire.id_text(message_id)
    if row["key"] is None and key is not None:
        row["key"] = as_text(key)
    return row


# Replaying and dropping


def replay(reader: Reader, queue: RecordedQueue, ids: Sequence[str] | None, task: str | None) -> int:
    """See ``Inspector.replay``."""
    results = reader.app.results
    done = 0
    for shard, entries, rows in _chosen(reader, queue, ids, task):
        ended: list[tuple[str, Origin]] = [
            (row["task_id"], (queue.name, str(shard), _own_fields(fields).get("entry", "").encode()))
            for (_, fields), row in zip(entries, rows, strict=True)
            if row["task_id"] is not None
        ]
        if ended and results is not None:
            # Before they run again: the next end of each is none that must not be overwritten. Who dies here leaves them
            # among the dead letters, to be replayed by the next; after the other order an end could be lost for good.
            results.forget(ended)
        done += _run(reader, "replay", queue, shard, rows, entries)
    return done


def drop(reader: Reader, queue: RecordedQueue, ids: Sequence[str] | None, task: str | None) -> int:
    """See ``Inspector.drop``."""
    return sum(
        _run(reader, "drop_dead", queue, shard, rows, entries)
        for shard, entries, rows in _chosen(reader, queue, ids, task)
    )


def _run(
    reader: Reader, name: str, queue: RecordedQueue, shard: int | str, rows: list[Row], entries: list[Entry]
) -> int:
    keys = queue.shard(shard)
    notes = [keys.notes(row["group"]) for row in rows]
    call = script(name).pack((keys.dlq, keys.stream, keys.wake, *notes), tuple(entry_id for entry_id, _ in entries))
    return int(reader.ask([(keys.dlq, call)])[0])


def _chosen(
    reader: Reader, queue: RecordedQueue, ids: Sequence[str] | None, task: str | None
) -> Iterator[tuple[int | str, list[Entry], list[Row]]]:
    """Those that are meant, as entries and as rows, some of one shard at a time."""
    batches = _all_now(reader, queue) if ids is None else _by_id(reader, queue, ids)
    for shard, entries in batches:
        rows = [row_of(reader.app, queue.name, shard, entry) for entry in entries]
        meant = [i for i, row in enumerate(rows) if task is None or row["task"] == task]
        if meant:
            yield shard, [entries[i] for i in meant], [rows[i] for i in meant]


def _all_now(reader: Reader, queue: RecordedQueue) -> Iterator[tuple[int | str, list[Entry]]]:
    """Those that are there at the start, the oldest of a shard first: what a replayed message leaves when it dies again is
    not replayed again."""
    keys = {shard: queue.shard(shard).dlq for shard in queue.shards()}
    newest = reader.ask([(key, commands.newest(key)) for key in keys.values()])
    for (shard, key), last in zip(keys.items(), newest, strict=True):
        start = "-"
        while last:
            entries = reader.ask([(key, commands.entries(key, start, last[0][0], BATCH))])[0]
            if not entries:
                break
            start = _behind(entries)
            yield shard, entries


def _by_id(reader: Reader, queue: RecordedQueue, ids: Sequence[str]) -> Iterator[tuple[int | str, list[Entry]]]:
    by_shard: dict[int | str, set[str]] = {}
    for dead_id in ids:
        shard, entry_id = _split_id(dead_id)
        if shard in queue.shards():
            by_shard.setdefault(shard, set()).add(entry_id)
    for shard, wanted in by_shard.items():
        key = queue.shard(shard).dlq
        ordered = sorted(wanted, key=lambda one: id_order(one.encode()))
        for i in range(0, len(ordered), BATCH):
            replies = reader.ask([(key, commands.entry(key, one)) for one in ordered[i : i + BATCH]])
            entries = [entry for reply in replies for entry in reply]
            if entries:
                yield shard, entries


# Ids and fields


def _own_fields(fields: list[bytes]) -> dict[str, str]:
    return as_texts(fields[: 2 * OWN_FIELDS])


def _behind(entries: list[Entry]) -> str:
    """Where the next page begins."""
    return "(" + entries[-1][0].decode()


def _split_id(dead_id: str) -> tuple[int | str, str]:
    shard, _, entry_id = dead_id.partition(":")
    ms, _, seq = entry_id.partition("-")
    shared = shard == SHARED or (shard.startswith(f"{SHARED}.") and _is_number(shard[len(SHARED) + 1 :]))
    if not (shared or _is_number(shard)) or not _is_number(ms) or not _is_number(seq):
        raise StreamTaskError(f"{dead_id!r} is no id of a dead letter: one looks like 3:1795000000000-0 or shared:17-1")
    return (shard if shared else int(shard)), entry_id


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 20


def _order(dead_id: str) -> tuple[tuple[int, int], str]:
    shard, _, entry_id = dead_id.partition(":")
    return id_order(entry_id.encode()), shard


def _iso(ms: float | None) -> str | None:
    """None, too, for an instant that the calendar lacks: the id of an entry can be of any year."""
    if ms is None or not wire.FIRST_MS <= ms <= wire.LAST_MS:
        return None
    return dt.datetime.fromtimestamp(ms / 1000, dt.timezone.utc).isoformat(timespec="milliseconds")
