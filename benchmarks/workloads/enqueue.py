"""Calls per second: one by one, many with one call, and fifty at once on an event loop."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from ..bench import Bench, Contestant, Entry, Figures, Producer
from . import Workload, called, everybody, failing

BLOCKS = 6
"""Each round consists of so many turns of all, so that a slow moment of the machine meets all alike."""
MOST = 1000
"""Calls one by one in a block."""
BULK = 2500
"""Calls with one bulk call. Half a second's worth of a slow peer."""


def entries(contestants: Sequence[Contestant]) -> list[Entry]:
    found = everybody(contestants)
    # The commands of delay() itself, without streamtask: made by it, sent by the plain socket.
    found += [Entry(one, "socket, delay's commands", {"calls": "calls"}) for one in called(contestants, "socket")]
    return found


def run(bench: Bench, entries: Sequence[Entry], failures: dict[str, str]) -> dict[str, Figures]:
    bench.clear()
    most = max(20, int(MOST * bench.scale))
    bulk = max(50, int(BULK * bench.scale))
    seconds = bench.seconds / BLOCKS
    spent: dict[tuple[str, str], list[float]] = {}

    def turn(entry: Entry, produce: Producer, kind: str, count: bool) -> None:
        if kind == "bulk":
            answer = produce("bulk", task="noop", n=bulk if count else 50)
        else:
            answer = produce(kind, task="noop", n=most if count else 20, seconds=seconds)
        if count:
            total = spent.setdefault((entry.label, kind), [0.0, 0.0])
            total[0] += answer["n"]
            total[1] += answer["seconds"]

    with contextlib.ExitStack() as stack:
        if any(entry.options.get("calls") for entry in entries):
            _save_calls(bench, most * BLOCKS + 20)
        taking_part = []
        for entry in entries:
            with failing(entry, failures):
                produce = stack.enter_context(bench.producer(entry))
                can = produce("about")["can"]
                kinds = ("one",) if "calls" in entry.options else ("one", "bulk", "at_once")
                taking_part += [(entry, produce, kind) for kind in kinds if can[kind]]
        for kind in ("one", "bulk", "at_once"):
            turns = [one for one in taking_part if one[2] == kind]
            for one in turns:
                with failing(one[0], failures):
                    turn(*one, count=False)  # connections are made, scripts loaded
            for block in range(BLOCKS):
                for one in turns[:: -1 if block % 2 else 1]:
                    if one[0].label not in failures:
                        with failing(one[0], failures):
                            turn(*one, count=True)
    figures: dict[str, Figures] = {}
    for (label, kind), (n, seconds) in spent.items():
        figures.setdefault(label, {})[kind] = n / seconds
    return figures


def _save_calls(bench: Bench, n: int) -> None:
    """Has streamtask's ``delay`` make N calls, and makes Redis forget that they were made."""
    ours = Entry(Contestant("streamtask", "streamtask_", "streamtask"), "recorded")
    with bench.producer(ours) as produce:
        produce("save_calls", path=str(bench.folder / "calls"), n=n)
        names = produce("shard_names")["streams"]
    for seen in bench.client.scan_iter("*:seen:*", count=1000):
        bench.client.delete(seen)
    for name in names:
        bench.client.xtrim(name, maxlen=0, approximate=False)


WORKLOAD = Workload("enqueue", "enqueueing, calls/s", entries, run)
