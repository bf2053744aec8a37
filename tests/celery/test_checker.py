"""The checker must find each kind of wrong record, or a green run says nothing."""

from __future__ import annotations

import pytest

from tests.celery.checker import Event, judge

pytestmark = pytest.mark.quick


def record(*lines):
    """Events from (kind, n, more fields); one second apart, of worker 1 and pool process 11."""
    found = []
    for i, line in enumerate(lines):
        kind, n, more = line if len(line) == 3 else (*line, {})
        given = {"at": float(i), "main": 1, "pid": 11, "key": "k", "attempt": 0, "id": f"id{n}", **more}
        found.append(Event(kind, n=n, redelivered=False, more={}, **given))
    return found


TWO = record(("S", 0), ("E", 0), ("S", 1), ("E", 1))
OTHER = {"main": 2, "pid": 22}


@pytest.mark.parametrize(
    "events, numbers, options",
    [
        (TWO, [0, 1], {}),
        # a retry keeps its place
        (record(("S", 0), ("F", 0), ("S", 0, {"attempt": 1}), ("D", 0), ("S", 1), ("E", 1)), [0, 1], {}),
        # killed in the body
        (record(("S", 0), ("S", 0, OTHER), ("E", 0, OTHER)), [0], {"killed": {1: 0.5, 11: 0.5}}),
        # killed before the ack
        (record(("S", 0), ("E", 0), ("S", 0, OTHER), ("E", 0, OTHER)), [0], {"killed": {1: 1.5, 11: 1.5}}),
        # a paused worker's body goes on
        (
            record(("S", 0), ("S", 0, OTHER), ("E", 0, OTHER), ("S", 1, OTHER), ("E", 0), ("E", 1, OTHER)),
            [0, 1],
            {"paused": {1: 0.5}},
        ),
        # acknowledged early, and killed in the body
        (record(("S", 0, {"key": None})), {None: [0]}, {"killed": {11: 0.5}, "early": {0}}),
        # a plain message ran twice, and so does the retry that each run published
        (
            record(
                ("S", 0, {"key": None}),
                ("F", 0, {"key": None}),
                ("S", 0, {**OTHER, "key": None}),
                ("F", 0, {**OTHER, "key": None}),
                *[(kind, 0, {**OTHER, "key": None, "attempt": 1}) for kind in "SESE"],
            ),
            {None: [0]},
            {"killed": {1: 1.5, 11: 1.5}},
        ),
        # the retry of the killed worker's run came first
        (
            record(
                ("S", 0, {"key": None}),
                ("F", 0, {"key": None}),
                *[(kind, 0, {"main": 3, "pid": 33, "key": None, "attempt": 1}) for kind in "SE"],
                ("S", 0, {**OTHER, "key": None}),
                ("E", 0, {**OTHER, "key": None}),
            ),
            {None: [0]},
            {"killed": {1: 1.5, 11: 1.5}},
        ),
        # gave itself back
        (record(("S", 0), ("Q", 0), ("S", 0), ("E", 0)), [0], {}),
        # one that need not run
        (record(("S", 0), ("E", 0), ("S", 2), ("E", 2)), [0, 1, 2], {"skipped": {("k", 1)}}),
    ],
)
def test_fine(events, numbers, options):
    produced = numbers if isinstance(numbers, dict) else {"k": numbers}
    assert judge(events, produced, **options).problems == []


@pytest.mark.parametrize(
    "events, numbers, options, problem",
    [
        (TWO, [0, 1, 2], {}, "lost: 1"),
        (TWO, [0], {}, "never sent"),
        (record(("S", 1), ("E", 1), ("S", 0), ("E", 0)), [0, 1], {}, "starts before the end of [0]"),
        (record(("S", 0), ("S", 1, {"pid": 12}), ("E", 0), ("E", 1)), [0, 1], {}, "starts while"),
        # overtaken while it waits for its retry
        (
            record(("S", 0), ("F", 0), ("S", 1), ("E", 1), ("S", 0, {"attempt": 1}), ("E", 0)),
            [0, 1],
            {},
            "starts before the end of [0]",
        ),
        (record(("S", 0), ("E", 0), ("S", 0), ("E", 0)), [0], {}, "though its process lived"),
        # one failed run, and two of its retry
        (
            record(
                ("S", 0, {"key": None}),
                ("F", 0, {"key": None}),
                *[(kind, 0, {"key": None, "attempt": 1}) for kind in "SESE"],
            ),
            {None: [0]},
            {},
            "though its process lived",
        ),
        (
            record(("S", 0), ("E", 0), ("A", 0, {"key": None}), ("S", 0, {**OTHER, "at": 9.0}), ("E", 0, OTHER)),
            [0],
            {"killed": {1: 8.0, 11: 8.0}},
            "though acknowledged",
        ),
        # only the main process was killed, and its pool process goes on
        (
            record(("S", 0), ("S", 0, OTHER), ("E", 0), ("E", 0, OTHER)),
            [0],
            {"killed": {1: 0.5}},
            "main process was killed",
        ),
        # continued, it starts what has run elsewhere
        (
            record(("S", 0, OTHER), ("E", 0, OTHER), ("S", 1, OTHER), ("E", 1, OTHER), ("S", 0), ("E", 0)),
            [0, 1],
            {"paused": {1: 0.5}},
            "which lived",
        ),
        (record(("S", 0, {"key": None})), {None: [0]}, {"early": {0}}, "lost: 1"),
    ],
)
def test_found(events, numbers, options, problem):
    produced = numbers if isinstance(numbers, dict) else {"k": numbers}
    problems = judge(events, produced, **options).problems
    assert any(problem in line for line in problems), problems
