"""The plugin in real workers, over our transport."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from tests.fix_redis import RedisServer
from tests.helpers import spawn, wait_until

pytestmark = pytest.mark.slow

NOTES = "notes"  # of tests.plugin.work, which is not imported here: it connects to signals
POOLS = ["prefork", "threads", "gevent", "eventlet", "solo"]


class Rig:
    """An app to publish with, workers, and what they wrote down."""

    def __init__(self, server: RedisServer, stack: contextlib.ExitStack) -> None:
        self.server, self._stack = server, stack
        self.notes: redis.Redis = redis.Redis(port=server.port, db=2)
        stack.callback(self.notes.close)

    def environment(self, **conf: Any) -> dict[str, str | None]:
        return {"WORK_PORT": str(self.server.port), "WORK_CONF": json.dumps(conf)}

    def worker(self, pool: str, c: int = 4, **conf: Any) -> Any:
        worker = self._stack.enter_context(
            spawn(
                "-m", "celery", "-A", "tests.plugin.work", "worker", "-P", pool, "-c", str(c), "--loglevel", "INFO",
                "--without-mingle", "--without-gossip", env=self.environment(**conf),
            )
        )  # fmt: skip
        self._stack.callback(lambda: print(worker))  # pytest shows it with a failure
        return worker

    def run(self, script: str, **conf: Any) -> str:
        """Runs a script with the app in a process of its own; what it printed."""
        with spawn("-c", f"from tests.plugin.work import *\n{script}", env=self.environment(**conf)) as process:
            assert process.wait(30) == 0, str(process)
            return process.stdout

    def told(self, kind: str, **of: Any) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.notes.lrange(NOTES, 0, -1)]
        return [one for one in found if one["kind"] == kind and all(one.get(k) == v for k, v in of.items())]

    def wait(self, kind: str, count: int = 1, timeout: float = 20, **of: Any) -> list[dict[str, Any]]:
        def enough() -> list[dict[str, Any]] | None:
            found = self.told(kind, **of)
            return found if len(found) >= count else None

        return wait_until(enough, timeout, lambda: f"{count} {kind} {of}; {self.bodies()}", poll=0.02) or []

    def bodies(self) -> list[tuple[str, Any]]:
        found = [json.loads(line) for line in self.notes.lrange(NOTES, 0, -1)]
        return [(one["kind"], one.get("n")) for one in found if one["kind"] in ("start", "end")]


@pytest.fixture
def rig(own_server: RedisServer) -> Iterator[Rig]:
    with contextlib.ExitStack() as stack:
        yield Rig(own_server, stack)


# --- publishing --------------------------------------------------------------------------------------------------------

TAKEN = """
with app.connection_for_read() as connection, connection.SimpleQueue("celery") as queue:
    headers = queue.get(timeout=5).headers
    print("key", headers.get("shard_key"), headers["streamtask_delivery"]["queue"])
"""


@pytest.mark.parametrize("protocol", [1, 2])
@pytest.mark.parametrize(
    "call", ["keyed.delay('a')", "keyed.apply_async(('b',), shard_key='a')", "app.send_task('x', shard_key='a')"]
)
def test_the_first_publish_of_a_process_has_its_key(rig: Rig, protocol: int, call: str) -> None:
    """Nothing has imported the plugin before: the transport does, while this message is on its way."""
    script = f"""
import sys
assert "streamtask.celery" not in sys.modules
{call}
assert "streamtask.celery" in sys.modules
{TAKEN}"""
    assert rig.run(script, task_protocol=protocol) == "key a celery\n"


def test_the_first_publish_of_a_process_is_refused(rig: Rig) -> None:
    script = """
try:
    keyed.delay(None)
except Exception as exc:
    print(type(exc).__name__, str(exc)[:60])
