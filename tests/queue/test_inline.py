"""``run_until_idle`` and the pytest fixture: the real scripts and consumer, in the calling process."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import datetime as dt
import os
import pickle
import shutil
import subprocess
import sys
import uuid

import pytest

from streamtask import (
    ConfigError,
    DecodeError,
    Dedupe,
    EncodeError,
    Ignore,
    Middleware,
    Reject,
    ResultTimeout,
    StreamTask,
    TaskError,
    TaskRevoked,
)
from streamtask.operations import Inspector
from tests.helpers import ROOT


@pytest.fixture(params=["memory", "redis"])
def make(request):
    """Makes apps, on fakeredis and on a real server."""
    apps = []

    def build(**options):
        if request.param == "memory":
            url = f"memory://{uuid.uuid4().hex}"
        else:
            url = request.getfixturevalue("redis_server").url
        apps.append(StreamTask("app", broker=url, backend=True, **options))
        return apps[-1]

    yield build
    for app in apps:
        app.close()


def test_runs_what_is_queued_in_order_with_retries_and_delays(make):
    app = make()
    starts = []

    @app.task(shard_key="user", retry_backoff=0.01)
    def note(user, n):
        starts.append((user, n))
        if n == 1 and starts.count((user, n)) < 3:
            raise ValueError("not yet")
        return n * 10

    results = [note.delay("a", n) for n in range(3)]
    late = note.apply_async(("a", 9), countdown=0.05)

    assert app.run_until_idle() == 4
    assert starts == [("a", 0), ("a", 1), ("a", 1), ("a", 1), ("a", 2), ("a", 9)]
    assert [result.get(timeout=1) for result in results] == [0, 10, 20]
    assert late.get(timeout=1) == 90
    assert app.run_until_idle() == 0


class Opened:
    """Writes down that it was unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.makedirs, (self.path, 0o700, True)


def test_what_an_app_or_a_task_accepts_it_accepts_for_itself(redis_server, tmp_path):
    """Others of the same process load none of it, nor do an operator's commands."""
    ran = []

    def make(pickled="", **options):
        app = StreamTask("app", broker=redis_server.url, **options)
        for name in ("one", "other"):
            serializer = "pickle" if name == pickled else None
            app.task(lambda value, name=name: ran.append(name), name=name, serializer=serializer)
        return app

    trusting = make(serializer="pickle")
    by_task, strict = make(pickled="one"), make()
    file = tmp_path / "opened"
    for app, accepted in ((strict, ()), (by_task, ("one",)), (trusting, ("one", "other"))):
        for name in ("one", "other"):
            trusting.tasks[name].delay(Opened(file))
            app.run_until_idle(fail_fast=False)
        with Inspector(app) as inspector:
            letters = inspector.dead_letters("default")
            assert all("untrusted content of type pickle" in letter["error"] for letter in letters)
            assert inspector.drop("default") == len(letters) == 2 - len(accepted)
        assert ran == [*accepted]
        assert file.exists() == bool(accepted)
        ran.clear()
        shutil.rmtree(file, ignore_errors=True)
        app.close()


def test_no_app_loads_more_of_a_result_than_plain_values(make, tmp_path):
    """Whatever its messages may be made of: whoever may write to Redis may write a result."""
    file = tmp_path / "opened"
    trusting, strict = make(serializer="pickle", accept_content=["yaml"]), make()
    for app in (trusting, strict):
        returned = app.task(lambda: Opened(file), name="return").delay()
        forged = app.task(lambda: None, name="forged").delay()
        app.run_until_idle()
        with pytest.raises(TaskError, match="its result can't be serialised"):
            returned.get(timeout=1)
        with contextlib.closing(app.broker.link()) as link:
            link.command("SET", app.results.key(forged.id), pickle.dumps(Opened(file)))
        with pytest.raises(DecodeError, match="can't be decoded"):
            forged.get(timeout=1)
        assert not file.exists()


def test_a_dead_letter_fails_fast_and_says_why(make):
    app = make()

    @app.task
    def refuse():
        raise Reject("no")

    result = refuse.delay()

    with pytest.raises(TaskError, match="rejected: no"):
        app.run_until_idle()
    with pytest.raises(TaskError, match="rejected: no"):
        result.get(timeout=1)
    assert result.failed()


def test_what_is_revoked_does_not_run(make):
    """Nor what a body before it revokes, also of the same batch."""
    app = make()
    ran = []

    @app.task(shard_key="key")
    def note(key, n, revokes=()):
        ran.append(n)
        for task_id in revokes:
            app.AsyncResult(task_id).revoke()

    names = [f"m{n}" for n in range(6)]
    results = [
        note.apply_async(("a", n, names[n + 2 : n + 3] if n in (1, 3) else ()), task_id=name)
        for n, name in enumerate(names)
    ]
    results[0].revoke()
    assert app.run_until_idle() == 4
    assert ran == [1, 2, 4, 5]
    states = ["REVOKED", "SUCCESS", "SUCCESS", "REVOKED", "SUCCESS", "SUCCESS"]
    assert [result.state for result in results] == states


