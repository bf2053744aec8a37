"""Redis out of memory: workers still drain, producers are told."""

from __future__ import annotations

import time

import pytest

from streamtask import BrokerOutOfMemory
from tests.worker.rig import TASKS, keys_on


def test_workers_drain_a_full_redis(own_server_all, site):
    site = site(own_server_all, send_timeout=0.5, lease=1.0)
    keys = [keys_on(shard, 1)[0] for shard in range(site.shards)]
    for key in keys:
        site.send(key, range(300))
    site.send(keys[0], [1000], fail=1)  # one that is retried, whose note must be stored
    site.send(None, range(300))
    pod = site.pod(2, 2)
    site.ready(2)
    # All of it may be drained by now: more comes, and then the memory is taken away.
    for key in keys:
        site.send(key, range(2000, 2300), ms=2)
    site.send(None, range(2000, 2300), ms=2)
    own_server_all.config_set(maxmemory="100kb")
    with pytest.raises(BrokerOutOfMemory):
        site.task("put").apply_async(kwargs={"k": "k", "n": 1}, timeout=0.2)
    # For longer than a lease, which is renewed above maxmemory, too; and a dead process is replaced.
    victim = pod.children()[0]
    pod.kill_child(victim)
    site.wait_ended()
    site.wait_empty()
    time.sleep(site.options["lease"] * 1.5)
    site.ready(2)
    own_server_all.config_set(maxmemory="0")
    site.check()
    assert site.dead() == []
    assert len(pod.children()) == 2
    # And room again: producers go on by themselves.
    site.send("k", range(20))
    site.wait_ended()


def test_a_full_redis_stays_full_for_producers_and_a_dead_letter_still_fits(own_server, site):
    site = site(own_server, send_timeout=0.3)
    key = keys_on(0, 1)[0]
    site.task("put").apply_async(kwargs={"k": key, "n": 0, "ms": 300, "fail": 99})
    site.task("put").delay(k=key, n=1)
    pod = site.pod(1)
    site.wait_started(key, 0)
    own_server.config_set(maxmemory="100kb")
    site.wait_ended(1)
    site.wait_empty()
    with pytest.raises(BrokerOutOfMemory):
        site.task("free").delay(n=1)
    own_server.config_set(maxmemory="0")
    assert [row["reason"] for row in site.dead()] == ["exhausted"]
    assert site.started(key) == [0, 0, 0, 0, 1]
    assert pod.children(), pod.log


def test_a_pod_that_starts_while_redis_is_full_drains_it(own_server_all, site):
    """The first one that the app ever had, with a queue that nobody has used; and the next one, when that is gone."""
    site = site(own_server_all, TASKS + '@app.task(queue="unused")\ndef unused(): ...\n', lease=1.0)
    keys = [keys_on(shard, 1)[0] for shard in range(site.shards)]
    for key in keys:
        site.send(key, range(100), ms=2)
    site.send(None, range(100), ms=2)
    own_server_all.config_set(maxmemory="100kb")
    pod = site.pod(1)
    site.wait_started()
    pod.kill_all()
    site.pod(2)
    site.wait_ended()
    site.wait_empty()
    site.ready(2)
    site.check()
    assert site.dead() == []
