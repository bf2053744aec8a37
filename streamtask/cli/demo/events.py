"""The lines of a JSON Lines file, gzipped or not, with their shard keys; one line in memory at a time."""

from __future__ import annotations

import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ShardKeyError, StreamTaskError
from ...sharding import canonical
from ...text import printable
from .app import MAX_MESSAGE_BYTES

Key = str | int | None
MAX_LINE_BYTES = MAX_MESSAGE_BYTES - 4096
GZIP_MAGIC = b"\x1f\x8b"


class EventsError(StreamTaskError):
    """The file can't be read, or a line of it can't be sent."""


class _BadLineError(Exception):
    """What is wrong with a line; who reads knows its number."""


@dataclass(slots=True)
class Events:
    """A file whose non-empty lines are messages. ``key_field``: where a line has its key, as ``key`` or ``payload.user.id``;
    a path goes on into text that holds JSON. A line whose key is null is sent without one."""

    path: Path
    key_field: str
    messages: int = 0
    without_key: int = 0
    keys: set[int] = field(default_factory=set)

    def scan(self) -> None:
        """Reads all lines once and counts them. Raises ``EventsError`` with the line's number."""
        for key, _ in self._lines():
            self.messages += 1
            if key is None:
                self.without_key += 1
            else:
                self.keys.add(hash(canonical(key)))
        if not self.messages:
            raise EventsError(f"{self.path} has no line to send")

    def __iter__(self) -> Iterator[tuple[Key, bytes]]:
        """The keys and lines that ``scan`` has counted, also of a file that has grown since."""
        count = 0
        for pair in self._lines():
            if count == self.messages:
                return
            count += 1
            yield pair
        if count < self.messages:
            raise EventsError(f"{self.path} was changed while it was read: {self.messages - count} lines are gone")

    def _lines(self) -> Iterator[tuple[Key, bytes]]:
        number = 0
        path = self.key_field.split(".")
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                raise EventsError(f"{self.path} must be a regular file: it is read twice")
            with open(self.path, "rb") as probe:
                zipped = probe.read(2) == GZIP_MAGIC
            with gzip.open(self.path) if zipped else open(self.path, "rb") as file:
                while line := file.readline(MAX_LINE_BYTES + 2):
                    number += 1
                    line = line.rstrip(b"\r\n")
                    if len(line) > MAX_LINE_BYTES:
                        raise _BadLineError(f"longer than {MAX_LINE_BYTES:,} bytes")
                    if line.strip():
                        yield self._key(line, path), line
        except _BadLineError as exc:
            raise EventsError(f"{self.path}, line {number}: {exc}") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
            raise EventsError(f"{self.path} can't be unpacked after line {number}: {exc}") from None
        except OSError as exc:
            raise EventsError(f"{self.path} can't be read: {exc.strerror or exc}") from None

    def _key(self, line: bytes, path: list[str]) -> Key:
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise _BadLineError(f"no JSON ({printable(str(exc))})") from None
        if not isinstance(value, dict):
            raise _BadLineError("no JSON object, so it has no key field")
        for depth, name in enumerate(path):
            value = _inside(value) if depth else value
            if value is None:
                return None
            if not isinstance(value, dict) or name not in value:
                raise _BadLineError(f"no field {self.key_field!r}; name the field that holds the key with --key")
            value = value[name]
        if value is None:
            return None
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise _BadLineError(
                f"the key field {self.key_field!r} is neither text nor a whole number; name another with --key"
            )
        try:
            canonical(value)
        except (ShardKeyError, ValueError) as exc:
            raise _BadLineError(f"{printable(str(exc))}") from None
        return value


def _inside(value: Any) -> Any:
    """The value, or what its text holds: connectors put JSON into JSON."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
