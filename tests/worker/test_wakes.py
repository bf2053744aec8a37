"""What a process is told of is seen at once, whatever else it does: a due message, a lane that opens, entries on offer."""

from __future__ import annotations

import contextlib

import pytest

from streamtask.coordination.lease import join_shared
from streamtask.operations import Inspector
from streamtask.redis.keys import SHARED
from tests.helpers import wait_until
from tests.parts import sampled
from tests.worker.rig import keys_on


@pytest.mark.parametrize("concurrency, body_ms", sampled([(1, 5), (4, 20), (4, 400)], (1, 5)))
def test_while_another_shard_has_a_backlog(redis_server, site, concurrency, body_ms):
    """A due message runs before a later one of its key, and a held lane opens, though the process's other shard is full."""
    site = site(redis_server, shards=2, on_dead="hold")
    busy, (key, held) = keys_on(0, 40, 2), keys_on(1, 2, 2)
    site.pod(1, concurrency)
    site.ready(1)
    site.task("gated").delay(k=held, n=0)
    site.open_gate(0, outcome="reject")
    wait_until(site.dead)
    site.task("put").send_many([{"k": k, "n": n, "ms": body_ms} for n in range(60) for k in busy])
    wait_until(lambda: len(site.of("S")) > 5)
    delayed = site.keys.shard(0, 1).delayed
    site.task("put").apply_async(kwargs={"k": key, "n": 0}, countdown=0.3)
    assert site.redis.zcard(delayed) == 1
    site.task("put").delay(k=held, n=1)
    with contextlib.closing(Inspector(site.app)) as inspector:
        assert inspector.drop("default") == 1
    wait_until(lambda: site.redis.zcard(delayed) == 0, 30, lambda: str(site))
    site.task("put").delay(k=key, n=1)
    wait_until(lambda: len(site.started(key)) == 2 and site.started(held) == [0, 1], 30, lambda: str(site))
    assert site.started(key) == [0, 1]
    assert site.redis.xlen(site.stream(0)) > 200, "the other shard was busy all the time"


@pytest.mark.parametrize("concurrency", sampled([1, 4], 4))
def test_while_a_body_takes_long_and_more_waits_behind_it(redis_server, site, concurrency):
    """What falls due is moved in time where no shard has room, or all that run bodies are taken."""
    site = site(redis_server, shards=2)
    busy, (key,) = keys_on(0, 4, 2), keys_on(1, 1, 2)
    site.pod(1, concurrency)
    site.ready(1)
    for k in busy:
        site.send_gated(k, 0)
    site.send(busy[0], range(1, 801))
    wait_until(lambda: len(site.of("S")) == concurrency and len(site.pending(0)) >= 200)
    site.task("put").apply_async(kwargs={"k": key, "n": 0}, countdown=0.3)
    site.produced[key].append(0)
    wait_until(lambda: site.redis.zcard(site.keys.shard(0, 1).delayed) == 0, 15, lambda: str(site))
    assert not site.of("E")
    site.send(key, [1])
    site.open_gate(0)
    site.wait_ended()
    assert site.check(killed={}).repeated == 0


@pytest.mark.parametrize("concurrency", [1, 4])
def test_an_audit_takes_nothing_that_is_on_its_way_here(redis_server, site, concurrency):
    """What a fetch under way brings is pending before its reply is read."""
    site = site(redis_server)
    site.audit_s = 0.01
    site.pod(1, concurrency)
    site.ready(1)
    for first in range(0, 400, 100):
        for key in "abcdefgh":
            site.send(key, range(first, first + 100))
        site.send(None, range(first, first + 100))
    site.wait_ended()
    assert site.check(killed={}).repeated == 0


def test_all_that_a_dead_process_held_is_taken(redis_server_all, site):
    """More than one call takes; nobody has to look for what is left."""
    site = site(redis_server_all)
    queue = site.app.queue("default")
    queue.declare(("workers",))
    site.send(None, range(300))
    keys = site.keys.shard(0, SHARED)
    with contextlib.closing(queue.broker.link()) as link:
        join_shared(link, keys, "workers", "dead", 500, alive=site.keys.alive("workers", keys, cluster=False))
        link.command("XREADGROUP", "GROUP", "workers", "dead", "COUNT", 300, "STREAMS", keys.stream, ">")
    assert len(site.pending(SHARED)) == 300
    site.pod(1)
    site.wait_ended()
    site.wait_empty()
    assert site.check().repeated == 0
