"""From a shard key to a shard: ``crc32(canonical(key)) mod N``.

The canonical form is part of the wire contract (``docs/protocol.md``, ``docs/vectors.json``): two keys with equal
canonical bytes are one key, in whatever language they are produced. Standard library only.
"""

from __future__ import annotations

import uuid
from zlib import crc32

from .errors import ShardKeyError


def canonical(key: object) -> bytes:
    """The bytes that stand for a shard key.

    str: its UTF-8; int: decimal ASCII; UUID: lower-case, hyphenated; bytes as they are. Subclasses (``IntEnum``)
    count by value. ``42`` and ``"42"`` are one key.

    Raises ``ShardKeyError`` for None, bool and any other type, for an empty key, and for text that is not valid Unicode.
    """
    if type(key) is int:
        return b"%d" % key
    if type(key) is str:
        text = key
    elif isinstance(key, bool) or key is None:
        raise ShardKeyError(
            f"the shard key is {key!r}: it must be a str, int, UUID or bytes. Give the task call a value whose order "
            "must hold, or declare the task without shard_key if none must"
        )
    elif isinstance(key, int):
        return b"%d" % int(key)
    elif isinstance(key, str):
        text = str.__str__(key)
    elif isinstance(key, bytes | bytearray | memoryview):
        raw = bytes(key)
        if not raw:
            raise ShardKeyError("the shard key is empty: give it a value whose order must hold")
        return raw
    elif isinstance(key, uuid.UUID):
        return str(key).encode()
    else:
        raise ShardKeyError(
            f"the shard key is of type {type(key).__name__}: it must be a str, int, UUID or bytes. "
            "Use a callable as shard_key to make one of these from the arguments"
        )
    try:
        raw = text.encode()
    except UnicodeEncodeError as exc:
        raise ShardKeyError(f"the shard key {text!r} is not valid Unicode text: {exc.reason}") from None
    if not raw:
        raise ShardKeyError("the shard key is empty: give it a value whose order must hold")
    return raw


def shard_of(canonical_key: bytes, shards: int) -> int:
    """The shard of a canonical key: CRC-32 (the zlib, PKZIP polynomial) modulo the number of shards."""
    return crc32(canonical_key) % shards
