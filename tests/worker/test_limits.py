"""Time limits, and bodies that never let go of the GIL."""

from __future__ import annotations

import itertools
import signal
import time
import uuid

import pytest

from tests.helpers import wait_until
from tests.parts import sampled
from tests.worker.rig import keys_on

LIMITS = """
app = make_app()
quick = dict(shard_key="k", retry_backoff=0.02, retry_jitter=False, max_retries=1)

def spin(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass

@app.task(name="put", shard_key="k")
def put(k, n, ms=0):
    note("S", k, n)
    time.sleep(ms / 1000)
    note("E", k, n)

@app.task(name="soft", soft_time_limit=0.3, **quick)
def soft(k, n, seconds):
    note("S", k, n)
    try:
        spin(seconds)
    except SoftTimeLimitExceeded:
        note("L", k, n)
        raise
    note("E", k, n)

@app.task(name="cleans", soft_time_limit=0.2, **quick)
def cleans(k, n):
    note("S", k, n)
    try:
        spin(5)
    except SoftTimeLimitExceeded:
        pass
    note("E", k, n)

@app.task(name="cleans_async", soft_time_limit=0.2, **quick)
async def cleans_async(k, n):
    note("S", k, n)
    try:
        await asyncio.sleep(5)
    except SoftTimeLimitExceeded:
        await asyncio.sleep(0.01)
    note("E", k, n)

@app.task(name="sleeps", soft_time_limit=0.3, **quick)
async def sleeps(k, n, seconds):
    note("S", k, n)
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        note("L", k, n)
        raise
    note("E", k, n)

@app.task(name="edge", soft_time_limit=0.005, shard_key="k", max_retries=0)
def edge(k, n):
    # Ends just when its limit does: the exception hits the body or nothing.
    note("S", k, n)
    try:
        spin(0.0048 + n % 40 * 0.00001)
    except SoftTimeLimitExceeded:
        note("L", k, n)
        return
    note("E", k, n)

@app.task(name="hard", time_limit=0.5, shard_key="k", max_retries=0)
def hard(k, n):
    note("S", k, n)
    time.sleep(30)

@app.task(name="hard_async", time_limit=0.5, **quick)
async def hard_async(k, n):
    note("S", k, n)
    time.sleep(30)

@app.task(name="gil", shard_key="k")
def gil(k, n, seconds):
    note("S", k, n)
    if seconds:
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))  # one C call that keeps the GIL
    note("E", k, n)
"""


@pytest.mark.parametrize("concurrency", sampled([1, 4], 4))
@pytest.mark.parametrize("task", ["soft", "sleeps"])
def test_a_soft_limit_fails_the_run(redis_server, site, task, concurrency):
    site = site(redis_server, LIMITS)
    pod = site.pod(1, concurrency)
    site.ready(1)
    children = pod.children()
    site.task(task).delay(k="a", n=0, seconds=5)
    site.task(task).delay(k="a", n=1, seconds=0)
    site.task(task).delay(k="b", n=2, seconds=0)
    wait_until(lambda: site.ended() == 2, message=lambda: f"{site}\n{pod.log}")
    site.wait_empty()
    assert site.started("a") == [0, 0, 1]
    starts, limits = site.of("S", "a", 0), site.of("L", "a", 0)
    assert len(limits) == 2
    for start, limit in zip(starts, limits, strict=True):
        assert 0.29 <= limit.at - start.at <= 0.9
    assert [(row["reason"], row["kwargs"]["n"]) for row in site.dead()] == [("exhausted", 0)]
    assert "SoftTimeLimitExceeded" in site.dead()[0]["message"]
    assert pod.children() == children


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_body_may_catch_its_soft_limit(redis_server, site, concurrency):
    site = site(redis_server, LIMITS)
    site.pod(1, concurrency)
    site.task("cleans").delay(k="a", n=0)
    site.task("cleans_async").delay(k="a", n=1)
    site.task("put").delay(k="a", n=2)
    wait_until(lambda: site.ended() == 3)
    site.wait_empty()
    assert site.started("a") == [0, 1, 2]
    assert site.dead() == []


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_soft_limit_never_hits_outside_of_its_body(redis_server, site, concurrency):
    """Bodies that end at the instant of their limit: each ends in one way, and the worker lives."""
    site = site(redis_server, LIMITS)
    pod = site.pod(1, concurrency)
    site.ready(1)
    children = pod.children()
    keys = [key for shard in range(4) for key in keys_on(shard, 1)]
    for key in keys:
        site.task("edge").send_many([{"k": key, "n": n} for n in range(80)])
    done = lambda: len(site.of("E")) + len(site.of("L")) + len(site.dead())  # noqa: E731
    wait_until(lambda: done() >= 320, 20, lambda: f"{done()} of 320\n{pod.log}")
    site.wait_empty()
    assert pod.children() == children, pod.log
    for key in keys:
        # On a busy machine the limit may have passed before the body's first line: then there is only the dead letter.
        ended = [e.n for kind in "EL" for e in site.of(kind, key)]
        dead = [row["kwargs"]["n"] for row in site.dead() if row["key"] == key.encode()]
        assert set(ended) | set(dead) == set(range(80))
        assert len(ended) == len(set(ended))
        starts = site.started(key)
        assert starts == sorted(set(starts))


