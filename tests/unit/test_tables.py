"""Tables on screens of any width: whatever stands in a row is shown whole, and no line is wider than the screen."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from streamtask.cli.dlq import _print_list
from streamtask.cli.status import _headline, _shard_table, _warnings, _worker_table
from streamtask.cli.tables import Line, Screenful, Table
from streamtask.text import counted

TASK = "myproject.billing.invoices.send_reminder"
KEY = "0b95ea83-ec3e-331f-8c69-ad96843b22f1"
WHY = "exhausted: ValueError: no device is registered for this user, so that nothing could be sent to it"
HOST = "notifications-worker-7d9f8b6c5d-x2x4v"


def shown(*things: Any, width: int, height: int = 25) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, markup=False, highlight=False, emoji=False)
    for thing in things:
        console.print(thing)
    return out.getvalue().splitlines()


def words(lines: list[str]) -> str:
    """Without what depends on the width."""
    return "".join("".join(lines).split())


@pytest.mark.parametrize("width", [30, 60, 80, 100, 140, 1_000_000])
def test_a_row_is_shown_whole(width: int) -> None:
    table = Table("=ID", ">RUNS", "TASK", "KEY", "WHY")
    table.add("shared:1795735656638-0", "4", TASK, KEY, WHY)
    table.add("3:1795735656638-0", "1", "日本語のタスク", "-", "rejected")
    lines = shown(table, width=width)
    assert max(map(len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)
    for part in (TASK, KEY, "日本語のタスク", WHY, "3:1795735656638-0"):
        assert words([part]) in words(lines)
    if width >= 60:
        assert any(line.startswith("shared:1795735656638-0     4") for line in lines)
        assert len(lines) <= 9
    if width == 1_000_000:
        assert len(lines) == 3


def test_only_what_has_no_room_goes_below() -> None:
    table = Table("=ID", ">RUNS", "KEY", "WHY")
    table.add("1:1-1", "2", "k", "because of this and that")
    table.add("1:1-2", "12", "-", "-")
    assert shown(table, width=80) == [
        "ID     RUNS  KEY  WHY",
        "1:1-1     2  k    because of this and that",
        "1:1-2    12  -    -",
    ]
    assert shown(table, width=30) == [
        "ID     RUNS  KEY",
        "1:1-1     2  k",
        "    why because of this and",
        "    that",
        "1:1-2    12  -",
    ]


def test_a_line_ends_between_its_parts() -> None:
    line = Line(Text("default"), Text("backlog 5"), Text("(lag 3, pending 1)"), Text("dead 7"))
    assert shown(line, width=80) == ["default  backlog 5  (lag 3, pending 1)  dead 7"]
    assert shown(line, width=40) == ["default  backlog 5  (lag 3, pending 1)", "    dead 7"]
    assert shown(line, width=20) == ["default  backlog 5", "    (lag 3, pending", "    1)  dead 7"]


def row_of(shards: int, **more: Any) -> dict[str, Any]:
    """A queue as ``Inspector.status`` tells it, with one worker that has the even shards."""
    mine = list(range(0, shards, 2))
    counts = {"lag": 0, "pending": 0, "delayed": 0, "dead": 0, "length": 0}
    found = [{"shard": s, "owner": "i" if s in mine else None, **counts} for s in range(shards)]
    found += [{"shard": s, "owner": None, **counts} for s in ("shared", "shared.9")]
    worker = {"id": "i", "host": HOST, "pid": 17, "shards": [*mine, "shared", "shared.9"], "group": "workers"}
    row = {"backlog": 5, "lag": 3, "pending": 1, "delayed": 1, "dead": 7, "in_per_s": 0.0, "out_per_s": None}
    return {**row, "shards": found, "workers": [worker], "groups": [{}], "consumers": [], **more}


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("shards", [0, 5, 64])
def test_status_of_few_and_many_shards(shards: int, width: int) -> None:
    row = row_of(shards)
    name = "notifications-of-a-queue-with-a-rather-long-name-europe-west"
    lines = shown(_headline(name, row), _shard_table(row), _worker_table(row), width=width)
    assert max(map(len, lines)) <= width
    rows = [line for line in lines if line.split()[0].isdigit()]
    assert len(rows) == shards
    assert all(line.endswith("x2x4v:17") for line in rows[::2])
    assert name in lines[0]
    assert f"{HOST}:17" in "".join(lines)
    assert ["shared.9", "0", "0", "0", "0", "0", "1", "process"] in [line.split() for line in lines]
    ownerless = [line for line in _warnings(row) if "without an owner" in line]
    assert ownerless == ([f"without an owner: shards {', '.join(map(str, range(1, shards, 2)))}"] if shards else [])


def test_status_of_one_group_of_several() -> None:
    row = row_of(2, groups=[{}, {}])
    assert any("workers" in line for line in shown(_worker_table(row), width=140))


def test_a_dead_letter_s_error_begins_with_its_first_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    row = {"id": "1:1-1", "queue": "q", "dead_at": None, "task": None, "key": None, "attempts": 1, "held": True}
    _print_list([{**row, "reason": "exhausted", "error": "RuntimeError: first\nsecond (after 1 retry)"}])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("HOLDS ITS LANE; exhausted: RuntimeError: first second (after 1 retry)")


@pytest.mark.parametrize("lines", [3, 10, 11, 200])
def test_the_last_lines_are_seen_and_what_is_not_is_said(lines: int) -> None:
    picture = Text("\n".join(f"line {i}" for i in range(lines)))
    error = Text("! Redis at redis://127.0.0.1:1/0 can't be reached", "bold red")
    found = shown(Screenful(picture, error), width=80, height=11)
    assert found[0] == "line 0"
    assert found[-1] == error.plain
    assert len(found) == min(lines, 10) + 1
    said = [line for line in found if "more line" in line]
    assert said == ([found[-2]] if lines > 10 else [])
    if lines > 10:
        assert said[0].startswith(f"... {counted(lines - 9, 'more line')}:")
    assert shown(Screenful(picture), width=80, height=300)[-1] == f"line {lines - 1}"


def test_numbers_of_things() -> None:
    found = [counted(0, "line"), counted(1, "line"), counted(1, "retry", "retries"), counted(1200, "retry", "retries")]
    assert found == ["0 lines", "1 line", "1 retry", "1,200 retries"]
