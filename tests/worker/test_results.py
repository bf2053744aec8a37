"""Results as a caller sees them: success, failure, death, revocation, expiry, and over a restart of Redis."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import threading
import time

import pytest

from streamtask import ConfigError, ResultTimeout, TaskError, TaskRevoked
from streamtask.errors import BrokerUnavailable
from streamtask.operations import Inspector
from streamtask.redis.scripts import script
from tests.helpers import wait_until

RESULTS = """
app = make_app(backend=True)
quick = dict(retry_backoff=0.02, retry_jitter=False, max_retries=1)

@app.task(name="add", shard_key="k", **quick)
def add(k, a, b):
    note("S", k, a)
    return a + b

@app.task(name="aadd", **quick)
async def aadd(a, b):
    await asyncio.sleep(0.01)
    return {"sum": a + b}

@app.task(name="fails", **quick)
def fails(n):
    raise KeyError("no such thing")

@app.task(name="gives_up", max_retries=0)
def gives_up(n):
    raise Reject("rejected")

@app.task(name="dies", shard_key="k")
def dies(k):
    os._exit(1)

@app.task(name="heals", shard_key="k", max_retries=0)
def heals(k):
    if not os.path.exists("gate-healed"):
        raise KeyError("not yet")
    return "healed"

@app.task(name="unserialisable", **quick)
def unserialisable():
    return object()

@app.task(name="ignored", ignore_result=True)
def ignored():
    note("S", None, 1)
    note("E", None, 1)

@app.task(name="ends")
def ends():
    raise Ignore()

@app.task(name="slow", shard_key="k")
def slow(k, n):
    note("S", k, n)
    while not os.path.exists(f"gate-{n}"):
        time.sleep(0.005)
    note("E", k, n)
    return n
