"""Judges what Celery workers did by what their bodies wrote down (``app.note``), against the guarantees of the design.

The record has one line per event; the order of the lines is the order of the write calls. The rules:

- nothing lost: every message has a final event (``E`` it returned, ``D`` it failed for good);
- per key, starts follow the order of the publish calls, and a message starts only after the final event of the one before
  it - through retries too; only after a kill may they jump back, and then what repeats is a contiguous run in order;
- bodies of a key never overlap, except with one of a process that was killed, or of a paused worker that began before;
- a message runs again without a retry only when its process was killed or paused and its ack can't have reached Redis;
  a paused worker may, when it goes on, still run messages without a key that it had fetched;
- a failed run of a message without a key publishes a retry of its own: where it ran twice, its retry may, too.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

START, END, DEAD, FAIL, REQUEUED, ACK = "S", "E", "D", "F", "Q", "A"
FINAL = (END, DEAD)


class Event(NamedTuple):
    kind: str
    """``S`` start, ``E`` end, ``F`` failed and to be retried, ``D`` failed for good, ``Q`` gave itself back, ``A`` and
    ``J`` the main process acknowledged or rejected, ``W`` the worker is ready; other letters are a test's own."""
    at: float
    """Seconds on the machine's monotonic clock, which all processes share."""
    main: int
    """Pid of the worker's main process."""
    pid: int
    key: str | None
    n: int
    attempt: int
    id: str
    redelivered: bool
    more: Any


@dataclass
class Report:
    starts: int = 0
    ended: int = 0
    repeated: list[str] = field(default_factory=list)
    """Starts that no retry explains, allowed or not."""
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.starts} starts, {self.ended} ended, {len(self.repeated)} repeated {self.repeated[:5]}, "
            f"{len(self.problems)} problems"
        )


def judge(
    events: Sequence[Event],
    produced: Mapping[str | None, Sequence[int]],
    *,
    killed: Mapping[int, float] | None = None,
    paused: Mapping[int, float] | None = None,
    early: Collection[int] = (),
    skipped: Collection[tuple[str | None, int]] = (),
    slack: float = 0.3,
    lease: float = 0.0,
) -> Report:
    """Checks a record.

    ``produced``: the numbers of each key in the order of their publish calls; None holds those without a key. ``killed``:
    when processes were killed, main ones or those of a pool. ``paused``: when main processes were stopped. ``early``: the
    numbers without a key that are acknowledged before they run, so that a kill may end them. ``skipped``: (key, number) of
    what need not run. ``slack``: how long before its death a process may have acknowledged what runs again, in seconds.
    ``lease``: for how long after a pause the processes of its pool may start what they had been given, in seconds.
    """
    killed, paused = killed or {}, paused or {}
    report = Report()
    by_key: dict[str | None, list[Event]] = defaultdict(list)
    acked: dict[tuple[str, int], float] = {}
    for event in events:
        if event.kind == ACK:
            acked[event.id, event.attempt] = event.at
        by_key[event.key].append(event)
    report.starts = sum(event.kind == START for event in events)

    done = {(event.key, event.n) for event in events if event.kind in FINAL}
    report.ended = len(done)
    wanted = {(key, n) for key, numbers in produced.items() for n in numbers}
    # Acknowledged as they start: such a message may end with its process.
    cut_short = {
        (None, event.n)
        for event in events
        if event.kind == START
        and event.key is None
        and event.n in early
        and (event.pid in killed or event.main in killed)
    }
    if lost := sorted(wanted - done - set(skipped) - cut_short, key=repr):
        report.problems.append(f"lost: {len(lost)}, the first {lost[:5]}")
    started = {(event.key, event.n) for event in events if event.kind == START}
    if foreign := sorted(started - wanted, key=repr):
        report.problems.append(f"ran but never sent: {foreign[:5]}")

    for key, own in by_key.items():
        _check_repeats(own, killed, paused, acked, slack, lease, report)
        if key is not None:
            skip = {n for k, n in skipped if k == key}
            _check_order(key, own, produced.get(key, ()), skip, killed, paused, report)
            _check_overlap(key, own, killed, paused, report)
    return report


