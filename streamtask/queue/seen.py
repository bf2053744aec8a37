"""How Redis remembers which messages it has stored (``lua/include/seen.lua`` has the set of dedupe ids).

Two kinds of ids. A *produce id* guards one call against its own repetition: only the caller looks it up, so it is a page,
whose name is random, and the number of the call in it; a page is a bitmap, and an id costs one bit and its share of the
page's key. *Dedupe ids* must be found by whoever sends them: 16 bytes each, in generations of 2^bits small hashes, chosen
by the id's first bytes.
"""

from __future__ import annotations

import hashlib
import secrets
from itertools import count

from ..redis.keys import ShardKeys

PAGE = 512
"""Calls of one page."""


class Pages:
    """Produce ids of one process; threads may share it. A copy of the process (a snapshot of its machine) draws the same ones,
    and finds out when an id that it uses for the first time is known already."""

    __slots__ = ("_name", "number")

    def __init__(self, kind: str) -> None:
        self._name = f"{kind}{secrets.token_urlsafe(9)}"
        # The number of the next call. One step, so that no two threads get one number.
        self.number = count().__next__

    def name(self, page: int) -> str:
        return f"{self._name}.{page:x}"

    def take(self) -> tuple[str, int]:
        """A new id: the page's name and the number in it."""
        page, number = divmod(self.number(), PAGE)
        return self.name(page), number


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
