"""What begins anew in a forked child (``fork.py``)."""

import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import streamtask
from streamtask import fork


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(fork, "_calls", {turn: {} for turn in fork.Turn})
    monkeypatch.setattr(fork, "_pid", fork._pid)


class Holder:
    def __init__(self, seen: list[str], turn: fork.Turn) -> None:
        self.seen = seen
        self.name = turn.name
        fork.in_child(turn, self.begin)

    def begin(self) -> None:
        self.seen.append(self.name)


def test_one_place_registers_with_python():
    source = Path(streamtask.__file__).parent
    found = [p.name for p in source.rglob("*.py") if re.search(r"register_at_fork\(", p.read_text())]
    assert found == ["fork.py"]


def test_the_order_is_that_of_the_turns(calls, monkeypatch):
    seen: list[str] = []
    holders = [Holder(seen, turn) for turn in reversed(fork.Turn)]
    fork.in_child(fork.Turn.SESSIONS, lambda: seen.append("a function"))
    fork.check()
    assert seen == [], "nothing was forked"
    monkeypatch.setattr(os, "getpid", lambda: -1)
    fork.check()
    fork.check()
    assert seen == ["LOCKS", "CONNECTIONS", "PRODUCERS", "SESSIONS", "a function", "POLLERS", "WORKERS", "SIGNALS"]
    assert holders


def test_one_that_fails_keeps_no_other_from_beginning_anew(calls, monkeypatch):
    seen: list[str] = []

    def fails() -> None:
        raise ValueError("no")

    fork.in_child(fork.Turn.LOCKS, fails)
    holder = Holder(seen, fork.Turn.SIGNALS)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(ValueError, match="no"):
        fork.check()
    assert seen == [holder.name]


def test_nothing_is_kept_alive(calls, monkeypatch):
    seen: list[str] = []
    holders = [Holder(seen, fork.Turn.LOCKS) for _ in range(3)]
    del holders[1:]
    gc.collect()
    assert len(fork._calls[fork.Turn.LOCKS]) == 1
    monkeypatch.setattr(os, "getpid", lambda: -1)
    fork.check()
    assert seen == ["LOCKS"]


def test_what_lives_to_the_end_of_its_process_says_nothing_then():
    """Python takes a module's names away, and what they stood for, in no order that one could rely upon."""
    script = """
from streamtask import fork
class Kept:
    def __init__(self):
        fork.in_child(fork.Turn.LOCKS, self.begin)
        self.itself = self
    def begin(self): ...
kept = Kept()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""


def test_it_runs_in_a_real_child(calls):
    read, write = os.pipe()
    fork.in_child(fork.Turn.PRODUCERS, lambda: os.write(write, b"anew"))
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b"anew"
