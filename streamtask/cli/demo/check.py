"""What the demo says at its end, computed from what was sent and what the bodies wrote down. Standard library only."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

NO_KEY = 0


@dataclass(slots=True)
class Sent:
    """The messages by their number, which counts from 0 in the order of the produce calls."""

    keys: array[int] = field(default_factory=lambda: array("Q"))
    contents: array[int] = field(default_factory=lambda: array("I"))
    shards: array[int] = field(default_factory=lambda: array("H"))

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, key: int, content: int, shard: int) -> int:
        """Notes a message before it is sent; answers its number."""
        self.keys.append(key)
        self.contents.append(content)
        self.shards.append(shard)
        return len(self.keys) - 1


@dataclass(frozen=True, slots=True, order=True)
class Start:
    """A body that started; times in ns on one clock."""

    at: int
    n: int
    content: int
    key: int
    produced: int


@dataclass(slots=True)
class Verdict:
    """``run``: messages that started at least once; ``lost``: those that never did as they were sent; ``run_twice``:
    starts beyond the first; ``out_of_order``: starts that break the order of their key."""

    run: int = 0
    lost: int = 0
    out_of_order: int = 0
    run_twice: int = 0

    @property
    def good(self) -> bool:
        return self.lost == 0 and self.out_of_order == 0


def check(sent: Sent, starts: Iterable[Start], kills: Sequence[int] = ()) -> Verdict:
    """Compares the starts with what was sent. ``kills``: when processes were killed.

    A start counts only with the key and the content that were sent under its number.
    """
    verdict = Verdict()
    ranks = _ranks(sent)
    lanes: dict[int, list[tuple[int, int]]] = {}
    seen = bytearray(len(sent))
    for start in sorted(starts):
        n = start.n
        if n >= len(sent) or sent.keys[n] != start.key or sent.contents[n] != start.content:
            continue
        if start.key == NO_KEY:
            verdict.run_twice += seen[n]
        else:
            lanes.setdefault(start.key, []).append((start.at, ranks[n]))
        seen[n] = 1
    for lane in lanes.values():
        disorder, twice = check_lane(lane, kills)
        verdict.out_of_order += disorder
        verdict.run_twice += twice
    verdict.run = sum(seen)
    verdict.lost = len(sent) - verdict.run
    return verdict


def _ranks(sent: Sent) -> array[int]:
    """The place of each message among those of its key."""
    counts: dict[int, int] = {}
    ranks = array("I")
    for key in sent.keys:
        rank = counts.get(key, 0)
        counts[key] = rank + 1
        ranks.append(rank)
    return ranks


def check_lane(starts: Sequence[tuple[int, int]], kills: Sequence[int] = ()) -> tuple[int, int]:
    """Starts of one key as (time, rank) in the order of time; answers how many are out of order and how many repeat.

    A repeat is in order where a kill explains it: after each kill one run of repeats may come, each of them the next
    message in line, up to the last one that had started.
    """
    started: set[int] = set()
    last = -1
    following: int | None = None  # what a run of repeats has to go on with
    runs = disorder = twice = 0
    for at, rank in starts:
        if rank not in started:
            if following is not None or rank < last:
                disorder += 1
            following = None
            started.add(rank)
            last = max(last, rank)
            continue
        twice += 1
        if rank != following:
            runs += 1
            if runs > sum(kill < at for kill in kills):
                disorder += 1
        following = _next(started, rank) if rank < last else None
    return disorder + (following is not None), twice


def _next(started: set[int], rank: int) -> int:
    rank += 1
    while rank not in started:
        rank += 1
    return rank


def percentile(values: Sequence[int], share: float) -> float | None:
    """The nearest-rank percentile of sorted values; None without any."""
    if not values:
        return None
    return values[max(0, math.ceil(len(values) * share) - 1)]


def first_starts(starts: Iterable[Start]) -> dict[int, Start]:
    """The first start of each message, by its number."""
    found: dict[int, Start] = {}
    for start in starts:
        if start.n not in found or start.at < found[start.n].at:
            found[start.n] = start
    return found
