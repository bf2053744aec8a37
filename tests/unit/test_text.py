"""Text from anywhere is printable and short: in logs, whoever formats them, and in what commands print."""

from __future__ import annotations

import json
import logging
import math
import subprocess

import pytest

from streamtask.cli.common import MOST_DEEP, jsonable, say
from streamtask.cli.logs import JsonFormatter, TextFormatter
from streamtask.text import MOST, MOST_LINES, logger, printable
from tests.helpers import ROOT

NASTY = "".join(
    map(chr, [*range(0x20), *range(0x7F, 0xA0), 0x200B, 0x202E, 0x2028, 0x2066, 0xFEFF, 0xD800, 0xE000, 0xE0041])
)


class NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_what_is_shown_does_nothing() -> None:
    assert printable("naïve Ω 日本 🙂 [bold]") == "naïve Ω 日本 🙂 [bold]"
    shown = printable(f"a{NASTY}z")
    assert shown.replace("\n", "").isprintable()
    assert shown.startswith("a\\x00")
    assert "\\x9b" in shown
    assert "\\u202e" in shown
    assert "\\ud800" in shown
    assert printable("a\nb") == "a\nb"
    assert printable("a\nb", lines=False) == "a\\nb"
    assert printable("x" * 10, 4) == "xxxx ... (6 more characters)"
    assert len(printable(NASTY * 100_000)) < 11 * MOST
    assert printable(NoText()) == "a NoText without a text"
    assert (printable(None), printable(b"\x1b"), printable(3)) == ("None", "b'\\x1b'", "3")


@pytest.mark.parametrize("formatter", [logging.Formatter("%(name)s %(message)s"), TextFormatter(), JsonFormatter()])
def test_a_line_of_ours_is_printable_and_short_whoever_formats_it(formatter, caplog) -> None:
    log = logger("streamtask.test")
    try:
        raise ValueError(NASTY * 50_000)
    except ValueError:
        log.exception("task=%s n=%d %s %.1f: %s", NASTY * 50_000, 3, None, 0.5, NoText())
    (record,) = caplog.records
    assert record.msg == "task=%s n=%d %s %.1f: %s"  # what collectors group by stays
    text = formatter.format(record)
    assert "n=3 None 0.5: a NoText without a text" in text
    assert "ValueError" in text
    assert "\\u202e" in text
    assert text.replace("\n", "").isprintable()
    assert len(text) < 11 * (MOST + MOST_LINES)
    assert logger("streamtask.test").filters == log.filters
    assert len(log.filters) == 1


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_a_line_of_others_is_too_where_we_format_it(formatter: logging.Formatter) -> None:
    record = logging.LogRecord("a.task", logging.INFO, "", 0, "%s", (NASTY * 50_000,), None)
    record.extra = NASTY
    text = formatter.format(record)
    assert text.isprintable()
    assert "\\u202e" in text
    assert len(text) < 11 * (MOST + MOST_LINES)


def test_all_our_logs_are_made_so() -> None:
    found = subprocess.run(
        ["grep", "-rlE", r"getLogger|get_logger", "--include=*.py", "streamtask"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.split() == ["streamtask/text.py"]


def test_json_that_is_shown_is_json() -> None:
    deep: list[object] = []
    for _ in range(900):
        deep = [deep]
    given = {"n": math.nan, "i": [-math.inf], "deep": deep, NASTY: {NASTY}}
    text = json.dumps(jsonable(given))
    assert text.isascii()
    assert text.isprintable()
    back = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert (back["n"], back["i"], back[NASTY]) == ("nan", ["-inf"], [NASTY])
    for _ in range(MOST_DEEP - 1):
        back["deep"] = back["deep"][0]
    assert back["deep"] == "..."


@pytest.mark.parametrize("err", [False, True])
def test_what_a_command_says_is_printable(capsys: pytest.CaptureFixture[str], err: bool) -> None:
    say("queue \x1b[2J\x9b\u202e of a stranger\nand a line more", err=err)
    said = capsys.readouterr()[1 if err else 0]
    assert all(line.isprintable() for line in said.splitlines())
    assert "of a stranger" in said
