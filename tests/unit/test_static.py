"""The checks of ``tests/static.py`` find what they are for, in a source tree with planted faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import static


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes files of a small ``streamtask`` that the checks look at."""
    monkeypatch.setattr(static, "ROOT", tmp_path)
    monkeypatch.setattr(static, "SOURCE", tmp_path / "streamtask")
    monkeypatch.setattr(static, "LUA", tmp_path / "streamtask" / "redis" / "lua")

    def write(name: str, text: str) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    return write


OWNER = (
    "class Owner:\n    def __init__(self):\n        self._kept = 1\n    def _look(self):\n        return self._kept\n"
)


@pytest.mark.parametrize(
    "text",
    [
        "from .owner import Owner\nprint(Owner()._kept)\n",
        "from .owner import Owner\nclass More(Owner):\n    def look(self):\n        return self._kept\n",
        "from .owner import Owner\nclass More(Owner):\n    def look(self):\n        return super()._look()\n",
        "from .owner import _hidden\n",
        "def look(anything):\n    return anything._inside\n",
    ],
)
def test_a_private_name_of_another_module_is_found(tree: Any, text: str) -> None:
    tree("streamtask/owner.py", OWNER)
    tree("streamtask/user.py", text)
    found = list(static.private_names())
    assert len(found) == 1
    assert found[0].startswith("streamtask/user.py:")


def test_what_is_the_modules_own_is_free(tree: Any) -> None:
    tree("streamtask/owner.py", OWNER + "def same(one, other):\n    return one._kept == other._kept\n")
    tree(
        "streamtask/user.py",
        "import os\nclass Mine(dict):\n    def end(self):\n        self._of_a_base()\n        os._exit(0)\n",
    )
    assert list(static.private_names()) == []


def test_a_cycle_is_found_and_what_hangs_on_it_is_not(tree: Any) -> None:
    tree("streamtask/__init__.py", "")
    tree("streamtask/one.py", "def late():\n    from .two import b\n")
    tree(
        "streamtask/two.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .one import a\nfrom . import low\n",
    )
    tree("streamtask/high.py", "from .one import a\n")
    tree("streamtask/low.py", "")
    assert [line.split(":")[0] for line in static.cycles()] == ["streamtask/one.py", "streamtask/two.py"]


@pytest.mark.parametrize(
    "said",
    ["`queue/gone.py`", "`gone.lua`", "`tests/gone.py::test_x`", "`Owner.gone`", "`streamtask.owner.Gone`", "`gone/`"],
)
def test_a_name_that_is_not_there_is_found(tree: Any, said: str) -> None:
    tree("streamtask/owner.py", OWNER)
    tree("docs/page.md", f"Look at {said}.\n")
    found = list(static.names_that_are_not_there())
    assert len(found) == 1
    assert found[0].startswith("docs/page.md:1: ")


def test_names_that_are_there_and_code_blocks_are_free(tree: Any) -> None:
    tree("streamtask/owner.py", OWNER)
    tree("streamtask/redis/lua/ring.lua", "")
    tree(
        "docs/page.md",
        "`owner.py`, `streamtask/`, `ring.lua`, `Owner.look`\n\n```\n`gone.py`\n```\n".replace("look", "_look"),
    )
    tree("streamtask/other.py", '"""See ``owner.py`` and ``lua/ring.lua``."""\n')
    assert list(static.names_that_are_not_there()) == []


HEAD = "-- Does something that takes some words to say.\n-- KEYS[1] lease  hash\n-- ARGV[1] token\n-- Returns: 1\n"


@pytest.mark.parametrize(
    "head,body",
    [
        (HEAD, "return ARGV[1]"),
        (HEAD, "return KEYS[1] .. ARGV[1] .. ARGV[2]"),
        (HEAD, "return KEYS[1] .. #ARGV"),
        (HEAD.replace("ARGV[1]", "ARGV[2]"), "return KEYS[1] .. ARGV[2]"),
        (HEAD.replace("Returns", "Gives"), "return KEYS[1] .. ARGV[1]"),
        ("-- No.\n" + HEAD.split("\n", 1)[1], "return KEYS[1] .. ARGV[1]"),
    ],
)
def test_a_head_that_does_not_fit_is_found(tmp_path: Path, head: str, body: str) -> None:
    file = tmp_path / "do_it.lua"
    file.write_text(HEAD + "return KEYS[1] .. ARGV[1]\n")
    assert list(static.head_faults(file)) == []
    file.write_text(f"{head}{body}\n")
    assert list(static.head_faults(file)) != []


@pytest.mark.parametrize(
    "line",
    [
        'link.command("GET", key)',
        'pack("XADD", key)',
        'client.execute_command("PING")',
        'ends = ("XREVRANGE", key, "+")',
        "self.broker.link()",
        "broker.client().get(key)",
    ],
)
def test_a_command_or_a_connection_outside_of_redis_is_found(tree: Any, line: str) -> None:
    tree("streamtask/redis/commands.py", line + "\n")
    tree("streamtask/queue/fine.py", "link.call(commands.value(key))\nbroker.link(key)\nlog('INFO')\n")
    assert list(static.redis_elsewhere()) == []
    tree("streamtask/queue/wrong.py", line + "\n")
    (found,) = static.redis_elsewhere()
    assert found.startswith("streamtask/queue/wrong.py:1: ")