"""
    assert rig.run(script) == "ShardKeyError task tests.plugin.work.keyed, shard_key='k': the shard key i\n"


# --- late acknowledgement ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [1, 2])
@pytest.mark.parametrize("pool", POOLS)
def test_any_call_with_a_key_waits_for_its_turn(rig: Rig, pool: str, protocol: int) -> None:
    """Also of a task that is acknowledged before it runs, and of a list of calls in one message."""
    rig.worker(pool, task_protocol=protocol)
    rig.run(
        """
for n in range(6):
    early.apply_async((n,), shard_key="a")
keyed.starmap([("a", 6), ("a", 7)]).delay()
keyed.delay("a", 8)
""",
        task_protocol=protocol,
    )
    rig.wait("end", n=8)
    assert rig.bodies() == [(kind, n) for n in range(9) for kind in ("start", "end")]


def test_a_call_without_a_key_is_acknowledged_as_configured(rig: Rig) -> None:
    """Its process dies in the body: what was acknowledged is gone, what has a key comes back, and before its follower."""
    rig.worker("prefork", c=2)
    rig.run("dying.delay(1)")
    rig.wait("start", n=1)
    rig.run("dying.apply_async((2,), shard_key='a'); early.apply_async((3,), shard_key='a')")
    rig.wait("end", n=3)
    assert rig.bodies() == [("start", 1)] + [("start", 2)] * 2 + [("end", 2), ("start", 3), ("end", 3)]


# --- retries -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [1, 2])
@pytest.mark.parametrize("pool", POOLS)
def test_a_retry_says_what_it_replaces(rig: Rig, pool: str, protocol: int) -> None:
    rig.worker(pool, task_protocol=protocol)
    rig.run("retrying.delay('a', 1); keyed.delay('a', 2)", task_protocol=protocol)
    rig.wait("end", n=2)
    rig.wait("end", n=100)
    assert [one for one in rig.bodies() if one[1] != 100] == [
        ("start", 1), ("start", 1), ("end", 1), ("start", 2), ("end", 2),
    ]  # fmt: skip
    first, again = rig.told("published", name="tests.plugin.work.retrying")
    assert "streamtask_replaces" not in first
    assert {"queue", "entry", "token"} <= again["streamtask_replaces"].keys()
    assert again["shard_key"] == "a"
    (leaked,) = rig.told("published", name="tests.plugin.work.early")
    assert leaked.keys() == {"kind", "pid", "name"}


def test_the_retry_of_a_lost_pool_process_keeps_its_place(rig: Rig) -> None:
    """``task_retry_on_worker_lost``: the main process publishes the retry."""
    conf = {"task_retry_on_worker_lost": True, "task_annotations": {"*": {"default_retry_delay": 0.2}}}
    rig.worker("prefork", c=2, **conf)
    rig.run("dying.apply_async((1,), shard_key='a'); early.apply_async((2,), shard_key='a')")
    rig.wait("end", n=2)
    assert rig.bodies() == [("start", 1), ("start", 1), ("end", 1), ("start", 2), ("end", 2)]
    _, again = rig.told("published", name="tests.plugin.work.dying")
    assert "streamtask_replaces" in again


# --- canvas ------------------------------------------------------------------------------------------------------------


def test_callbacks_and_chains_are_keyed(rig: Rig) -> None:
    rig.worker("prefork", c=2)
    rig.run(
        """
import streamtask.celery
from celery import chain, chord
keyed.apply_async(("a", 1), link=keyed.s(2))
chain(keyed.s("b", 3), keyed.s(4), keyed.si("c", 5).set(shard_key="d")).delay()
failing.apply_async(("e",), link_error=of_task_id.s())
chord([keyed.s("f", 6)], keyed.si("g", 7)).delay()
"""
    )
    for n in range(1, 8):
        rig.wait("end", n=n)
    rig.wait("errback")
    published = rig.told("published", name="tests.plugin.work.keyed")
    assert sorted(one["shard_key"] for one in published) == ["a", "a", "b", "b", "d", "f", "g"]
    (failed,) = rig.told("published", name="tests.plugin.work.of_task_id")
    assert len(failed["shard_key"]) == 36  # the id of the task that failed


# --- the start of a body -----------------------------------------------------------------------------------------------

GUARDED = """
from celery.contrib.testing.worker import start_worker

