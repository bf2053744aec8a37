"""streamtask alone: as its shards grow, and as what waits grows."""

from __future__ import annotations

from collections.abc import Sequence

from ..bench import Bench, Contestant, Entry, Figures
from . import Workload, called, each
from .drain import drain

SHARDS = (1, 2, 4, 8, 16, 32, 64)
SHARDS_MESSAGES = 60_000
BACKLOGS = (10_000, 100_000, 1_000_000)
WINDOW = (1000, 9000)
"""From which message to which the rate is compared: the same of a short queue and of a long one."""


def shard_entries(contestants: Sequence[Contestant]) -> list[Entry]:
    return [
        Entry(one, f"{number} shard{'s' * (number > 1)}", {"shards": number})
        for one in called(contestants, "streamtask")
        for number in SHARDS
    ]


def shards(bench: Bench, entry: Entry) -> Figures:
    return drain(bench, entry, max(2000, int(SHARDS_MESSAGES * bench.scale)))


def backlog_entries(contestants: Sequence[Contestant]) -> list[Entry]:
    return [
        Entry(one, f"{backlog:,} queued", {"shards": 8})
        for one in called(contestants, "streamtask")
        for backlog in BACKLOGS
    ]


def backlog(bench: Bench, entry: Entry) -> Figures:
    n = int(entry.label.split()[0].replace(",", ""))
    first, last = WINDOW
    if bench.scale < 1:
        n, first, last = max(2000, int(n * bench.scale)), 100, 1900
    return drain(bench, entry, n, window=(first, last))


SHARDS_WORKLOAD = Workload("shards", "streamtask with more shards", shard_entries, each(shards), rounds=0.6)
BACKLOG = Workload("backlog", "streamtask with more queued", backlog_entries, each(backlog))
