"""A Redis that is full (noeviction): workers drain it, also those that only start then, and nobody's message dies of it."""

from __future__ import annotations

import pytest


def fill(s):
    s.server.config_set(maxmemory=s.redis.info("memory")["used_memory"] // 2, maxmemory_policy="noeviction")


def publish(s):
    s.mix(keys=4, each=10, late=20)
    for i in range(6):
        s.send("put", f"user{i}", fail=2)
        s.send("auto", f"user{i}", fail=1)
        s.send("put", f"user{i}")
    for _ in range(4):
        s.send("due", apply={"countdown": 1.5})


def is_drained(s):
    s.wait_done(timeout=30)
    assert s.check().repeated == []
    assert not list(s.redis.scan_iter("*:dlq"))
    s.nothing_left()


def test_a_worker_that_starts_when_redis_is_full_drains_it(own_server_all, site):
    s = site(own_server_all)
    publish(s)
    fill(s)
    s.worker(c=4)
    is_drained(s)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_redis_becomes_full_under_a_worker(own_server, site, pool):
    s = site(own_server)
    s.worker(pool, c=4)
    publish(s)
    fill(s)
    is_drained(s)
    own_server.config_set(maxmemory=0)
    s.send("put", "a")
    s.wait_done()


def test_a_full_redis_and_a_queue_that_never_was(own_server, site):
    """Its worker comes up, and waits for the room that the first message needs."""
    s = site(own_server)
    fill(s)
    worker = s.worker(c=2, words=("--without-mingle", "-Q", "fresh"))
    own_server.config_set(maxmemory=0)
    s.send("put", "a", apply={"queue": "fresh"})
    s.send("late", apply={"queue": "fresh"})
    s.wait_done()
    assert "Connection to broker lost" not in worker.log


def test_a_worker_dies_and_another_one_leaves_when_redis_is_full(own_server, site):
    s = site(own_server)
    victim, leaver = s.start_workers(2, c=4)
    for _ in range(4):
        publish(s)
    fill(s)
    s.wait_ended(40)
    victim.kill_all()
    s.worker(c=4)
    s.wait_ended(120)
    leaver.stop()
    s.wait_done(timeout=30)
    s.check()
    assert not list(s.redis.scan_iter("*:dlq"))
    s.nothing_left()
