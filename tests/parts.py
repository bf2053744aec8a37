"""The parts of the suite: ``make test`` runs the quick one, ``make test-rest`` what CI runs beside it, ``make test-more`` the
same again in more ways, ``make test-all`` everything.

``--part quick``, ``rest`` or ``more`` chooses; without it everything is run. Which part a test is in follows from where
it stands, so a new one needs no thought:

- a run on another than the newest redis-server is in the rest (of some tests only with a few values: the mark ``old_redis``);
- so is everything in ``SLOW_FOLDERS``, whose tests play with whole sites of processes, and what uses one of
  ``SLOW_FIXTURES``, which start several servers;
- of those, more is what whole workers and consumers do on an older server (scripts, queues and chaos are in the rest on each),
  and the values that ``sampled`` leaves out;
- all else is quick.

The marks ``quick`` and ``slow`` say otherwise for a test, a class, a module or one set of parameters; the nearest one
counts. A quick run names at its end what took longer than a quick test should.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from tests.fix_redis import chosen_binaries

QUICK, REST, MORE = "quick", "rest", "more"

SLOW_FOLDERS = frozenset({"celery", "chaos", "conformance"})
SLOW_FIXTURES = frozenset({"redis_cluster", "sentinels"})

ON_ONE_SERVER = frozenset({"acceptance", "celery", "transport", "worker"})

LONG_S = 10
"""On a quiet machine a test of the quick part takes less."""


def part_of(item: pytest.Item, newest: str | None) -> str:
    """``quick`` or ``rest``; ``newest`` is the label of the newest server."""
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    folder = item.path.relative_to(item.config.rootpath / "tests").parts[0]
    marks = [mark.name for mark in item.iter_markers() if mark.name in ("quick", "slow", "more")]  # the nearest first
    if marks and marks[0] == "more":
        return MORE
    if params.get("redis_version", newest) != newest:
        return MORE if folder in ON_ONE_SERVER else REST
    if marks:
        return QUICK if marks[0] == "quick" else REST
    if SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())):
        return REST
    return REST if folder in SLOW_FOLDERS else QUICK


def sampled(values: Iterable[Any], *quick: Any) -> list[Any]:
    """The values for ``parametrize``, of which ``make test`` and CI take these alone."""
    return [
        value
        if value in quick
        else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.more)
        for value in values
    ]


def wanted_there(item: pytest.Item, newest: str | None) -> bool:
    """Whether to run a test on its server: ``old_redis(a, b)`` says with which values alone on another than the newest."""
    mark = item.get_closest_marker("old_redis")
    if mark is None or not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return True
    params = item.callspec.params
    return params.get("redis_version", newest) == newest or any(value in mark.args for value in params.values())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part", choices=(QUICK, REST, MORE), help="run one of the parts of the suite; see tests/parts.py"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted: str | None = config.getoption("part")
    newest = next(reversed(chosen_binaries(config)), None)
    config.hook.pytest_deselected(items=[item for item in items if not wanted_there(item, newest)])
    items[:] = [item for item in items if wanted_there(item, newest)]
    if wanted is None:
        return
    parts = {item: part_of(item, newest) for item in items}
    config.hook.pytest_deselected(items=[item for item in items if parts[item] != wanted])
    items[:] = [item for item in items if parts[item] == wanted]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("part") != QUICK:
        return
    spent: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                spent[report.nodeid] = spent.get(report.nodeid, 0) + report.duration
    long = sorted(((s, name) for name, s in spent.items() if s > LONG_S), reverse=True)
    if long:
        terminalreporter.section(f"took over {LONG_S} s: the mark 'slow' moves a test to the rest")
        for seconds, name in long[:10]:
            terminalreporter.line(f"{seconds:.0f} s  {name}")
