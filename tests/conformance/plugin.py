"""A pytest plugin for the processes that run the suites; it needs nothing of this repository's other tests.

Writes what becomes of each test to a file at once, so that nothing is lost when the process has to be killed, and
caps the time of each test.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
from typing import Any

import pytest

RESULTS = "CONFORMANCE_RESULTS"
"""Environment: the file that gets one JSON object a line."""
TEST_TIMEOUT = "CONFORMANCE_TEST_TIMEOUT"
"""Environment: seconds. It also replaces the timeouts that the suites set: a hang shall end soon."""
PART = "CONFORMANCE_PART"
"""Environment: ``2/4`` runs every fourth test from the second on."""
SUITE = "CONFORMANCE_SUITE"
"""Environment: kombu or celery."""
REDIS_ALIAS = "CONFORMANCE_REDIS_ALIAS"
"""Environment: the transport that ``redis://`` is to mean in this process."""


def pytest_configure() -> None:
    # An installed project is found by its entry point; this shall not hide that it stopped working.
    if "streamtask://" in os.environ["TEST_BROKER"]:
        found = importlib.metadata.entry_points(group="kombu.serializers")
        if os.environ[SUITE] == "kombu" or not any("streamtask" in one.value for one in found):
            importlib.import_module("streamtask.transport")
    if os.environ.get(REDIS_ALIAS):
        from kombu.transport import TRANSPORT_ALIASES

        TRANSPORT_ALIASES["redis"] = os.environ[REDIS_ALIAS]


def _write(record: dict[str, Any]) -> None:
    with open(os.environ[RESULTS], "a") as file:
        file.write(json.dumps(record) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = map(int, os.environ[PART].split("/"))
    if parts > 1:
        # Every nth one: tests that take long stand side by side in the files.
        config.hook.pytest_deselected(items=[one for at, one in enumerate(items) if at % parts != part - 1])
        items[:] = items[part - 1 :: parts]
    for item in items:
        # In front of the suite's own mark: the nearest one counts.
        item.add_marker(pytest.mark.timeout(float(os.environ[TEST_TIMEOUT])), append=False)


def pytest_collection_finish(session: pytest.Session) -> None:
    _write({"collected": [item.nodeid for item in session.items]})


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _write({"test": report.nodeid, "outcome": "error", "why": str(report.longrepr)[-2000:], "seconds": 0})


def pytest_runtest_logstart(nodeid: str) -> None:
    _write({"started": nodeid})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcome = report.outcome
    if hasattr(report, "wasxfail"):
        outcome = "xfailed" if report.skipped else "xpassed"
    elif report.failed and report.when != "call":
        outcome = "error"
    elif report.passed and report.when != "call":
        return
    why = ""
    if outcome in ("failed", "error", "skipped"):
        with contextlib.suppress(AttributeError, TypeError):
            why = report.longrepr.reprcrash.message  # type: ignore[union-attr]
        why = why or str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
    _write({"test": report.nodeid, "outcome": outcome, "why": why[:2000], "seconds": round(report.duration, 2)})
