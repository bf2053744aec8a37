"""Which member should own which shard: a pure function that every process computes alike.

Counts differ by at most one, and a shard moves only if it must. With M members and N shards each member gets N // M and
N % M of them one more. Who already owns more is first in line for the larger share, so that a join or leave moves the
fewest shards (Kafka's sticky assignor has the same aim; this is the greedy form for equal members).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from zlib import crc32


def assign(shards: Sequence[int], members: Sequence[str], owners: Mapping[int, str], salt: str = "") -> dict[int, str]:
    """Maps every shard to a member; empty without members.

    ``owners`` says who owns a shard now; owners that are no members don't count. ``salt`` (the queue's name) lets the
    larger shares of different queues fall on different members where nothing else decides.
    """
    if not members:
        return {}
    live = set(members)
    held: dict[str, list[int]] = {member: [] for member in members}
    free: list[int] = []
    for shard in sorted(shards):
        owner = owners.get(shard)
        if owner in live:
            held[owner].append(shard)
        else:
            free.append(shard)
    base, extra = divmod(len(shards), len(members))
    order = sorted(members, key=lambda m: (-len(held[m]), crc32((salt + m).encode()), m))
    quota = {member: base + (1 if rank < extra else 0) for rank, member in enumerate(order)}
    result: dict[int, str] = {}
    for member in order:
        for shard in held[member][: quota[member]]:
            result[shard] = member
        free += held[member][quota[member] :]
    for member in order:
        room = quota[member] - min(len(held[member]), quota[member])
        for _ in range(room):
            result[free.pop(0)] = member
    return result
