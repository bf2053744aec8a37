"""The Celery example runs as its README says, and proves what it promises."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers import ROOT, spawn

FOLDER = ROOT / "examples" / "celery_app"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_celery_app(tmp_path: Path) -> None:
    env = {"SHOP_BROKER_URL": None, "SHOP_LOG": None, "TMPDIR": str(tmp_path)}
    with spawn("run.py", env=env, cwd=FOLDER) as run:
        assert run.wait(220) == 0, str(run)
        assert "worker one was killed with -9" in run.stdout
        assert run.lines[-1] == "nothing lost, each user's order held, one reminder"
    assert not (FOLDER / "shop.log").exists()


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("celery_app_run", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def good_log(program: ModuleType) -> list[str]:
    events = [("event", user, n) for n in range(1, program.EACH + 1) for user in range(1, program.USERS + 1)]
    reports = [("report", 0, n) for n in range(1, program.REPORTS + 1)]
    lines = [f"{kind} {what} {user} {n}" for what, user, n in events + reports for kind in ("start", "end")]
    return ["ready one@host", *lines, "start reminder 1 0.012", "end reminder 1 1"]


def test_its_judge_finds_what_is_wrong(program: ModuleType) -> None:
    good = good_log(program)
    assert program.judge(good) == []
    # Begun, killed, and run again: that is what a crash may do.
    at = good.index("start event 3 5")
    assert program.judge([*good[:at], "start event 3 5", *good[at:]]) == []

    def fault(log: list[str]) -> str:
        (found,) = program.judge(log)
        return str(found)

    assert fault([line for line in good if line != "end event 20 15"]) == "lost: events [15] of user 20"
    assert fault([line for line in good if line != "end report 0 7"]) == "lost: reports [7]"
    early = [line for line in good if line != "start event 3 6"]
    early.insert(early.index("end event 3 5"), "start event 3 6")
    assert fault(early) == "event 6 of user 3 began before event 5 had ended"
    assert fault([*good, "start reminder 1 0.5"]) == "the reminder came 2 times"
    assert fault([line.replace("0.012", "-0.012") for line in good]) == "the reminder came 0.012 s too early"
