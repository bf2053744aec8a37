"""What users' tests need: ``streamtask[testing]`` beside pytest, and nothing else of what happens to be installed here."""

from __future__ import annotations

import json
import re
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from tests.helpers import ROOT, spawn

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Refuses what is not said to be there, then is `pytest ARGS`.
ONLY = """
import json, sys

refused = set(json.loads(sys.argv.pop(1)))


class Refuse:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"{name} is not installed, as this test has it", name=name)


sys.meta_path.insert(0, Refuse)
import pytest

sys.exit(pytest.main(sys.argv[1:]))
"""

TESTS = """
import sys

import pytest


def test_a_push_is_sent(streamtask_app):
    sent = []

    @streamtask_app.task(shard_key="user_id")
    def push(user_id, text):
        sent.append((user_id, text))

    @streamtask_app.task
    async def length(text):
        return len(text)

    push.delay(1, "a")
    push.delay(1, "b")
    result = length.delay("abc")
    assert streamtask_app.run_until_idle() == 3
    assert sent == [(1, "a"), (1, "b")]
    assert result.get(timeout=1) == 3


class TestOfAnAppOfTheUsers:
    @pytest.fixture
    def streamtask_app_options(self):
        return {"app": "orders:app"}

    def test_it(self, streamtask_app):
        from orders import ship

        result = ship.delay(7)
        assert streamtask_app.run_until_idle() == 1
        assert result.get(timeout=1) == "shipped 7"


def test_what_this_is_about():
    with pytest.raises(ModuleNotFoundError):
        import hypothesis
"""

ORDERS = """
from streamtask import StreamTask

app = StreamTask("orders", broker="redis://localhost:1")


@app.task(shard_key="order")
def ship(order):
    return f"shipped {order}"
"""


def extra(name: str) -> list[str]:
    found: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][name]
    return found


def brought(requirements: list[str]) -> set[str]:
    """The packages that come with these, and with what they need in their turn."""
    found: set[str] = set()
    asked: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(one) for one in requirements]
    while waiting:
        one = waiting.pop()
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        if (name, frozenset(one.extras)) in asked:
            continue
        asked.add((name, frozenset(one.extras)))
        found.add(name)
        waiting.extend(
            needed
            for needed in map(Requirement, metadata.requires(name) or ())
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in ("", *one.extras))
        )
    return found


def test_the_fixture_needs_fakeredis_alone(tmp_path: Path) -> None:
    core = brought(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    testing = brought(extra("testing"))
    assert testing - core <= {"fakeredis", "lupa", "sortedcontainers", "typing-extensions"}

    there = core | testing | brought(["pytest"]) | {"streamtask"}
    refused = [
        module
        for module, packages in metadata.packages_distributions().items()
        if not any(re.sub(r"[-_.]+", "-", package).lower() in there for package in packages)
    ]
    (tmp_path / "only.py").write_text(ONLY)
    (tmp_path / "orders.py").write_text(ORDERS)
    (tmp_path / "test_users.py").write_text(TESTS)
    args = ["-p", "streamtask.pytest_plugin", "-p", "no:cacheprovider", "-q", "-W", "error"]
    env = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": None, "STREAMTASK_BROKER_URL": None}
    with spawn("only.py", json.dumps(refused), *args, env=env, cwd=tmp_path) as process:
        assert process.wait(60) == 0, str(process)
        assert "3 passed" in process.stdout


def test_the_plugin_loads_nothing_before_a_test_asks_for_it() -> None:
    """pytest finds it by its entry point in every project where streamtask is installed, and loads it in each run."""
    [entry] = metadata.entry_points(group="pytest11", name="streamtask")
    assert entry.value == "streamtask.pytest_plugin"
    code = "import sys, pytest; before = set(sys.modules); import streamtask.pytest_plugin; print(*set(sys.modules) - before)"
    with spawn("-c", code) as process:
        assert process.wait() == 0, str(process)
        assert set(process.stdout.split()) == {"streamtask", "streamtask.pytest_plugin"}


def test_memory_says_what_it_needs() -> None:
    code = "import sys; sys.modules['lupa'] = None; from streamtask import StreamTask; StreamTask('x', broker='memory://x').send_task('t')"
    with spawn("-c", code) as process:
        assert process.wait() == 1
        assert "ConfigError: memory:// needs fakeredis with Lua: pip install 'streamtask[testing]'" in process.stderr
