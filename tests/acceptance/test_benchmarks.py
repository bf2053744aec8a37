"""The benchmarks run and clean up after themselves. No figure is judged: the machine may be busy."""

from __future__ import annotations

import json
import math
import signal
import sys
from pathlib import Path

import pytest

from tests.helpers import spawn, wait_until

RUN = ("-m", "benchmarks")
WORKLOADS = "drain,threads,coroutines,asleep10,latency,order,crash,memory"
CELERY = "celery_4,celery_latency"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str | None]:
    folder = tmp_path / "tmp"
    folder.mkdir()
    return {"TMPDIR": str(folder), "STREAMTASK_BROKER_URL": None, "STREAMTASK_APP": None}


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen, workloads", [((), WORKLOADS), (("--celery", sys.executable), CELERY)], ids=["ours", "celery"]
)
def test_smoke(chosen: tuple[str, ...], workloads: str, tmp_path: Path, env: dict[str, str | None]) -> None:
    """With streamtask and the bare programs, then with the Celery of the tests: nothing is installed.

    Other workloads only repeat one of these.
    """
    file = tmp_path / "figures.json"
    with spawn(*RUN, "--smoke", *chosen, "--only", workloads, "--json", file, env=env, cwd=tmp_path) as run:
        assert run.wait(100) == 0, str(run)
        output = run.stdout
    found = json.loads(file.read_text())
    assert not any(found["failures"].values())
    assert list(found["rounds"]) == workloads.split(",")
    for workload, rounds in found["rounds"].items():
        assert len(rounds) == 1
        assert set(rounds[0]) == set(found["order"][workload])
        for figures in rounds[0].values():
            assert all(math.isfinite(value) and value >= 0 for value in figures.values())
            assert "rate" not in figures or figures["rate"] > 0
    for name, number in found["about"]["versions"].items():
        assert f"{name} {number}" in output
    assert "idle CPUs" in output
    assert "streamtask / what it is compared with" in output
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.slow
def test_stopped_while_a_worker_runs(tmp_path: Path, env: dict[str, str | None]) -> None:
    """What it has started lives in sessions of its own, so it is seen here if it is left behind."""
    with spawn(*RUN, "--smoke", "--only", "drain", env=env, cwd=tmp_path) as run:
        wait_until(lambda: list((tmp_path / "tmp").glob("*/worker.log")), 60, lambda: str(run))
        run.signal(signal.SIGTERM)
        assert run.wait(30) == 128 + signal.SIGTERM, str(run)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_server_that_is_none(tmp_path: Path, env: dict[str, str | None]) -> None:
    with spawn(*RUN, "--redis-server", tmp_path / "nothing", env=env, cwd=tmp_path) as run:
        assert run.wait() == 2
        assert str(tmp_path / "nothing") in run.stderr
