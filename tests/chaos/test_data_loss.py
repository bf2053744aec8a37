"""Scripts, streams or the whole server flushed under running workers: they notice, say so, and go on."""

from __future__ import annotations

import time

from tests.helpers import wait_until
from tests.worker.rig import keys_on


def send_everywhere(site, first, count, **more):
    for shard in range(site.shards):
        site.send(keys_on(shard, 1)[0], range(first, first + count), **more)
    site.send(None, range(first, first + count), **more)


def said(pod, text):
    return text in pod.log.lower()


def test_script_flush_loses_nothing(redis_server, site):
    site = site(redis_server)
    pod = site.pod(2, 2)
    site.ready(2)
    for i in range(10):
        send_everywhere(site, i * 20, 20, fail=1 if i == 3 else 0)
        site.redis.script_flush()
        time.sleep(0.05)
    site.wait_ended()
    assert site.check(killed={}).repeated == 0
    site.wait_empty()
    assert site.dead() == []
    assert not said(pod, "data loss")


def test_flushall_is_noticed_and_the_work_goes_on(redis_server_all, site):
    site = site(redis_server_all, lease=1.0)
    pod = site.pod(2)
    site.ready(2)
    send_everywhere(site, 0, 200, ms=2)
    site.wait_started()
    site.redis.flushall()
    wait_until(lambda: said(pod, "data loss"), 10, lambda: f"the loss is logged:\n{pod.log}")
    site.produced.clear()
    send_everywhere(site, 1000, 50)
    wait_until(
        lambda: {(e.key, e.n) for e in site.of("E") if e.n >= 1000} == {(k, n) for k, ns in site.produced.items() for n in ns},
        20, lambda: f"all of the new ones: {site}",
    )  # fmt: skip
    site.wait_empty()
    site.ready(2)
    assert len(pod.children()) == 2
    new = [e for e in site.of("S") if e.n >= 1000]
    assert len(new) == sum(map(len, site.produced.values())), "some ran twice"
    assert site.stale_consumers() == []


def test_a_deleted_stream_is_noticed_and_the_work_goes_on(redis_server_all, site):
    site = site(redis_server_all)
    pod = site.pod(1)
    site.ready(1)
    send_everywhere(site, 0, 5)
    site.wait_ended()
    site.wait_empty()
    site.redis.delete(site.stream(3), site.stream("shared"))
    send_everywhere(site, 5, 20)
    site.wait_ended()
    assert site.check(killed={}).repeated == 0
    wait_until(lambda: said(pod, "data loss"), 10, lambda: f"the loss is logged:\n{pod.log}")
    site.wait_empty()


def test_a_deleted_group_is_made_anew(redis_server, site):
    site = site(redis_server)
    pod = site.pod(1)
    site.ready(1)
    send_everywhere(site, 0, 1)
    site.wait_ended()
    site.wait_empty()
    site.redis.xgroup_destroy(site.stream(2), "workers")
    site.redis.xgroup_destroy(site.stream("shared"), "workers")
    send_everywhere(site, 1, 20)
    site.wait_ended()
    site.check(killed={})
    wait_until(lambda: said(pod, "data loss"), 10, lambda: f"the loss is logged:\n{pod.log}")
    site.wait_empty()
