"""The benchmarks run and clean up after themselves. No figure is judged: the machine may be busy."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.helpers import ROOT, spawn, wait_until

CORE = ROOT / "benchmarks" / "core.py"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str | None]:
    folder = tmp_path / "tmp"
    folder.mkdir()
    return {"TMPDIR": str(folder), "STREAMTASK_BROKER_URL": None, "STREAMTASK_APP": None}


@pytest.mark.slow
def test_quick(tmp_path: Path, env: dict[str, str | None]) -> None:
    file = tmp_path / "figures.json"
    with spawn(CORE, "--quick", "--rounds", "1", "--json", file, env=env, cwd=tmp_path) as run:
        assert run.wait(100) == 0, str(run)
        output = run.stdout
    figures = json.loads(file.read_text())
    assert figures["rounds"].keys() == {"drain", "single", "bulk", "latency"}
    assert all(value > 0 for rounds in figures["rounds"].values() for one in rounds for value in one.values())
    assert len(figures["rows"]) == 8
    for row in figures["rows"]:
        assert row["what"] in output
        assert 0 < row["low"] <= row["ratio"] <= row["high"]
    for name, number in figures["versions"].items():
        assert number in output, name
    assert "idle CPUs" in output
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.slow
def test_stopped_while_a_worker_runs(tmp_path: Path, env: dict[str, str | None]) -> None:
    """What it has started lives in sessions of its own, so it is seen here if it is left behind."""
    with spawn(CORE, "--quick", env=env, cwd=tmp_path) as run:
        wait_until(lambda: list((tmp_path / "tmp").glob("*/worker.log")), 60, lambda: str(run))
        run.signal(signal.SIGTERM)
        assert run.wait(30) == 128 + signal.SIGTERM, str(run)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_server_that_is_none(tmp_path: Path, env: dict[str, str | None]) -> None:
    with spawn(CORE, "--redis-server", tmp_path / "nothing", env=env, cwd=tmp_path) as run:
        assert run.wait() == 2
        assert str(tmp_path / "nothing") in run.stderr