given_back = []
with start_worker(app, pool="{pool}", perform_ping_check=False, loglevel="INFO"):
    deliveries = app.connection_for_write().transport.session.deliveries
    really = deliveries.start
    def start(*args):
        if not given_back:
            given_back.append(deliveries.reject(args[0], requeue=True))
        return really(*args)
    deliveries.start = start
    {name}.delay(*{first}).get(timeout=10)
    {name}.delay(*{second}).get(timeout=10)
    print(given_back)
"""


@pytest.mark.parametrize("pool", ["threads", "solo"])
@pytest.mark.parametrize("name", ["keyed", "early"])
def test_a_body_does_not_start_when_its_message_was_given_back(rig: Rig, pool: str, name: str) -> None:
    """It comes again, and runs then; a keyed one keeps its place."""
    first, second = (("a", 1), ("a", 3)) if name == "keyed" else ((1,), (3,))
    assert rig.run(GUARDED.format(pool=pool, name=name, first=first, second=second)) == "[True]\n"
    assert rig.bodies() == [("start", 1), ("end", 1), ("start", 3), ("end", 3)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_pool_process_with_a_transport_of_its_own_runs_its_bodies(rig: Rig, method: str) -> None:
    """What its own transport was given says nothing about the messages that it is handed."""
    rig.worker("prefork", c=1, worker_pool_start_method=method)
    rig.run("for n in range(3): publishing.delay('a', n)")
    for n in range(3):
        rig.wait("end", n=n, k="a")
        rig.wait("end", n=n, k="other")


def test_a_forked_child_that_connects_knows_what_is_its_own(rig: Rig) -> None:
    """A worker may be started in a child of a process that has published."""
    script = """
import os, streamtask.celery
from streamtask.transport import sessions
app.connection_for_write().transport
if not (pid := os.fork()):
    inherited = sessions.active(), sessions.begin("unknown", False, False)
    app.connection_for_write(transport_options=app.conf.broker_transport_options).transport
    os._exit(0 if inherited == (False, True) and sessions.active() and not sessions.begin("unknown", False, False) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert rig.run(script) == "0\n"


PRELOADED = """
import os
def use():
    return [*app.control.ping(timeout=10, limit=1), keyed.delay("a", os.getpid()).get(timeout=10)]
while not app.control.ping(timeout=5, limit=1):
    pass
before = use()
assert len(before) == 2
for _ in range(2):
    if not (pid := os.fork()):
        os._exit(0 if use() == before else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
assert use() == before
"""


def test_a_forked_child_pings_and_publishes(rig: Rig) -> None:
    """Of a process that has done both, as a web server that loads the app before it forks."""
    rig.worker("solo")
    assert rig.run(PRELOADED) == "0\n0\n"


# --- a closed channel --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cancelled", [False, True])
def test_what_runs_is_kept_when_a_channel_closes(rig: Rig, cancelled: bool) -> None:
    script = f"""
from streamtask.celery.worker import LateTask, keep_active
from kombu import Message
from celery.worker import state
from celery.worker.request import Request

app.conf.worker_cancel_long_running_tasks_on_connection_loss = {cancelled}
requests = [
    Request(
        Message(body=((), {{}}, None), delivery_tag=f"tag{{n}}", headers={{"id": str(n), "task": "tests.plugin.work.keyed"}}),
        app=app, task=LateTask(lambda: app.tasks["tests.plugin.work.keyed"]), decoded=True,
    )
    for n in range(3)
]
state.task_reserved(requests[0])
state.task_accepted(requests[1])
state.task_accepted(requests[2])
print(sorted(keep_active(["tag0", "tag1", "other"])))
"""
    assert rig.run(script) == ("[]\n" if cancelled else "['tag1']\n")
