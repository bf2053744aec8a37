"""Judges what workers did by the starts and ends that the bodies wrote down, against the guarantees of the design.

A body appends one line per start and end to one file (``tests.worker.rig``); the order of the lines is the order of the
write calls. The rules, per message and per shard key:

- nothing lost: every produced message has an end, or is a dead letter;
- starts follow the order of the produce calls; only after a process died may they jump back, and then what repeats is a
  contiguous run that ends at the last started message, in order;
- of the finished messages that run again, at most ``MOST_REPEATED`` are of one process and shard, all finished at the
  very end of that process's life: what was acknowledged never runs again;
- bodies of a key never overlap, except with one of a process that was killed or paused in it;
- the fencing token of a key never falls.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

START, END, FAIL = "S", "E", "F"
MOST_REPEATED = 200


class Event(NamedTuple):
    kind: str
    """``S`` start, ``E`` end, ``F`` the body raised; other letters are the test's own."""
    at: float
    """Seconds on the machine's monotonic clock, which all processes share."""
    pid: int
    key: str | None
    n: int
    attempt: int
    token: int
    shard: int | str
    id: str
    more: dict[str, Any]


@dataclass
class Report:
    starts: int = 0
    ended: int = 0
    repeated: int = 0
    """Starts of a message beyond its first that no retry explains."""
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.starts} starts, {self.ended} ended, {self.repeated} repeated, {len(self.problems)} problems"


def judge(
    events: Sequence[Event],
    produced: Mapping[str | None, Sequence[int]],
    *,
    killed: Mapping[int, float] | None = None,
    excused: Collection[int] = (),
    dead: Iterable[tuple[str | None, int]] = (),
    slack: float = 0.3,
) -> Report:
    """Checks a record.

    ``produced``: the numbers of each key in the order of their produce calls; None holds those without a key.
    ``killed``: when each process was killed; without it no message may run twice. ``excused``: processes that were
    paused or cut off in a body. ``dead``: (key, number) of the dead letters. ``slack``: how long before its death a
    process may have finished what runs again, in seconds: ack interval, round trip and a busy machine.
    """
    killed = killed or {}
    report = Report()
    say = report.problems.append
    by_key: dict[str | None, list[Event]] = defaultdict(list)
    for event in events:
        by_key[event.key].append(event)
    report.starts = sum(event.kind == START for event in events)

    ended: dict[tuple[str | None, int], list[Event]] = defaultdict(list)
    for event in events:
        if event.kind == END:
            ended[event.key, event.n].append(event)
    report.ended = len(ended)
    gone = set(dead)
    wanted = {(key, n) for key, numbers in produced.items() for n in numbers}
    if lost := sorted(wanted - set(ended) - gone, key=repr):
        say(f"lost: {len(lost)}, the first {lost[:5]}")
    if foreign := sorted(set(ended) - wanted, key=repr):
        say(f"ran but never sent: {foreign[:5]}")

    again: Counter[tuple[int, int | str]] = Counter()
    for key, own in by_key.items():
        if key is not None:
            _check_order(key, own, produced.get(key, ()), gone, killed, excused, say)
            _check_overlap(key, own, killed, excused, say)
            _check_tokens(key, own, excused, say)
        last: dict[int, Event] = {}
        finished: dict[int, Event] = {}
        for event in own:
            if event.kind == START:
                before = last.get(event.n)
                if before is not None and event.attempt <= before.attempt:
                    report.repeated += 1
                    if before.pid not in killed and before.pid not in excused:
                        say(f"run twice though pid {before.pid} lived: {key}/{event.n} attempt {event.attempt}")
                done = finished.get(event.n)
                if done is not None:
                    again[done.pid, done.shard] += 1
                    died = killed.get(done.pid)
                    if died is not None and done.at < died - slack:
                        say(f"{key}/{event.n} ran again; it had ended {died - done.at:.3f} s before the kill")
                last[event.n] = event
            elif event.kind == END:
                finished[event.n] = event
    say_many = [(who, count) for who, count in again.items() if count > MOST_REPEATED]
    for (pid, shard), count in say_many:
        say(f"{count} finished messages of pid {pid}, shard {shard} ran again")
    return report


def check(events: Sequence[Event], produced: Mapping[str | None, Sequence[int]], **options: Any) -> Report:
    """As ``judge``; AssertionError with all problems."""
    report = judge(events, produced, **options)
    assert not report.problems, f"{report}:\n  " + "\n  ".join(report.problems[:20])
    return report


def _check_order(
    key: str,
    own: list[Event],
    numbers: Sequence[int],
    gone: set[tuple[str | None, int]],
    killed: Mapping[int, float],
    excused: Collection[int],
    say: Any,
) -> None:
    place = {n: i for i, n in enumerate(numbers)}
    skippable = {place[n] for k, n in gone if k == key and n in place}
    before: Event | None = None
    for event in own:
        if event.kind != START or event.n not in place:
            continue
        at = place[event.n]
        if before is None:
            if any(i not in skippable for i in range(at)):
                say(f"{key}: begins with {event.n}, place {at}")
        else:
            was = place[before.n]
            if at > was + 1 and any(i not in skippable for i in range(was + 1, at)):
                say(
                    f"{key}: {before.n} (pid {before.pid}), then {event.n} (pid {event.pid}): left out the ones between"
                )
            elif at < was and before.pid not in killed and before.pid not in excused:
                say(f"{key}: {event.n} (pid {event.pid}) after {before.n} (pid {before.pid}, which lived)")
            elif at < was and event.pid == before.pid:
                say(f"{key}: pid {event.pid} went back from {before.n} to {event.n}")
        before = event


def _check_overlap(key: str, own: list[Event], killed: Mapping[int, float], excused: Collection[int], say: Any) -> None:
    running: dict[int, Event] = {}
    for event in own:
        if event.kind == START:
            for pid, other in list(running.items()):
                died = killed.get(pid)
                if pid == event.pid or (pid not in excused and (died is None or event.at < died - 0.05)):
                    say(f"{key}: {event.n} (pid {event.pid}) starts while {other.n} (pid {pid}) runs")
                if pid == event.pid or died is not None:
                    del running[pid]
            running[event.pid] = event
        elif event.kind in (END, FAIL):
            running.pop(event.pid, None)


def _check_tokens(key: str, own: list[Event], excused: Collection[int], say: Any) -> None:
    token = 0
    for event in own:
        if event.kind == START:
            if event.token < token:
                say(f"{key}: token {event.token} of {event.n} (pid {event.pid}) after {token}")
            token = max(token, event.token)
