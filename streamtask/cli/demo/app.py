"""The app of ``streamtask demo``. Its bodies write down their start, so that the check needs nothing of streamtask.

Each process appends fixed-size records to a file of its own, with one system call per body: what a killed process had
written is there.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
from pathlib import Path
from zlib import crc32

from ...app import ENV_URL, StreamTask
from ...sharding import canonical
from ...worker.child import bind_to_parent

QUEUE = "notifications"
ENV_JOURNAL = "STREAMTASK_DEMO_JOURNAL"
ENV_SHARDS = "STREAMTASK_DEMO_SHARDS"
ENV_PARENT = "STREAMTASK_DEMO_PARENT"
MAX_MESSAGE_BYTES = 16 << 20

RECORD = struct.Struct("<IIQqq")
"""A start: the message's number, the CRC-32 of its content, the hash of its key (0 for none), and on the monotonic
clock, which the processes of a machine share, when it was produced and when its body started (ns)."""

_journal = -1


def key_hash(key: str | int | None) -> int:
    """64 bits that stand for a shard key in the records; 0 for none."""
    if key is None:
        return 0
    return int.from_bytes(hashlib.blake2b(canonical(key), digest_size=8).digest(), "little") or 1


def content_hash(content: str | bytes) -> int:
    return crc32(content.encode() if isinstance(content, str) else content)


def _record(started: int, key: str | int | None, n: int, produced: int, content: str | bytes) -> None:
    global _journal
    if _journal < 0:
        path = Path(os.environ[ENV_JOURNAL], str(os.getpid()))
        _journal = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.write(_journal, RECORD.pack(n, content_hash(content), key_hash(key), produced, started))


def notify(user_id: int, n: int, produced: int, text: str) -> None:
    """A notification for a user; one after the other for each user."""
    _record(time.monotonic_ns(), user_id, n, produced, text)


def event(key: str | int, n: int, produced: int, line: bytes) -> None:
    """A line of the events file; one after the other for each key."""
    _record(time.monotonic_ns(), key, n, produced, line)


def event_without_key(n: int, produced: int, line: bytes) -> None:
    """A line whose key is null: any process, any order."""
    _record(time.monotonic_ns(), None, n, produced, line)


def build(url: str | None, shards: int) -> StreamTask:
    """The app at a broker, with every other setting at its default."""
    made = StreamTask("demo", broker=url, shards=shards, max_message_bytes=MAX_MESSAGE_BYTES)
    made.task(name="notify", shard_key="user_id", queue=QUEUE)(notify)
    made.task(name="event", shard_key="key", queue=QUEUE)(event)
    made.task(name="event_without_key", queue=QUEUE)(event_without_key)
    return made


if ENV_PARENT in os.environ:
    # The supervisor ends with the demo, also when that is killed with -9; its processes, which are not told, end with it.
    bind_to_parent(int(os.environ.pop(ENV_PARENT)))

app = build(os.environ.get(ENV_URL), int(os.environ.get(ENV_SHARDS, "8")))
