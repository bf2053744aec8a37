"""Tasks in several modules, and what is said of one that can't be imported."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from streamtask import StreamTask
from streamtask.app import find_app
from streamtask.errors import ConfigError
from tests.helpers import spawn

APP = """
from streamtask import StreamTask

app = StreamTask("shop", broker="redis://localhost:1")
app.autodiscover(["shop.orders"])
app.autodiscover(["shop.mails", "shop.orders"])
"""

ORDERS = """
from shop.app import app

runs.append(__name__)
known = list(app.tasks)

@app.task(queue="orders", shard_key="n")
def ship(n): ...
"""

MAILS = """
import time
from shop.app import app

runs.append(__name__)
time.sleep(0.05)

@app.task
async def welcome(user): ...
"""

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a module of the package ``shop``, which is new in each test."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "shop").mkdir()

    def write_one(name: str, source: str) -> Path:
        path = tmp_path / "shop" / f"{name}.py"
        path.write_text(source)
        return path

    write_one("__init__", "")
    return write_one


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr("builtins.runs", found, raising=False)
    return found


@pytest.fixture
def app(write: Write, runs: list[str]) -> StreamTask:
    for name, source in {"app": APP, "orders": ORDERS, "mails": MAILS}.items():
        write(name, source)
    return find_app("shop.app")


def test_modules_are_imported_when_a_task_is_looked_up(app: StreamTask, runs: list[str]) -> None:
    assert runs == []
    assert sorted(app.tasks) == ["shop.mails.welcome", "shop.orders.ship"]
    assert app.queue_names() == ["default", "orders"]
    assert runs == ["shop.orders", "shop.mails"]  # though one of them looks tasks up itself


@pytest.mark.parametrize("use", [StreamTask.queue_names, StreamTask.runner, StreamTask.worker_settings])
def test_what_a_worker_asks_for_looks_them_up(use: Callable[[StreamTask], object], app: StreamTask) -> None:
    use(app)
    assert {"shop.orders", "shop.mails"} <= set(sys.modules)


def test_threads_that_look_up_at_once_find_all(app: StreamTask, runs: list[str]) -> None:
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(len(app.tasks))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [2] * 8
    assert sorted(runs) == ["shop.mails", "shop.orders"]


CIRCLE = {"one": "from shop.two import b\na = 1\n", "two": "from shop.one import a\nb = 1\n"}

BROKEN = {
    "not_there": ({}, "there is no module 'shop.one' (HERE): run from the folder that holds it, or install it"),
    "needs what is not there": ({"one": "import os\nimport nosuch.x\n"}, "in one.py, line 2: ModuleNotFoundError: No mod"),
    "in a circle": (CIRCLE, "in two.py, line 1: ImportError: cannot import name 'a' from partially initialized module"),
    "no package": ({"one": "\nimport shop.one.more\n"}, "in one.py, line 2: ModuleNotFoundError: No module named 'shop.o"),
    "no such name": ({"one": "from shop import less\n"}, "in one.py, line 1: ImportError: cannot import name 'less'"),
    "no Python": ({"one": "x = 1\ndef f(:\n"}, "in one.py, line 2: SyntaxError: invalid syntax"),
    "raises": ({"one": "x = 1\n1 / 0\n"}, "in one.py, line 2: ZeroDivisionError: division by zero"),
    "raises in a library": ({"one": "import json\njson.loads('x')\n"}, "in one.py, line 2: JSONDecodeError: Expecting"),
    "raises in another": ({"one": "import shop.two\n", "two": "\n\n1 / 0\n"}, "in two.py, line 3: ZeroDivisionError"),
    "ends": ({"one": "import sys\nsys.exit('no')\n"}, "in one.py, line 2: SystemExit: no"),
    "wrong setting": ({"one": "import streamtask\n\nstreamtask.StreamTask('x', colour=1)\n"}, "in one.py, line 3: unknown set"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_said_of_a_module_that_cannot_be_imported(case: str, write: Write) -> None:
    sources, text = BROKEN[case]
    files = {name: write(name, source) for name, source in sources.items()}
    for name, path in files.items():
        text = text.replace(f"in {name}.py", f"in {path}")
    app = StreamTask("shop", broker="redis://localhost:1")
    app.autodiscover(["shop.one"])
    asked = "autodiscover of app 'shop'"
    start = "" if not files else f"the module 'shop.one' ({asked}) can't be imported: "
    for _ in range(2):  # and again, as long as it is so
        with pytest.raises(ConfigError) as raised:
            app.queue_names()
        assert str(raised.value).startswith(start + text.replace("HERE", asked))
    with pytest.raises(ConfigError) as raised:
        find_app("shop.one")
    assert str(raised.value).startswith((start + text.replace("HERE", asked)).replace(asked, "-A shop.one"))


@pytest.mark.parametrize("modules", ["shop.orders", [], None, [5], [""], ["shop."], [".orders"], ["shop/orders.py"], 5])
def test_wrong_names_are_refused_at_the_call(modules: object) -> None:
    app = StreamTask("shop", broker="redis://localhost:1")
    with pytest.raises(ConfigError, match=r"autodiscover takes a list of modules' full names"):
        app.autodiscover(modules)  # type: ignore[arg-type]


def test_an_app_whose_script_is_imported_again_is_told(tmp_path: Path) -> None:
    """It has none of the others' tasks, and would send them without their keys."""
    (tmp_path / "one.py").write_text(
        "from streamtask import StreamTask\n"
        "app = StreamTask('shop', broker='redis://localhost:1')\n"
        "app.autodiscover(['two'])\n"
        "if __name__ == '__main__':\n"
        "    import logging\n"
        "    logging.basicConfig()\n"
        "    print(len(app.tasks), len(app.tasks))\n"
    )
    (tmp_path / "two.py").write_text("from one import app\n\n@app.task\ndef ship(n): ...\n")
    with spawn("one.py", cwd=tmp_path) as script:
        assert script.wait() == 0, str(script)
        assert script.stdout.strip() == "0 0"
        assert script.stderr.count("there are two apps 'shop'") == 1, script.stderr