def check(events: Sequence[Event], produced: Mapping[str | None, Sequence[int]], **options: Any) -> Report:
    """As ``judge``; AssertionError with all problems."""
    report = judge(events, produced, **options)
    assert not report.problems, f"{report}:\n  " + "\n  ".join(report.problems[:30])
    return report


def _who(event: Event) -> str:
    return f"{event.key}/{event.n} attempt {event.attempt} (worker {event.main}, pid {event.pid})"


def _check_repeats(
    own: list[Event],
    killed: Mapping[int, float],
    paused: Mapping[int, float],
    acked: Mapping[tuple[str, int], float],
    slack: float,
    lease: float,
    report: Report,
) -> None:
    last: dict[tuple[object, ...], Event] = {}
    given_back: set[tuple[object, ...]] = set()
    failed: Counter[tuple[int, str, int]] = Counter()
    began: Counter[tuple[int, str, int]] = Counter()
    for event in own:
        # Two messages of one number have two task ids. A retry without a key is a message of its own.
        message = (event.n, event.id) if event.key is not None else (event.n, event.id, event.attempt)
        if event.kind == REQUEUED:
            given_back.add(message)
        if event.kind == FAIL:
            failed[event.n, event.id, event.attempt] += 1
        if event.kind != START:
            continue
        began[event.n, event.id, event.attempt] += 1
        before = last.get(message)
        last[message] = event
        if before is None or event.attempt > before.attempt:
            continue
        if (
            event.key is None
            and began[event.n, event.id, event.attempt] <= failed[event.n, event.id, event.attempt - 1]
        ):
            continue
        if message in given_back:
            given_back.discard(message)
            continue
        report.repeated.append(_who(event))
        gone = min(
            (when for pid, when in ((before.pid, killed.get(before.pid)), (before.main, killed.get(before.main)),
                                    (before.main, paused.get(before.main))) if when is not None),
            default=None,
        )  # fmt: skip
        if event.key is None and event.main in paused:
            continue
        if gone is None:
            report.problems.append(f"run twice though its process lived: {_who(before)}, then {_who(event)}")
            continue
        if event.key is not None and before.at > gone + lease and before.main in paused:
            report.problems.append(f"started after the pause, and elsewhere: {_who(before)}, then {_who(event)}")
        ack = acked.get((event.id, before.attempt))
        if ack is not None and ack < gone - slack:
            report.problems.append(f"run again though acknowledged {gone - ack:.3f} s before the end: {_who(event)}")


def _check_order(
    key: str,
    own: list[Event],
    numbers: Sequence[int],
    skip: Collection[int],
    killed: Mapping[int, float],
    paused: Mapping[int, float],
    report: Report,
) -> None:
    say = report.problems.append
    place = {n: i for i, n in enumerate(numbers)}
    final: set[int] = {place[n] for n in skip if n in place}
    before: Event | None = None
    for event in own:
        if event.n not in place:
            continue
        at = place[event.n]
        if event.kind in FINAL:
            final.add(at)
        if event.kind != START:
            continue
        was = -1 if before is None else place[before.n]
        if at > was:
            if open_before := [numbers[i] for i in range(at) if i not in final]:
                say(f"{key}: {_who(event)} starts before the end of {open_before[:5]}")
        elif at < was and before is not None:
            gone = {before.pid, before.main} & killed.keys() or before.main in paused
            if not gone:
                say(f"{key}: {_who(event)} after {_who(before)}, which lived")
            elif event.main == before.main:
                say(f"{key}: worker {event.main} went back from {before.n} to {event.n}")
        before = event


def _check_overlap(
    key: str, own: list[Event], killed: Mapping[int, float], paused: Mapping[int, float], report: Report
) -> None:
    running: dict[int, Event] = {}
    for event in own:
        if event.kind == START:
            for pid, other in list(running.items()):
                died = killed.get(pid)
                excused = died is not None and event.at >= died - 0.05
                excused |= other.main in paused and other.at <= paused[other.main]
                if not excused:
                    orphan = ", whose main process was killed" if other.main in killed else ""
                    report.problems.append(f"{key}: {_who(event)} starts while {_who(other)} runs{orphan}")
                if pid == event.pid or died is not None:
                    del running[pid]
            running[event.pid] = event
        elif event.kind in (*FINAL, FAIL, REQUEUED, "R"):
            running.pop(event.pid, None)
