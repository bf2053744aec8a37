"""All that waits, and all that trusts a lease, looks at one clock, and it goes on in a suspended machine."""

from __future__ import annotations

import ast
import time
from pathlib import Path

import pytest

import streamtask
from streamtask.clock import mono_s

SOURCE = Path(streamtask.__file__).parent
OTHERS = {
    "clock.py": 1,  # where there is no better one
    "celery/internals.py": 1,  # what billiard compares with its own
    "celery/worker.py": 1,  # an eta as kombu's timers reckon it
    "redis/embedded_guardian.py": 5,  # a program of its own that loads nothing of the package
}
"""How often a module names the clock that stands still, with a reason."""


def times_named(path):
    found = 0
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += (node.value.id, node.attr) == ("time", "monotonic")
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            found += any(name.name == "monotonic" for name in node.names)
    return found


def test_one_clock_is_asked_everywhere():
    named = {path.relative_to(SOURCE).as_posix(): times_named(path) for path in SOURCE.rglob("*.py")}
    assert {name: count for name, count in named.items() if count} == OTHERS


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="Linux alone has it")
def test_the_clock_goes_on_while_the_machine_is_suspended():
    assert mono_s.args == (time.CLOCK_BOOTTIME,)
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= mono_s() <= time.clock_gettime(time.CLOCK_BOOTTIME)