"""


LONG_AGO = dt.datetime(2000, 1, 1, tzinfo=dt.timezone.utc)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_what_a_caller_gets(redis_server, site, concurrency):
    site = site(redis_server, RESULTS, max_crashes=1)
    site.pod(1, concurrency)
    add = site.task("add").delay("a", 1, 2)
    assert add.get(timeout=10) == 3
    assert (add.state, add.successful(), add.failed(), add.ready()) == ("SUCCESS", True, False, True)
    assert site.task("aadd").delay(1, b=2).get(timeout=10) == {"sum": 3}

    failed = site.task("fails").delay(1)
    with pytest.raises(TaskError, match="no such thing") as caught:
        failed.get(timeout=10)
    assert "KeyError" in caught.value.traceback
    assert (failed.state, failed.failed()) == ("FAILURE", True)
    assert "KeyError" in failed.traceback

    with pytest.raises(TaskError, match="rejected"):
        site.task("gives_up").delay(1).get(timeout=10)
    with pytest.raises(TaskError, match="crash"):
        site.task("dies").delay("d").get(timeout=20)
    with pytest.raises(TaskError, match="serialised"):
        site.task("unserialisable").delay().get(timeout=10)
    for ask in (lambda result: result.get(), lambda result: result.state):
        with pytest.raises(ConfigError, match="task 'ignored' keeps no results: it has ignore_result=True"):
            ask(site.task("ignored").delay())
    ends = site.task("ends").delay()
    assert ends.get(timeout=10) is None
    assert (ends.state, ends.successful(), ends.failed(), ends.ready()) == ("IGNORED", False, False, True)
    site.wait_empty()


def test_many_wait_for_one_result(redis_server, site):
    site = site(redis_server, RESULTS)
    result = site.task("slow").delay("a", 1)
    got = []
    threads = [threading.Thread(target=lambda: got.append(result.get(timeout=15))) for _ in range(5)]
    threads.append(threading.Thread(target=lambda: got.extend(asyncio.run(all_of([result] * 5)))))
    for thread in threads:
        thread.start()
    site.pod(1)
    site.wait_started("a", 1)
    with pytest.raises(ResultTimeout):
        asyncio.run(result.aget(timeout=0.05))
    site.open_gate(1)
    for thread in threads:
        thread.join()
    assert got == [1] * 10
    channels = site.redis.pubsub_channels("*")
    assert not [one for one in channels if result.id.encode() in one], "nobody waits for it any more"


@pytest.mark.parametrize("on_expired", ["drop", "dead"])
def test_expired_and_revoked_messages_do_not_run(redis_server, site, on_expired):
    site = site(redis_server, RESULTS, on_expired=on_expired)
    add = site.task("add")
    expired = add.apply_async(("a", 1, 1), expires=0.05)
    alive = add.apply_async(("a", 2, 2), expires=60)
    revoked = add.delay("a", 3, 3)
    revoked.revoke()
    later = add.apply_async(("a", 4, 4), countdown=0.8)
    later.revoke()
    time.sleep(0.1)
    site.pod(1)
    assert alive.get(timeout=10) == 4
    with pytest.raises(TaskRevoked, match="expired"):
        expired.get(timeout=5)
    for one in (revoked, later):
        with pytest.raises(TaskRevoked):
            one.get(timeout=5)
        assert one.state == "REVOKED"
    site.wait_empty()
    assert site.started("a") == [2]
    assert [row["reason"] for row in site.dead()] == (["expired"] if on_expired == "dead" else [])


def test_revoked_while_it_waits_behind_another(redis_server, site):
    site = site(redis_server, RESULTS)
    site.pod(1)
    site.task("slow").delay("a", 1)
    site.wait_started("a", 1)
    waits = site.task("add").delay("a", 2, 2)
    time.sleep(0.2)
    waits.revoke()
    time.sleep(1.2)  # workers hear of it within about a second
    site.open_gate(1)
    with pytest.raises(TaskRevoked):
        waits.get(timeout=5)
    assert site.started("a") == [1]
    site.wait_empty()


async def all_of(results):
    return await asyncio.gather(*(result.aget(timeout=30) for result in results))


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
def test_get_waits_across_a_restart_of_redis(own_server, site, kill):
    site = site(own_server, RESULTS)
    pod = site.pod(1)
    results = [site.task("slow").delay(f"k{n}", n) for n in (1, 2)]
    site.wait_started("k1", 1)
    got = []
    threads = [threading.Thread(target=lambda r=r: got.append(r.get(timeout=30))) for r in results]
    threads.append(threading.Thread(target=lambda: got.extend(asyncio.run(all_of(results)))))
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    own_server.kill() if kill else own_server.stop()
    site.open_gate(1)
    site.open_gate(2)
    time.sleep(0.5)
    own_server.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [1, 1, 2, 2]
    assert len(pod.children()) == 1
    assert len(site.of("S")) == 2


@pytest.mark.parametrize("concurrency", [1, 4])
def test_no_other_message_overwrites_a_result(redis_server, site, concurrency):
    site = site(redis_server, RESULTS, max_crashes=0)
    pod = site.pod(1, concurrency)
    add = site.task("add")
    good = add.delay("a", 1, 2)
    bad = site.task("fails").delay(1)
    assert good.get(timeout=10) == 3
    with pytest.raises(TaskError):
        bad.get(timeout=10)
    before = {one.id: site.app.results.read(one.id) for one in (good, bad)}
    for one in (good, bad):
        site.task("fails").apply_async((1,), task_id=one.id)
        site.task("gives_up").apply_async((1,), task_id=one.id)
        site.task("unserialisable").apply_async(task_id=one.id)
        add.apply_async(("a", 5, 5), expires=LONG_AGO, task_id=one.id)
        add.apply_async(("a", 5, 5), task_id=one.id)
        site.redis.xadd(site.stream(0), {"j": json.dumps({"task": "no.such.task", "key": "a", "id": one.id})})

    def wait_said(*tasks, of):
        said = "a result is not kept: another message with this id has ended before task={} id={}"
        lines = [said.format(task, one.id) for task in tasks for one in of]
        wait_until(lambda: all(line in pod.log for line in lines), 20, lambda: pod.log)

    wait_said("fails", "gives_up", "unserialisable", "add", "no.such.task", of=(good, bad))
    for one in (good, bad):  # each by itself: what a process had stored when it died, it does not say any more
        site.task("dies").apply_async(("d",), task_id=one.id)
        wait_said("dies", of=(one,))
    site.wait_empty()
    assert {one.id: site.app.results.read(one.id) for one in (good, bad)} == before


@pytest.mark.parametrize("on_dead", ["continue", "hold"])
def test_a_replay_has_a_result_of_its_own(redis_server, site, on_dead, proxy):
    """Also where one died, or was cut off, when it had forgotten the first result, and put nothing back yet."""
    site = site(redis_server, RESULTS, on_dead=on_dead)
    site.pod(1)
    heals = site.task("heals").delay("a")
    with pytest.raises(TaskError, match="not yet"):
        heals.get(timeout=10)
    wait_until(site.dead)
    site.open_gate("healed")
    line = proxy(redis_server)
    line.cut_before_request(script("replay").sha.encode(), times=100)
    with Inspector(site.load(line.url)) as inspector, pytest.raises(BrokerUnavailable):
        inspector.replay("default")
    assert len(site.dead()) == 1
    assert heals.state == "PENDING"
    with Inspector(site.app) as inspector:
        assert inspector.replay("default") == 1
    assert heals.get(timeout=10) == "healed"
    site.task("fails").apply_async((1,), task_id=heals.id)
    site.wait_empty()
    assert heals.get(timeout=10) == "healed"