def test_a_soft_limit_that_hits_at_the_end_leaves_nothing_behind(redis_server, site):
    site = site(redis_server, LIMITS)
    pod = site.pod(1)
    site.task("edge").send_many([{"k": f"k{i}", "n": n} for i in range(8) for n in range(80)])
    done = lambda: len(site.of("E")) + len(site.of("L")) + len(site.dead())  # noqa: E731
    wait_until(lambda: done() >= 640, 20, lambda: f"{done()} of 640\n{pod.log}")
    lines = pod.log.splitlines()
    said = [line for line in lines if line.startswith("2") and "streamtask.supervisor" not in line]
    assert all("dead letter: " in line or "retry in " in line for line in said), pod.log
    assert not any(line.startswith("Traceback") for line in lines), pod.log


@pytest.mark.parametrize("concurrency", sampled([1, 4], 4))
@pytest.mark.parametrize("task", ["hard", "hard_async"])
def test_a_time_limit_ends_the_process_and_charges_the_overrunning_message_only(redis_server, site, task, concurrency):
    site = site(redis_server, LIMITS, max_crashes=1)
    pod = site.pod(1, concurrency)
    site.ready(1)
    children = pod.children()
    key, *others = keys_on(0, 30)
    site.task(task).delay(k=key, n=0)
    site.task("put").delay(k=key, n=1)
    for i, other in enumerate(others):
        site.send(other, range(3), ms=200 if i < 3 else 1)
    site.wait_ended()
    wait_until(lambda: site.of("E", key, 1))
    site.wait_empty()
    starts = site.of("S", key, 0)
    runs = 1 if task == "hard" else 2  # it counts as a run that failed
    assert [e.attempt for e in starts] == [*range(runs)]
    assert len({e.pid for e in starts}) == runs
    (row,) = site.dead()
    assert (row["reason"], row["kwargs"]["n"], row["key"]) == ("time-limit", 0, key.encode())
    assert "TimeLimitExceeded: its process was ended at its time_limit of 0.5 s" in row["message"]
    assert (row["attempts"], row["crashes"]) == (runs, 0)
    assert pod.children() != children
    assert len(pod.children()) == 1


KEYLESS = """
app = make_app()

@app.task(name="long")
def long(n):
    note("S", "long", n)
    while not os.path.exists("gate"):
        time.sleep(0.01)
    note("E", "long", n)

@app.task(name="over", time_limit=0.2, max_retries=1, retry_backoff=False)
def over(n):
    note("S", "over", n)
    time.sleep(1000)
"""


