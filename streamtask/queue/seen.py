"""Which small hash an id lies in (``lua/include/seen.lua`` has the set itself).

Two kinds of ids are remembered. *Produce ids* guard one call against its own repetition: only the caller looks them up,
so it fills pages of 64 ids one after the other and names the same page again when it repeats the call. *Dedupe ids* must
be found by whoever sends them: they lie in generations of 2^bits small hashes, chosen by the id's first bytes.
"""

from __future__ import annotations

import hashlib
import os
from itertools import count

from ..redis.keys import ShardKeys

PAGE = 64


class Pages:
    """Pages of produce ids for one shard and one process. Threads may share it: a page then holds a few more."""

    __slots__ = ("_keys", "_left", "_name", "_numbers", "page")

    def __init__(self, keys: ShardKeys) -> None:
        self._keys = keys
        self._name = os.urandom(6).hex()
        self._numbers = count()
        self._left = 0
        self.page = ""

    def take(self) -> bool:
        """Makes room for one id; True if ``page`` is now another."""
        self._left -= 1
        if self._left > 0:
            return False
        # The page first: another thread that sees room left must find where.
        self.page = self._keys.seen(f"p{self._name}.{next(self._numbers):x}")
        self._left = PAGE
        return True


def dedupe_hash(queue: str, key: bytes | None, dedupe_id: str) -> bytes:
    """16 bytes for a dedupe id, which is unique per queue and shard key: BLAKE2b-128, keyed by nothing."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(b"%d:" % len(queue.encode()) + queue.encode())
    digest.update(b"-" if key is None else b"%d:" % len(key) + key)
    digest.update(dedupe_id.encode("utf-8", "surrogatepass"))
    return digest.digest()


def generation_keys(keys: ShardKeys, kind: str, layout: str, id16: bytes) -> list[str]:
    """The small hash of an id in each generation of a layout, the newest first."""
    slot = int.from_bytes(id16[:2], "big")
    found = []
    for generation in layout.split(";"):
        if generation:
            number, bits, _ = generation.split(" ", 2)
            found.append(keys.seen(f"{kind}{number}.{slot & ((1 << int(bits)) - 1):x}"))
    return found
