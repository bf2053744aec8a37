"""Ordered retries, dead letters, and what a body says with exceptions."""

from __future__ import annotations

import contextlib
import json
import time

import pytest

from streamtask import TaskError
from streamtask.operations import Inspector
from tests.helpers import wait_until
from tests.worker.rig import TASKS, keys_on

SAYS = """
app = make_app()
quick = dict(shard_key="k", retry_backoff=0.02, retry_jitter=False, max_retries=2)

def runs(k, n, exc):
    note("S", k, n)
    attempt = current().attempt
    if exc is not None:
        note("F", k, n)
        raise exc
    note("E", k, n)

@app.task(name="plain", **quick)
def plain(k, n):
    runs(k, n, None)

@app.task(name="always", **quick)
def always(k, n):
    runs(k, n, KeyError("no such thing"))

@app.task(name="reject", **quick)
def reject(k, n):
    runs(k, n, Reject("not this one"))

@app.task(name="requeue", **quick)
def requeue(k, n):
    mark = f"requeued-{n}"
    if not os.path.exists(mark):
        open(mark, "w").close()
        runs(k, n, Reject("again", requeue=True))
    runs(k, n, None)

@app.task(name="ignore", **quick)
def ignore(k, n):
    runs(k, n, Ignore())

@app.task(name="later", **quick)
def later(k, n):
    runs(k, n, None if current().attempt else Retry("a moment", countdown=0.4))

@app.task(name="bound", bind=True, **quick)
def bound(self, k, n):
    if self.request.attempt == 0:
        note("S", k, n)
        note("F", k, n)
        raise self.retry(countdown=0.05)
    runs(k, n, None)

@app.task(name="bound_exhausted", bind=True, **quick)
def bound_exhausted(self, k, n):
    note("S", k, n)
    note("F", k, n)
    raise self.retry(exc=OSError("the cause"), countdown=0.01, max_retries=1)

@app.task(name="not_for", dont_autoretry_for=(KeyError,), **quick)
def not_for(k, n):
    runs(k, n, KeyError("given up at once"))

@app.task(name="only_for", autoretry_for=(OSError,), **quick)
def only_for(k, n):
    runs(k, n, KeyError("not among them"))

@app.task(name="for_none", autoretry_for=(), **quick)
def for_none(k, n):
    runs(k, n, OSError("none"))

@app.task(name="exits", **quick)
def exits(k, n):
    runs(k, n, SystemExit(3))

@app.task(name="unordered", shard_key="k", ordered=False, retry_backoff=1.0, retry_jitter=False)
def unordered(k, n):
    runs(k, n, None if current().attempt or n else ValueError())
"""


def test_a_failing_head_holds_only_its_own_key(redis_server_all, site):
    """And a retry keeps its place at the head."""
    site = site(redis_server_all, TASKS.replace("retry_backoff=0.02", "retry_backoff=0.3"))
    key, other = keys_on(0, 2)
    site.pod(1)
    site.ready(1)
    site.send(key, [0], fail=2)
    site.send(key, range(1, 50))
    site.send(other, range(50))
    wait_until(lambda: site.started(other) == list(range(50)))
    assert 1 not in site.started(key), "a follower overtook the failing head"
    site.wait_ended()
    site.check(killed={})
    assert site.started(key) == [0, 0, *range(50)]
    starts = site.of("S", key, 0)
    assert [e.attempt for e in starts] == [0, 1, 2]
    assert starts[1].at - starts[0].at >= 0.29
    assert starts[2].at - starts[1].at >= 0.59  # exponential
    site.wait_empty()


@pytest.mark.parametrize("concurrency", [1, 4])
def test_exhausted_messages_die_and_their_followers_run(redis_server, site, concurrency):
    site = site(redis_server)
    site.pod(1, concurrency)
    keys = keys_on(2, 3)
    for key in keys:
        site.send(key, [0], fail=99)
        site.send(key, range(1, 20))
    site.task("free").delay(n=7, fail=99)
    wait_until(lambda: len(site.dead()) == 4, message=lambda: str(site.dead()))
    site.wait_ended(57)
    site.wait_empty()
    for key in keys:
        assert site.started(key) == [0, 0, 0, *range(20)]
        died, follower = site.of("F", key, 0)[-1], site.of("S", key, 1)[0]
        assert follower.at - died.at < 0.5, "the lane opened late"
    for row in site.dead():
        assert row["reason"] == "exhausted"
        assert "ValueError: fails 99 times" in row["message"]
        assert 'raise ValueError(f"fails {fail} times")' in row["traceback"]
        assert row["held"] is False
        assert (row["task"], row["kwargs"]["fail"]) in (("put", 99), ("free", 99))
    assert sorted(row["key"] for row in site.dead() if row["key"]) == sorted(key.encode() for key in keys)


@pytest.mark.slow
def test_attempts_and_due_times_survive_kill_9(redis_server, site):
    source = TASKS.replace("retry_backoff=0.02", "retry_backoff=0.6")
    site = site(redis_server, source)
    pod = site.pod(1)
    key = keys_on(0, 1)[0]
    site.send(key, [0], fail=2)
    site.send(key, range(1, 5))
    failed = wait_until(lambda: site.of("F", key, 0))[0]
    keys = site.keys.shard(0, 0)
    wait_until(lambda: site.redis.hlen(keys.notes("workers")))
    pod.kill_child(pod.children()[0])
    second = site.wait_started(key, 0, count=2)
    assert second.attempt == 1
    assert second.at - failed.at >= 0.59
    wait_until(lambda: len(site.of("F", key, 0)) == 2)
    time.sleep(0.1)
    pod.kill_child(second.pid)
    site.wait_ended()
    assert [e.attempt for e in site.of("S", key, 0)] == [0, 1, 2]
    assert site.started(key) == [0, 0, 0, 1, 2, 3, 4]
    site.wait_empty()