def test_a_keyless_body_is_charged_for_no_other_ones_time_limit(redis_server_all, site):
    """Its process is ended time and again for those that overrun beside it; what ends it once more is no crash of its own."""
    site = site(redis_server_all, KEYLESS, shards=1, max_crashes=1)
    pod = site.pod(1, 2)
    site.ready(1)
    site.task("long").delay(n=0)
    wait_until(lambda: site.of("S", "long"))
    for n in range(2):
        site.task("over").delay(n=n)
    overran = lambda: sorted(row["kwargs"]["n"] for row in site.dead() if row["task"] == "over")  # noqa: E731
    wait_until(lambda: overran() == [0, 1], 30, lambda: f"{site}\n{pod.log}", progress=lambda: len(site.of("S")))
    assert len(site.of("S", "long")) >= 4
    (site.folder / "gate").touch()
    wait_until(lambda: site.of("E", "long"), 30, lambda: f"{site}\n{pod.log}")
    assert [row["task"] for row in site.dead()] == ["over", "over"]


def test_a_body_that_holds_the_gil_keeps_its_shard(redis_server, site):
    site = site(redis_server, LIMITS, lease=1.0)
    pods = [site.pod(1), site.pod(1)]
    site.ready(2)
    children = [pod.children() for pod in pods]
    before = site.leases()
    shard = next(shard for shard in before if site.pid_of(shard) == children[0][0])
    key = keys_on(shard, 1)[0]
    site.task("gil").delay(k=key, n=0, seconds=2.5)
    site.task("gil").delay(k=key, n=1, seconds=0)
    site.wait_started(key, 0)
    wait_until(lambda: site.of("E", key, 1))
    assert site.started(key) == [0, 1]
    assert site.of("E", key, 0)[0].at - site.of("S", key, 0)[0].at >= 2.4
    assert site.leases() == before
    assert [pod.children() for pod in pods] == children
    site.wait_empty()


@pytest.mark.parametrize("harm", sampled(["gil", "stopped"], "gil"))
def test_a_process_that_reads_nothing_holds_nobody_up(redis_server, site, harm):
    """Its supervisor has megabytes to tell it of revoked tasks; it goes on to renew the others' leases."""
    site = site(redis_server, LIMITS, lease=1.0)
    pod = site.pod(2)
    owned = site.ready(2)
    deaf = site.pid_of(0)
    (others,) = [shards for shards in owned.values() if 0 not in shards]
    if harm == "gil":
        site.task("gil").delay(k=keys_on(0, 1)[0], n=0, seconds=4)
        site.produced[keys_on(0, 1)[0]].append(0)
        site.wait_started(keys_on(0, 1)[0], 0)
    else:
        pod.kill_child(deaf, signal.SIGSTOP)
    for _ in range(3):
        site.redis.zadd(site.keys.revoked, {f"{uuid.uuid4()}": 4e12 for _ in range(20_000)})
        site.redis.publish(site.keys.channel("workers"), "revoked")
    until = time.monotonic() + 3
    n = itertools.count()
    while time.monotonic() < until:
        number = next(n)
        for shard in others:
            site.send(keys_on(shard, 1)[0], [number])
        wait_until(lambda number=number: len([e for e in site.of("E") if e.n == number and e.shard in others]) == len(others),
                   15, lambda: f"{site}\n{pod.log}")  # fmt: skip
    site.wait_ended()
    assert site.check(killed={} if harm == "gil" else site.killed).repeated == 0
    site.wait_empty()
    if harm == "gil":
        assert deaf in pod.children(), pod.log
    # It knows in the end what was revoked, and the others do.
    task_id = site.task("put").apply_async(kwargs={"k": "a", "n": 10**6}, countdown=1).id
    site.redis.zadd(site.keys.revoked, {task_id: 4e12})
    site.redis.publish(site.keys.channel("workers"), "revoked")
    site.wait_empty()
    assert not site.of("S", "a", 10**6)
