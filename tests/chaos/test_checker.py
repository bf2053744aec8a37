"""The checker finds each kind of breach, and accepts what the guarantees allow."""

from __future__ import annotations

import pytest

from tests.chaos.checker import Event, judge
from tests.helpers import Record

pytestmark = pytest.mark.quick


def record(*lines):
    """Events from (kind, pid, n[, token[, attempt[, at]]]) of key "a"; times are 1, 2, ... by default."""
    events = []
    for i, (kind, pid, n, *more) in enumerate(lines):
        token, attempt, at = [*more, *(7, 0, float(i + 1))[len(more) :]]
        events.append(Event(kind, at, pid, "a", n, attempt, token, 0, f"id{n}", {}))
    return events


def problems(events, numbers=(1, 2, 3), **options):
    return "; ".join(judge(events, {"a": list(numbers)}, **options).problems)


IN_ORDER = [(kind, 1, n) for n in (1, 2, 3) for kind in "SE"]


def test_a_clean_run_passes():
    report = judge(record(*IN_ORDER), {"a": [1, 2, 3]})
    assert (report.problems, report.starts, report.ended, report.repeated) == ([], 3, 3, 0)


def test_retries_and_dead_letters_pass():
    events = record(("S", 1, 1), ("F", 1, 1), ("S", 1, 1, 7, 1), ("E", 1, 1, 7, 1), ("S", 1, 3), ("E", 1, 3))
    assert problems(events, dead=[("a", 2)]) == ""
    assert "lost: 1" in problems(events)


def test_a_repeat_after_a_crash_passes_where_it_is_contiguous_and_late():
    lines = [("S", 1, 1), ("E", 1, 1), ("S", 1, 2), ("S", 2, 1, 8), ("E", 2, 1, 8), ("S", 2, 2, 8), ("E", 2, 2, 8),
             ("S", 2, 3, 8), ("E", 2, 3, 8)]  # fmt: skip
    assert problems(record(*lines), killed={1: 2.1}) == ""
    assert "pid 1, which lived" in problems(record(*lines))
    assert "had ended 8.000 s before the kill" in problems(record(*lines), killed={1: 10.0})


@pytest.mark.parametrize(
    "lines, message",
    [
        (IN_ORDER[:4], "lost: 1"),
        ([*IN_ORDER, ("S", 1, 9), ("E", 1, 9)], "never sent"),
        ([IN_ORDER[0], IN_ORDER[1], ("S", 1, 3), ("E", 1, 3), ("S", 1, 2), ("E", 1, 2)], "left out"),
        ([("S", 1, 2), ("E", 1, 2)], "begins with 2"),
        ([("S", 1, 1), ("S", 2, 2), ("E", 1, 1), ("E", 2, 2)], "starts while"),
        ([*IN_ORDER[:2], ("S", 1, 2, 6), ("E", 1, 2, 6)], "token 6"),
        ([*IN_ORDER, ("S", 1, 3), ("E", 1, 3)], "run twice though"),
    ],
)
def test_each_breach_is_found(lines, message):
    assert message in problems(record(*lines))


def test_more_than_a_batch_run_again_is_found():
    numbers = range(300)
    first = [(kind, 1, n, 7, 0, 1.0) for n in numbers for kind in "SE"]
    second = [(kind, 2, n, 8, 0, 2.0) for n in numbers for kind in "SE"]
    assert "300 finished messages of pid 1" in problems(record(*first, *second), numbers, killed={1: 1.1})
    assert problems(record(*first, *second[200:]), numbers, killed={1: 1.1}) == ""


def test_a_half_written_line_is_left_for_later(tmp_path):
    path = tmp_path / "log"
    record = Record(path, Event, lambda event: event.kind == "E" and event.n)
    assert record.events() == []
    path.write_text('["S", 1.0, 1, "a", 5, 0, 7, 0, "x", {}]\n["E", 1.0')
    assert [e.n for e in record.events()] == [5]
    assert record.ended() == set()
    with open(path, "a") as file:
        file.write(', 1, "a", 5, 0, 7, 0, "x", {}]\n')
    assert [(e.kind, e.n) for e in record.events()] == [("S", 5), ("E", 5)]
    assert record.ended() == {5}
