"""Every pool of Celery: keyed messages in order, plain ones, retries, remote control and a warm shutdown."""

from __future__ import annotations

from datetime import datetime

import pytest

from tests.parts import sampled

POOLS = ["prefork", "threads", "gevent", "eventlet", "solo"]


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_keeps_the_order(own_server, site, pool):
    s = site(own_server)
    worker = s.worker(pool, c=8, words=())
    for i in range(10):
        for key in range(5):
            s.send("put", f"user{key}", ms=5, **({"fail": 1} if (i + key) % 8 == 0 else {}))
            s.send("late", ms=5)
        s.send("early")
    s.wait_done(timeout=30)
    assert s.check().repeated == []
    assert s.app.control.ping(timeout=1) == [{worker.name: {"ok": "pong"}}]
    s.nothing_left()
    worker.stop()


def test_what_a_broadcast_queue_brings_runs(own_server, site):
    """In the solo pool, which begins a body where it has received it: acknowledged before or after, due later than what a
    worker may hold of other queues, and by a route that names the exchange as well."""
    s = site(
        own_server,
        conf={"broadcast": "news", "task_routes": {"free_gated": {"queue": "news", "exchange": "news"}}},
        eta_hold=0,
    )
    worker = s.worker("solo", c=1)
    sent = [
        s.send("early", apply={"queue": "news"}),
        s.send("late", apply={"queue": "news"}),
        s.send("due", apply={"queue": "news", "countdown": 2}),
        s.send("free_gated"),
        s.send("late"),
    ]
    s.gate(sent[3])
    s.wait_done()
    assert sorted(event.n for event in s.of("S")) == sent, "each once"
    (waited,) = s.of("S", n=sent[2])
    assert waited.more["wall"] >= datetime.fromisoformat(waited.more["eta"]).timestamp() - 0.01
    s.nothing_left()
    worker.stop()
    assert "ERROR" not in worker.log


@pytest.mark.parametrize("pool", sampled(["threads", "gevent", "eventlet", "solo"], "threads", "gevent"))
def test_a_worker_of_another_pool_dies(own_server, site, pool):
    """The keeper of its lease dies with it, so what it held is back in seconds."""
    s = site(own_server)
    victim = s.worker(pool, c=4)
    s.mix(keys=5, each=8, late=20, ms=30)
    s.wait_ended(10)
    victim.kill()
    s.worker(pool, c=4)
    s.wait_done(timeout=20)
    s.check()
    s.nothing_left()


@pytest.mark.parametrize("pool", sampled(["threads", "gevent", "eventlet", "solo"], "eventlet", "solo"))
def test_the_connection_of_another_pool_is_cut(own_server, site, proxy, pool):
    s, line = site(own_server), proxy(own_server)
    s.worker(pool, c=4, port=line.port)
    s.mix(keys=5, each=8, late=20, ms=30)
    for i in range(2):
        s.wait_ended(10 + 15 * i)
        line.cut()
    s.wait_done(timeout=30)
    assert s.check().repeated == []
    s.nothing_left()


@pytest.mark.parametrize("pool", sampled(["threads", "gevent", "solo"], "solo", "gevent"))
def test_a_body_that_holds_the_interpreter_keeps_its_shard(own_server, site, pool):
    """Longer than the lease without a breath: its lease is kept by another process, so nobody else takes the message."""
    s = site(own_server)
    s.worker(pool, c=2)
    n = s.send("busy", "a", ms=2500)
    s.wait("S", n)
    s.worker(pool, c=2)
    s.send("put", "a")
    s.wait_done()
    assert s.check().repeated == []
