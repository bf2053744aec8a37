"""Redis is there and refuses: no process ends, no body is killed, nothing runs twice, no result is missing."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from streamtask import BrokerUnavailable, ConfigError, ReplyError
from tests.fix_refusals import FAULTS, PASSING, refusing, server_for
from tests.helpers import wait_until
from tests.parts import sampled
from tests.worker.rig import TASKS, keys_on

LEASE = 1.0


@pytest.fixture
def server(own_server_all, request):
    """One that can refuse with the test's code."""
    with server_for(request.node.callspec.params["code"], own_server_all) as server:
        yield server


@pytest.mark.old_redis("BUSY", "MISCONF", "OOM")
@pytest.mark.parametrize(
    "code", sampled([code for code in FAULTS if code != "CLUSTERDOWN"], "BUSY", "OOM")
)  # not on a Cluster
def test_a_worker_and_its_bodies_outlive_it(server, site, code):
    site = site(server, lease=LEASE, backend=True, send_timeout=30)
    pod = site.pod(2)
    owned = site.ready(2)
    children = pod.children()
    results = []
    for i, shards in enumerate(owned.values()):
        key = keys_on(shards[0], 1)[0]
        results.append(site.task("gated").delay(k=key, n=i))
        site.produced[key].append(i)
        site.wait_started(key, i)
        site.send(key, range(100, 110))
    late = threading.Thread(target=site.send, args=(keys_on(0, 3)[2], range(5)))
    waited: list[object] = []
    waiter = threading.Thread(target=lambda: waited.append(results[0].get(timeout=60)))
    waiter.start()
    with refusing(server, code):
        if code in PASSING:
            late.start()
        site.open_gate(0)  # one ends while Redis refuses, one later; above maxmemory the worker may end all it has
        if code != "OOM":
            word = "ACL must allow" if code == "NOPERM" else code
            wait_until(lambda: word in pod.log, 20, lambda: f"{code} is met: {pod.log}")
        time.sleep(LEASE * 1.5)
        assert pod.spawned.returncode is None
    if code not in PASSING:
        late.start()
    site.open_gate(1)
    late.join(40)
    site.wait_ended(timeout=60)
    assert site.check(killed={}).repeated == 0
    assert pod.children() == children
    waiter.join(30)
    assert waited == [None]
    results[1].get(timeout=30)
    site.wait_empty()
    assert site.dead() == []


@pytest.mark.old_redis("BUSY", "MISCONF", "OOM")
@pytest.mark.parametrize("code", sampled(PASSING, "BUSY", "NOREPLICAS"))
def test_calls_wait_for_it(server, site, code):
    site = site(server, send_timeout=30)
    site.send("a", range(1))
    put = site.task("put")

    fresh = site.load(server.url).tasks["put"]  # its first calls, which declare the queue

    async def many(calls):
        await asyncio.gather(*calls)

    threads = [
        threading.Thread(target=site.send, args=("bulk", range(3))),
        threading.Thread(target=lambda: asyncio.run(many([put.adelay(k="async", n=n) for n in range(3)]))),
        threading.Thread(
            target=lambda: asyncio.run(many([put.asend_many([{"k": "async", "n": n} for n in range(3)])]))
        ),
        threading.Thread(target=lambda: [fresh.delay(k="fresh", n=n) for n in range(3)]),
    ]
    with refusing(server, code):
        for thread in threads:
            thread.start()
        with pytest.raises(BrokerUnavailable):
            put.apply_async(kwargs={"k": "c", "n": 0}, timeout=0.3)
        time.sleep(0.3)
        assert all(thread.is_alive() for thread in threads)
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    lengths = [site.redis.xlen(site.stream(shard)) for shard in site.all_shards()]
    assert sum(lengths) == 1 + 3 * len(threads)