def outcomes(site, task, key, dead=0):
    """Sends one message of the task with two followers; their starts and the dead letters."""
    site.task(task).delay(k=key, n=0)
    site.task("plain").delay(k=key, n=1)
    site.task("plain").delay(k=key, n=2)
    wait_until(lambda: len(site.of("E", key, 2)) == 1, message=lambda: str(site))
    site.wait_empty()
    assert len(site.dead()) == dead
    return site.started(key)


def test_what_a_body_may_say(redis_server, site):
    site = site(redis_server, SAYS)
    pod = site.pod(1, 2)
    assert outcomes(site, "always", "a", dead=1) == [0, 0, 0, 1, 2]
    assert outcomes(site, "reject", "b", dead=2) == [0, 1, 2]
    assert outcomes(site, "requeue", "c", dead=2) == [0, 0, 1, 2]
    assert outcomes(site, "ignore", "d", dead=2) == [0, 1, 2]
    assert outcomes(site, "later", "e", dead=2) == [0, 0, 1, 2]
    assert outcomes(site, "bound", "f", dead=2) == [0, 0, 1, 2]
    assert outcomes(site, "not_for", "h", dead=3) == [0, 1, 2]
    assert outcomes(site, "only_for", "i", dead=4) == [0, 1, 2]
    assert outcomes(site, "for_none", "j", dead=5) == [0, 1, 2]
    assert outcomes(site, "exits", "k", dead=6) == [0, 1, 2]
    rows = {row["task"]: row for row in site.dead()}
    assert {task: row["reason"] for task, row in rows.items()} == {
        "always": "exhausted", "reject": "rejected", "not_for": "failed", "only_for": "failed",
        "for_none": "failed", "exits": "failed",
    }  # fmt: skip
    assert rows["reject"]["message"] == "not this one"
    requeued = site.of("S", "c", 0)
    assert [e.attempt for e in requeued] == [0, 0], "requeue is no failed attempt"
    retried = site.of("S", "e", 0)
    assert retried[1].at - retried[0].at >= 0.4
    assert len(pod.children()) == 1
    assert len({e.pid for e in site.events()}) == 1, "a body's exception ended its process"


def test_retry_with_an_exception_and_a_limit_of_its_own(redis_server, site):
    """``self.retry(exc=..., max_retries=1)``: after one retry the message is dead, with the exception."""
    site = site(redis_server, SAYS)
    site.pod(1)
    assert outcomes(site, "bound_exhausted", "g", dead=1) == [0, 0, 1, 2]
    assert site.dead()[0]["reason"] in ("exhausted", "failed")
    assert "the cause" in site.dead()[0]["message"]


def test_an_unordered_task_overtakes_its_failing_neighbour(redis_server, site):
    site = site(redis_server, SAYS)
    site.pod(1)
    for n in range(10):
        site.task("unordered").delay(k="a", n=n)
    wait_until(lambda: site.ended() == 10)
    assert site.started("a") == [*range(10), 0]
    site.wait_empty()


@pytest.mark.parametrize("how", ["replay", "drop"])
def test_a_held_lane_stays_closed_until_replay_or_drop(redis_server, site, how):
    site = site(redis_server, on_dead="hold")
    pod = site.pod(1)
    key, other = keys_on(0, 2)
    site.task("gated").delay(k=key, n=0)
    site.open_gate(0, outcome="reject")
    site.send(key, range(1, 10))
    site.send(other, range(10))
    wait_until(lambda: [row["held"] for row in site.dead()] == [True])
    wait_until(lambda: site.started(other) == list(range(10)))
    # Closed also over the owner's death.
    pod.kill_child(pod.children()[0])
    site.send(other, range(10, 20))
    wait_until(lambda: site.started(other)[-1] == 19)
    time.sleep(0.2)
    assert site.started(key) == [0]
    assert len(site.dead()) == 1
    site.open_gate(0)
    with contextlib.closing(Inspector(site.app)) as inspector:
        assert getattr(inspector, how)("default") == 1
    site.wait_ended(29 + (how == "replay"))
    assert site.started(key) == [0, *([0] if how == "replay" else []), *range(1, 10)]
    site.wait_empty()
    assert site.dead() == []


def test_a_replayed_dead_letter_runs_at_the_end_of_its_lane_with_its_id(redis_server, site):
    site = site(redis_server)
    site.pod(1)
    result = site.task("gated").delay(k="a", n=0)
    site.open_gate(0, outcome="reject")
    wait_until(lambda: site.dead())
    assert json.loads(site.dead()[0]["fields"][b"error"])["reason"] == "rejected"
    site.send("a", range(1, 5))
    site.wait_ended(4)
    site.open_gate(0)
    with contextlib.closing(Inspector(site.app)) as inspector:
        assert inspector.replay("default") == 1
    site.wait_ended(5)
    assert site.started("a") == [0, 1, 2, 3, 4, 0]
    assert {e.id for e in site.of("S", "a", 0)} == {result.id}
    site.wait_empty()
    assert site.dead() == []


def test_results_tell_of_retries_and_deaths(redis_server, site):
    site = site(redis_server, SAYS.replace("make_app()", "make_app(backend=True)"))
    site.pod(1)
    assert site.task("later").delay(k="a", n=0).get(timeout=10) is None
    with pytest.raises(TaskError, match="no such thing") as caught:
        site.task("always").delay(k="b", n=0).get(timeout=10)
    assert "KeyError" in caught.value.traceback