def test_a_call_may_name_another_queue(make):
    app = make()
    seen = []

    @app.task(bind=True, shard_key="key")
    def note(self, key):
        seen.append((self.request.queue, key))

    note.apply_async(("a",), queue="urgent")
    asyncio.run(note.aapply_async(("b",), queue="urgent"))
    note.delay("c")
    first = note.apply_async(("d",), queue="urgent", dedupe_id="x")
    assert note.apply_async(("d",), queue="urgent", dedupe_id="x").stored is False
    assert note.apply_async(("d",), dedupe_id="x").stored  # a dedupe id is of its queue
    later = note.apply_async(("e",), queue="urgent")
    later.revoke()
    assert app.run_until_idle() == 5
    assert sorted(seen) == [("default", "c"), ("default", "d"), ("urgent", "a"), ("urgent", "b"), ("urgent", "d")]
    assert first.get(timeout=1) is None
    with pytest.raises(TaskRevoked):
        later.get(timeout=1)


def test_what_keeps_no_result_says_so_at_once(make):
    app = make()
    ignored = app.task(lambda: 1, name="ignored", ignore_result=True)

    def end():
        raise Ignore

    ends = app.task(end, name="ends").delay()
    sent = [ignored.delay(), *ignored.send_many([{}]), ignored.apply_async(), asyncio.run(ignored.adelay())]
    for result in sent:
        with pytest.raises(ConfigError, match="task 'ignored' keeps no results: it has ignore_result=True"):
            result.get()
        with pytest.raises(ConfigError, match="keeps no results"):
            _ = result.state
    assert app.run_until_idle() == 5
    assert (ends.get(timeout=1), ends.state, ends.ready(), ends.successful()) == (None, "IGNORED", True, False)


def test_asyncio_calls(make):
    app = make()

    @app.task(shard_key="n")
    def double(n):
        return 2 * n

    async def send():
        one = await double.adelay(1)
        two = await double.aapply_async((2,), countdown=0.01)
        many = await double.asend_many([{"n": 3}, ((4,), {})])
        return [one, two, *many]

    results = asyncio.run(send())
    assert app.run_until_idle() == 4

    async def get():
        return await asyncio.gather(*(result.aget(timeout=5) for result in results))

    assert asyncio.run(get()) == [2, 4, 6, 8]


def test_unkeyed_and_async_tasks_run(make):
    app = make()

    @app.task
    async def double(n):
        return n * 2

    assert double.delay(4).id
    result = double.delay(21)
    assert app.run_until_idle() == 2
    assert result.get(timeout=1) == 42


def test_in_a_test_that_has_a_running_loop(make):
    """As with pytest-asyncio: what runs sees the context of the call, and an error comes out as elsewhere."""
    app = make()
    who = contextvars.ContextVar("who")

    @app.task(shard_key="n")
    async def waits(n):
        await asyncio.sleep(0)
        return [n, who.get()]

    @app.task(shard_key="n", max_retries=0)
    def works(n):
        return [1 // n, asyncio.run(waits.function(n))]

    async def test():
        who.set("me")
        results = [await waits.adelay(1), works.delay(1)]
        assert app.run_until_idle() == 2
        assert [await result.aget(timeout=5) for result in results] == [[1, "me"], [1, [1, "me"]]]
        works.delay(0)
        with pytest.raises(TaskError, match="ZeroDivisionError"):
            app.run_until_idle()

    asyncio.run(test())


def test_what_json_cannot_hold_is_refused_and_pickle_holds(make):
    app = make()
    as_json = app.task(lambda value: value, name="json", serializer="json")
    as_pickle = app.task(lambda value: value, name="pickle", serializer="pickle")
    for value in ("caf\udce9", {"a": ["\ud83d"]}):
        with pytest.raises(EncodeError, match=r"'json' can't be serialised as json: .*surrogate"):
            as_json.delay(value)
        with pytest.raises(EncodeError, match="surrogate"):
            asyncio.run(as_json.adelay(value=value))
    values = {as_json: ["C:\\users", "\U0001f600"], as_pickle: [{(1, 2): "C:\\users"}, "C:\\ud83d", "\U0001f600"]}
    sent = [(value, task.delay(value)) for task, all_of_it in values.items() for value in all_of_it]
    assert app.run_until_idle() == len(sent)
    for value, result in sent:
        assert result.get(timeout=1) == value


def test_a_retry_whose_time_has_come_runs_at_once(make):
    """A countdown that was reckoned, as until a limit is lifted."""
    app = make()
    tries = []

    @app.task(bind=True, shard_key="n", max_retries=2)
    def again(self, n):
        tries.append(n)
        if len(tries) < 3:
            raise self.retry(countdown=(-0.01, dt.timedelta(seconds=-5))[len(tries) - 1])

    again.delay(1)
    assert app.run_until_idle() == 1
    assert tries == [1, 1, 1]


def test_however_a_body_ends_the_others_run(make):
    app = make()
    ran = []

    @app.task(max_retries=0)
    async def stops():
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0)
        ran.append("stops")

    @app.task(max_retries=0)
    def closes():
        asyncio.get_event_loop().close()
        sys.exit(3)

    @app.task(max_retries=0)
    async def exits():
        await asyncio.create_task(closes.function())

    @app.task(max_retries=0)
    def follows():
        ran.append("follows")

    for task in (stops, closes, stops, exits, follows):
        task.delay()
    assert app.run_until_idle(fail_fast=False) == 3
    assert ran == ["stops", "stops", "follows"]
    with Inspector(app) as inspector:
        said = sorted(letter["error"].partition(" (")[0] for letter in inspector.dead_letters("default"))
        assert said == ["RuntimeError: Cannot close a running event loop", "SystemExit: 3"]