@pytest.mark.parametrize("code,concurrency", [("MISCONF", 1), ("NOREPLICAS", 4)])
def test_no_result_is_dropped_that_a_server_of_its_own_refuses(redis_server, own_server, site, code, concurrency):
    site = site(redis_server, backend=own_server.url, lease=LEASE)
    pod = site.pod(1, concurrency)
    site.ready(1)
    put = site.task("put")
    assert put.delay(k="a", n=0).get(timeout=20) is None
    site.wait_empty()  # its acknowledgement comes after its result, and would wait with those of the others
    children = pod.children()
    with refusing(own_server, code):
        results = [put.delay(k=f"k{n}", n=n) for n in range(5)]
        wait_until(lambda: code in pod.log, 20, lambda: pod.log)
        time.sleep(LEASE * 1.5)
        # What has no result is not acknowledged.
        assert sum(site.redis.xlen(site.stream(shard)) for shard in site.all_shards()) == 5
    assert [result.get(timeout=20) for result in results] == [None] * 5
    site.wait_empty()
    assert (pod.children(), len(site.of("S"))) == (children, 6)


def test_what_does_not_pass_is_said_at_once(own_server_all, site):
    site = site(own_server_all, send_timeout=30)
    site.send("a", range(1))
    put = site.task("put")
    with refusing(own_server_all, "NOPERM"), pytest.raises(ConfigError, match="ACL must allow") as refused:
        put.delay(k="a", n=1)
    assert isinstance(refused.value, ReplyError)
    put.delay(k="a", n=1)
    for shard in site.all_shards():
        site.redis.delete(site.stream(shard))
        site.redis.set(site.stream(shard), "not a stream")
    with pytest.raises(ReplyError) as broken:
        put.delay(k="a", n=2)
    assert broken.value.code == "WRONGTYPE"


def test_a_broken_key_holds_up_its_shard_alone(own_server_all, site):
    site = site(own_server_all, lease=LEASE)
    pod = site.pod(1)
    site.ready(1)
    children = pod.children()
    site.send(keys_on(0, 1)[0], range(3))
    site.wait_ended()
    site.redis.delete(site.stream(0))
    site.redis.set(site.stream(0), "not a stream")
    wait_until(lambda: "WRONGTYPE" in pod.log, 20, lambda: pod.log)
    site.send(keys_on(1, 1)[0], range(10))
    site.wait_ended()

    def met() -> int:
        return int(site.redis.info("errorstats").get("errorstat_WRONGTYPE", {"count": 0})["count"])

    wait_until(lambda: met() >= 4, 20)  # it is tried, and said once
    site.redis.delete(site.stream(0))
    wait_until(lambda: site.redis.exists(site.stream(0)), 20, lambda: pod.log)
    site.send(keys_on(0, 1)[0], range(10, 20))
    site.wait_ended()
    assert pod.children() == children
    assert pod.log.count("WRONGTYPE") == 1


GIVES_UP = (
    TASKS
    + """
from streamtask.worker import outbox
outbox.GIVE_UP_S = 2.0
"""
)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_results_that_are_refused_for_good_hold_nothing_up(own_server_all, site, concurrency):
    site = site(own_server_all, GIVES_UP, lease=LEASE, backend=True)
    pod = site.pod(1, concurrency)
    site.ready(1)
    put = site.task("put")
    first = put.delay(k="a", n=0)
    assert first.get(timeout=20) is None
    site.produced["a"].append(0)
    # Redis lets the user do all but touch what is outside of the queues.
    acl = site.redis.execute_command
    acl("ACL", "SETUSER", "default", "resetkeys", "~streamtask:{*")
    lost = put.delay(k="a", n=1)
    site.produced["a"].append(1)
    site.send("a", range(2, 30))
    site.send("b", range(30))
    site.wait_ended()
    site.wait_empty()
    assert pod.log.count("Redis refuses results") == 1
    assert f"result is given up, Redis refuses it task=put id={lost.id}" in pod.log
    site.send("b", range(30, 40))
    site.wait_ended()
    site.wait_empty(timeout=10)  # at once: it is known by now
    acl("ACL", "SETUSER", "default", "allkeys")
    assert lost.state == "PENDING"
    assert put.delay(k="a", n=30).get(timeout=20) is None
    site.produced["a"].append(30)
    assert site.check().repeated == 0
