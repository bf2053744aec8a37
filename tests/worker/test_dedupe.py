"""The dedupe middleware: an id that was appended twice runs once."""

from __future__ import annotations

import uuid

import pytest

from streamtask.redis import wire
from tests.helpers import wait_until
from tests.worker.rig import TASKS, keys_on

DEDUPED = TASKS.replace("make_app()", "make_app(middleware=[Dedupe(ttl=60)])")
SOME = TASKS.replace("make_app()", 'make_app(middleware=[Dedupe(ttl=60, tasks=["put"])])')


def append(site, key, n, message_id, **more):
    """What a foreign producer does: XADD, with no look at ids."""
    kwargs = {"n": n, **more} | ({"k": key} if key else {})
    envelope = wire.encode("put" if key else "free", key.encode() if key else None, message_id, [], kwargs)
    shard = site.app.queue("default").shard_for(key.encode() if key else None)
    return site.redis.xadd(site.stream(shard), {b"m": envelope})


@pytest.mark.parametrize("concurrency", [1, 4])
def test_the_same_envelope_twice_runs_once(redis_server_all, site, concurrency):
    site = site(redis_server_all, DEDUPED)
    pod = site.pod(1, concurrency)
    site.ready(1)
    key = keys_on(0, 1)[0]
    ids = [uuid.uuid4().bytes for _ in range(50)]
    for n, one in enumerate(ids):
        append(site, key, n, one)
        append(site, key, n, one)
        append(site, None, n, one + b"free")
        append(site, None, n, one + b"free")
    wait_until(lambda: site.ended() == 100, message=lambda: str(site))
    for n, one in enumerate(ids):
        append(site, key, n, one)
        append(site, None, n, one + b"free")
    site.wait_empty()
    assert site.started(key) == list(range(50))
    assert len(site.of("S")) == 100
    # Also by another process.
    pod.kill_child(pod.children()[0])
    for n, one in enumerate(ids):
        append(site, key, n, one)
        append(site, None, n, one + b"free")
    append(site, key, 1000, b"0" * 16)
    wait_until(lambda: site.of("E", key, 1000))
    site.wait_empty()
    assert len(site.of("S")) == 101
    assert site.dead() == []


def test_a_retried_message_is_no_duplicate_of_itself(redis_server, site):
    site = site(redis_server, DEDUPED)
    pod = site.pod(1)
    site.ready(1)
    one, two = uuid.uuid4().bytes, uuid.uuid4().bytes
    append(site, "a", 1, one, fail=2)
    append(site, "a", 1, one, fail=2)
    append(site, "a", 2, two, ms=500)
    append(site, "a", 2, two, ms=500)
    site.wait_started("a", 2)
    wait_until(lambda: len(site.pending(site.app.queue("default").shard_for(b"a"))) == 1)  # all but the one that runs
    pod.kill_child(pod.children()[0])  # what runs again after a crash is none either
    wait_until(lambda: site.ended() == 2)
    site.wait_empty()
    assert [(e.n, e.attempt) for e in site.of("S", "a")] == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 0)]


def test_tasks_without_it_run_as_often_as_they_were_appended(redis_server, site):
    site = site(redis_server, SOME)
    site.pod(1)
    site.ready(1)
    for _ in range(3):
        append(site, "a", 1, b"1" * 16)
        append(site, None, 1, b"1" * 16)
    site.wait_started(None, 1, count=3)
    wait_until(lambda: len(site.of("E")) == 4)
    site.wait_empty()
    assert len(site.of("S", "a")) == 1