def test_a_retry_gets_what_was_sent(make):
    app = make()
    seen = []

    @app.task(shard_key="user", max_retries=2, retry_backoff=False, dont_autoretry_for=(KeyError,))
    def grow(user, items):
        seen.append(list(items))
        items.append("x")
        raise ValueError

    grow.delay("u", ["a"])
    app.run_until_idle(fail_fast=False)
    assert seen == [["a"]] * 3


def test_hooks_run_in_a_stable_order(make):
    calls = []

    class Recorder(Middleware):
        def __init__(self, name):
            self.name = name

        def before_send(self, message):
            calls.append(f"{self.name}.before_send")
            message.headers["by"] = self.name

        def after_send(self, message, stored):
            calls.append(f"{self.name}.after_send")

        def before_run(self, request):
            calls.append(f"{self.name}.before_run {request.headers['by']}")

        def after_run(self, request, result, error):
            calls.append(f"{self.name}.after_run {result}")

    app = make(middleware=[Recorder("a"), Recorder("b")])
    task = app.task(lambda: 7, name="t")

    task.delay()
    app.run_until_idle()

    assert calls == [
        "a.before_send",
        "b.before_send",
        "b.after_send",
        "a.after_send",
        "a.before_run b",
        "b.before_run b",
        "b.after_run 7",
        "a.after_run 7",
    ]


def test_the_request_says_what_runs(make):
    app = make()
    seen = {}

    @app.task(bind=True, shard_key="user", retry_backoff=0.01)
    def look(self, user):
        request = self.request
        seen[request.attempt] = (request.id, request.shard_key, request.queue, request.fencing_token > 0)
        if request.attempt == 0:
            raise self.retry(countdown=0.01)

    result = look.delay(user=42)
    app.run_until_idle()

    assert seen == {0: (result.id, "42", "default", True), 1: (result.id, "42", "default", True)}
    with pytest.raises(ConfigError):
        _ = look.request


def test_dedupe_runs_one_of_two_entries_with_one_id(make):
    app = make(middleware=[Dedupe(ttl=60)])
    runs = []
    task = app.task(runs.append, name="t")

    task.apply_async((1,), task_id="one")
    task.apply_async((2,), task_id="one")
    task.apply_async((3,), task_id="two")
    app.run_until_idle()

    assert runs == [1, 3]


def test_a_result_that_does_not_come_times_out(make):
    app = make()
    task = app.task(lambda: None, name="t")

    with pytest.raises(ResultTimeout):
        task.delay().get(timeout=0.05)


def test_the_fixture_gives_an_app_of_its_own(own_app):
    task = own_app.task(lambda n: n + 1, name="plus")
    result = task.delay(1)
    assert own_app.run_until_idle() == 1
    assert result.get(timeout=1) == 2


OWN_TEST = """
import pytest
from streamtask import StreamTask

app = StreamTask("mine")

@app.task(max_retries=1, retry_backoff=False)
def fails(n):
    raise ValueError("no such order\\nat all")

@pytest.fixture
def streamtask_app_options():
    return {"app": "test_mine:app"}

def test_mine(streamtask_app):
    fails.delay(7)
    streamtask_app.run_until_idle()
"""


def test_a_failure_shows_where_the_task_failed(tmp_path):
    """In pytest's report: the line of the body, the line of the test, and nothing of ours between."""
    (tmp_path / "test_mine.py").write_text(OWN_TEST)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--show-capture=no", "-p", "no:cacheprovider", "test_mine.py"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert 'raise ValueError("no such order\\nat all")' in done.stdout
    assert ">       streamtask_app.run_until_idle()" in done.stdout
    assert "dead letter: task test_mine.fails with [7] {}: exhausted: ValueError: no such order" in done.stdout
    assert "at all (after 1 retry)" in done.stdout
    assert "inline.py" not in done.stdout


@pytest.fixture
def own_app(streamtask_app):
    return streamtask_app
