"""An app whose tasks lie in several modules, by the command line."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.fix_redis import RedisServer
from tests.helpers import spawn

APP = """
from streamtask import StreamTask

app = StreamTask("shop", backend=True)
app.autodiscover(["shop.orders", "shop.mails"])
"""

ORDERS = """
from shop.app import app

@app.task(shard_key="order", queue="orders")
def ship(order):
    return f"shipped {order}"
"""

MAILS = """
from shop.app import app

@app.task
async def welcome(user):
    return f"welcome {user}"
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "shop").mkdir()
    for name, source in {"__init__": "", "app": APP, "orders": ORDERS, "mails": MAILS}.items():
        (tmp_path / "shop" / f"{name}.py").write_text(source)
    return tmp_path


def test_a_worker_runs_the_tasks_of_all_modules(shop: Path, redis_server: RedisServer) -> None:
    env = {"STREAMTASK_BROKER_URL": redis_server.url, "STREAMTASK_APP": "shop.app"}
    with spawn("-m", "streamtask", "worker", "-p", "1", env=env, cwd=shop) as worker:
        for task, argument, result in (("shop.orders.ship", 7, "shipped 7"), ("shop.mails.welcome", "a", "welcome a")):
            call = ("call", task, "--args", json.dumps([argument]), "--wait", "20", "--json")
            with spawn("-m", "streamtask", *call, env=env, cwd=shop) as called:
                assert called.wait(30) == 0, f"{called}\n{worker}"
                assert json.loads(called.stdout)["result"] == result
        assert "tasks      shop.mails.welcome, shop.orders.ship" in worker.stderr
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0, str(worker)


@pytest.mark.parametrize("command", [("worker", "-p", "1"), ("call", "shop.orders.ship")])
def test_a_module_that_cannot_be_imported_is_named(
    shop: Path, redis_server: RedisServer, command: tuple[str, ...]
) -> None:
    mails = shop / "shop" / "mails.py"
    mails.write_text("import os\nfrom shop.app import nothing\n")
    env = {"STREAMTASK_BROKER_URL": redis_server.url, "STREAMTASK_APP": "shop.app"}
    with spawn("-m", "streamtask", *command, env=env, cwd=shop) as process:
        assert process.wait() == 2, str(process)
        assert process.stdout == ""
        assert process.stderr.startswith(
            f"Error: the module 'shop.mails' (autodiscover of app 'shop') can't be imported: in {mails}, line 2: ImportError: "
            "cannot import name 'nothing' from 'shop.app'"
        )
        assert process.stderr.endswith(". --traceback shows the way there\n")
        assert process.stderr.count("--traceback") == 1
        assert "Traceback" not in process.stderr
