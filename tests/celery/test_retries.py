"""Retries of keyed tasks: the key's later messages wait until the retry has run, or failed for good, through any crash."""

from __future__ import annotations

import pytest

from tests.celery.rig import LEASE, Load


def test_order_holds_under_retries(own_server, site):
    """self.retry with a countdown and autoretry_for, among messages that succeed, with 8 pool processes."""
    s = site(own_server)
    s.worker(c=8)
    for i in range(12):
        for key in range(6):
            name = "auto" if key % 2 else "put"
            fail = [0, 0, 1, 0, 2, 0][(i + key) % 6]
            s.send(name, f"user{key}", **({"fail": fail} if fail else {}))
            s.send("late", **({"fail": 1} if i % 6 == 0 else {}))
    s.wait_done(timeout=30)
    report = s.check()
    assert report.repeated == []
    for event in s.of("E"):
        # As often as it failed, no more and no less.
        assert event.attempt == sum(1 for failed in s.of("F", n=event.n))
    s.nothing_left()


@pytest.mark.parametrize("name", ["put", "auto"])
def test_a_message_that_fails_for_good_frees_its_key(own_server, site, name):
    s = site(own_server)
    s.worker(c=4)
    dead = s.send(name, "a", fail=9)
    for _ in range(5):
        s.send(name, "a")
    s.wait_done()
    s.check()
    assert [event.attempt for event in s.of("S", n=dead)] == [0, 1, 2, 3]
    assert [event.n for event in s.of("D")] == [dead]
    s.nothing_left()


def test_a_waiting_retry_holds_only_its_key(own_server, site):
    s = site(own_server)
    s.worker(c=2)
    n = s.send("put", "a", fail=1, countdown=2)
    s.wait("F", n)
    for i in range(20):
        s.send("put", "a")
        s.send("put", f"b{i % 4}")
        s.send("late")
    s.wait_ended(40)
    second = s.of("S", n=n)[1:]
    assert second == [], "all but those of the key run while the retry waits"
    s.wait_done()
    s.check()


def test_a_retry_and_what_is_published_meanwhile(own_server, site):
    """What is published while the head waits for its retry runs after it."""
    s = site(own_server)
    s.worker(c=4)
    with Load(s, keys=3, retries=True, ms=1):
        s.wait_ended(150, timeout=30)
    s.wait_done()
    assert s.check().repeated == []


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_worker_dies_at_its_retry(own_server, site, when):
    """In the body, before its retry is published, or after that and before the old message is acknowledged."""
    s = site(own_server)
    victim = s.start_worker(c=4)
    n = s.send("deadly", "a", when=when)
    for _ in range(5):
        s.send("put", "a")
        s.send("put", "b")
    victim.wait_killed()
    s.worker(c=4)
    s.wait_done(timeout=LEASE + 15)
    s.check()
    attempts = [event.attempt for event in s.of("S", n=n)]
    # A retry that was stored is the message: it runs, and what it replaced does not.
    assert attempts == ([0, 0, 1] if when == "before" else [0, 1])
    s.nothing_left()


@pytest.mark.quick
def test_a_worker_dies_while_a_retry_waits(own_server, site):
    """After the ack of the old message: the lane stays closed, in the next worker too, until the retry is due."""
    s = site(own_server)
    victim = s.worker(c=4)
    # Long enough for a new worker to start before; on a machine that needs longer, less is seen and nothing is wrong.
    n = s.send("put", "a", fail=1, countdown=LEASE + 4)
    later = [s.send("put", "a") for _ in range(5)]
    s.wait("A")
    # The ack is sent at most some milliseconds later; a key of its own shows that the worker is past it.
    s.send("put", "b")
    s.wait("A", count=2)
    victim.kill_all()
    s.worker(c=4)
    s.send("put", "c")
    s.wait_ended(2)
    s.wait_done(timeout=15)
    s.check()
    events = s.of("S", n=n)
    assert [event.attempt for event in events] == [0, 1]
    assert events[1].at - events[0].at >= LEASE + 3.9
    assert s.of("S", n=later[0])[0].at > events[1].at
    s.nothing_left()


def test_the_connection_is_cut_while_retries_wait(own_server, site, proxy):
    s, line = site(own_server), proxy(own_server)
    s.worker(c=4, port=line.port)
    for i in range(6):
        s.send("put", f"user{i}", fail=2, countdown=0.5)
        s.send("put", f"user{i}")
    for failed in (3, 8, 12):
        s.wait("F", count=failed)
        line.cut()
    s.wait_done()
    s.check()
    s.nothing_left()


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_the_server_is_down_for_longer_than_celery_tries_to_publish_a_retry(own_server, site, pool):
    """Celery would reject the message for good. Here it goes back, to the head of its key, and runs again."""
    s = site(own_server, {"task_publish_retry_policy": {"max_retries": 1, "interval_start": 0.02}})
    s.worker(pool, c=2)
    n = s.send("put", "a", fail=1, gated=True)
    plain = s.send("late", fail=1, gated=True)
    behind = s.send("put", "a")
    s.wait("S", count=2)
    own_server.kill()
    s.gate(n)
    s.gate(plain)
    s.wait("Q", count=2)
    own_server.restart()
    s.wait_done()
    s.check()
    for retried in (n, plain):
        assert [event.attempt for event in s.of("S", n=retried)] == [0, 0, 1]
    assert s.of("S", n=behind)[0].at > s.of("E", n=n)[0].at
    assert not list(s.redis.scan_iter("*:dlq"))
    s.nothing_left()


def test_the_reply_of_a_retrys_publish_is_lost(own_server, site, proxy):
    """It is published again, as the same replacement of the same message."""
    s, line = site(own_server), proxy(own_server)
    s.worker(c=2, port=line.port)
    n = s.send("put", "a", fail=1, countdown=0.2, apply={"task_id": "the-message-that-fails"})
    s.send("put", "a")
    s.wait("F", n)
    s.wait_done()
    # Once more; now the reply of the retry's publish, the only call that sends this id to Redis.
    other = s.send("put", "b", ms=500, fail=1, countdown=0.2, apply={"task_id": "another-that-fails"})
    s.send("put", "b")
    s.wait("S", other)
    line.cut_after_request(b"another-that-fails")
    s.wait_done()
    assert line.cuts == 1
    assert s.check().repeated == []
    assert [event.attempt for event in s.of("S", n=other)] == [0, 1]
    s.nothing_left()
