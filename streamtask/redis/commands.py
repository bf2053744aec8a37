"""Redis' commands, packed, by what they ask: what is no script is spelled here and nowhere else. And how an answer is read
whose form does not say it.

``pack_command`` of hiredis does the work, once for each call; what never changes is packed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .link import Part, Reply, pack

Name = str | bytes

# The server

TIME = pack("TIME")
PING = pack("PING")
CLIENT_ID = pack("CLIENT", "ID")


def clock_ms(answer: Sequence[bytes]) -> int:
    """Redis' clock, of the answer to ``TIME``: milliseconds since the epoch."""
    seconds, micros = answer
    return int(seconds) * 1000 + int(micros) // 1000


def info(section: str = "") -> bytes:
    """Read by ``info_fields``."""
    return pack("INFO", section) if section else pack("INFO")


def info_fields(answer: bytes) -> dict[str, str]:
    lines = answer.decode("utf-8", "backslashreplace").splitlines()
    parts = (line.partition(":") for line in lines if ":" in line and not line.startswith("#"))
    return {name: value for name, _, value in parts}


def setting(name: str) -> bytes:
    """What the server is configured with: its name and its value, or nothing."""
    return pack("CONFIG", "GET", name)


def unblock(client_id: int) -> bytes:
    """Ends another connection's wait: 1 if it was waiting."""
    return pack("CLIENT", "UNBLOCK", client_id)


# Transactions

MULTI = pack("MULTI")
EXEC = pack("EXEC")


def watch(keys: Iterable[Name]) -> bytes:
    return pack("WATCH", *keys)


# Keys of any type


def exists(key: Name) -> bytes:
    return pack("EXISTS", key)


def kind(key: Name) -> bytes:
    """Its type, ``none`` where it is not there."""
    return pack("TYPE", key)


def unlink(keys: Iterable[Name]) -> bytes:
    return pack("UNLINK", *keys)


def expire(key: Name, ms: int) -> bytes:
    return pack("PEXPIRE", key, ms)


def value(key: Name) -> bytes:
    """A string."""
    return pack("GET", key)


# Hashes


def field(key: Name, name: Name) -> bytes:
    return pack("HGET", key, name)


def fields(key: Name, *names: Name) -> bytes:
    return pack("HMGET", key, *names)


def all_fields(key: Name) -> bytes:
    """Read by ``pairs``."""
    return pack("HGETALL", key)


def field_names(key: Name) -> bytes:
    return pack("HKEYS", key)


def pairs(flat: Sequence[Any]) -> dict[Any, Any]:
    """What is answered as name, value, name, value: fields, members with their scores, what a stream says of itself."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


# Sets


def members(key: Name) -> bytes:
    return pack("SMEMBERS", key)


def is_member(key: Name, member: Name) -> bytes:
    return pack("SISMEMBER", key, member)


# Sorted sets


def ranked(key: Name, *, scores: bool = False) -> bytes:
    """All members, the lowest score first; with the scores read by ``pairs``."""
    return pack("ZRANGE", key, 0, -1, "WITHSCORES") if scores else pack("ZRANGE", key, 0, -1)


def scored(key: Name, lowest: Part, highest: Part, most: int | None = None) -> bytes:
    """Those with scores between two, ``-inf`` and ``+inf`` for no bound; the lowest ``most`` of them."""
    limit: tuple[Part, ...] = () if most is None else ("LIMIT", 0, most)
    return pack("ZRANGEBYSCORE", key, lowest, highest, *limit)


def score(key: Name, member: Name) -> bytes:
    return pack("ZSCORE", key, member)


def count_scored(key: Name) -> bytes:
    """How many members a sorted set has."""
    return pack("ZCARD", key)


def remove_scored(key: Name, member: Name) -> bytes:
    return pack("ZREM", key, member)


# Streams


def length(stream: Name) -> bytes:
    return pack("XLEN", stream)


def entries(stream: Name, first: Name = "-", last: Name = "+", most: int | None = None) -> bytes:
    """From an id to an id, the oldest first; an id after ``(`` is left out."""
    return pack("XRANGE", stream, first, last, *_at_most(most))


def newest(stream: Name, most: int | None = 1, *, last: Name = "+") -> bytes:
    """The newest first, from ``last`` back."""
    return pack("XREVRANGE", stream, last, "-", *_at_most(most))


def entry(stream: Name, entry_id: Name) -> bytes:
    """One entry, or none."""
    return pack("XRANGE", stream, entry_id, entry_id)


def _at_most(most: int | None) -> tuple[Part, ...]:
    return () if most is None else ("COUNT", most)


def first_behind(streams: Mapping[Name, Name], block_ms: int | None = None) -> bytes:
    """The first entry of each stream behind a known id; with ``block_ms`` waits for one."""
    wait: tuple[Part, ...] = () if block_ms is None else ("BLOCK", block_ms)
    return pack("XREAD", "COUNT", 1, *wait, "STREAMS", *streams, *streams.values())


def new_entries(stream: Name, group: str, consumer: Name, most: int) -> bytes:
    """Gives a consumer entries that no other of its group was given. Read by ``given``."""
    return pack("XREADGROUP", "GROUP", group, consumer, "COUNT", most, "STREAMS", stream, ">")


def given(answer: Reply) -> Any:
    """The entries in the answer to ``new_entries``."""
    return answer[0][1] if answer else []


def pending(stream: Name, group: str, first: Name = "-", most: int = 1) -> bytes:
    """Entries that a group was given and has not acknowledged: id, consumer, milliseconds, how often."""
    return pack("XPENDING", stream, group, first, "+", most)


def count_pending(stream: Name, group: str) -> bytes:
    """The answer begins with how many there are."""
    return pack("XPENDING", stream, group)


def stream_info(stream: Name) -> bytes:
    """Read by ``pairs``; an error where there is no stream."""
    return pack("XINFO", "STREAM", stream)


def group_infos(stream: Name) -> bytes:
    """Each is read by ``pairs``; an error where there is no stream."""
    return pack("XINFO", "GROUPS", stream)


def consumer_infos(stream: Name, group: str) -> bytes:
    """Each is read by ``pairs``; an error where there is no such group."""
    return pack("XINFO", "CONSUMERS", stream, group)


# News


def publish(channel: Name, what: Name) -> bytes:
    return pack("PUBLISH", channel, what)


def subscribe(channels: Iterable[Name]) -> bytes:
    return pack("SUBSCRIBE", *channels)


def unsubscribe(channels: Iterable[Name]) -> bytes:
    return pack("UNSUBSCRIBE", *channels)


def subscribe_patterns(patterns: Iterable[Name]) -> bytes:
    return pack("PSUBSCRIBE", *patterns)


def unsubscribe_patterns(patterns: Iterable[Name]) -> bytes:
    return pack("PUNSUBSCRIBE", *patterns)
