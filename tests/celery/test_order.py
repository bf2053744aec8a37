"""Keyed tasks on stock workers: one body of a key at a time, in order, whatever becomes of the messages before it."""

from __future__ import annotations

import pytest
from celery import chain, group

from tests.celery.checker import check
from tests.celery.rig import Load
from tests.helpers import wait_until
from tests.parts import sampled


@pytest.mark.quick
def test_keys_run_in_order_and_beside_each_other(own_server, site):
    s = site(own_server)
    s.start_workers(2, c=4)
    s.mix(keys=12, each=15, ms=5)
    s.wait_done()
    assert s.check().repeated == []
    assert len({event.pid for event in s.of("S")}) > 4
    s.nothing_left()


def test_plain_messages_are_not_held_up_by_keyed_ones(own_server, site):
    """Keys whose heads run or fail keep neither plain messages nor other keys, and fill no prefetch."""
    s = site(own_server)
    s.worker(c=8)
    heads = [s.send("gated", f"stuck{i}") for i in range(4)]
    for n in heads:
        s.wait("S", n)
    behind = [s.send("put", f"stuck{i % 4}") for i in range(200)]
    for i in range(100):
        s.send("late")
        s.send("early")
        s.send("put", f"free{i % 10}")
    s.wait_ended(300, timeout=15)
    assert not set(behind) & {event.n for event in s.of("S")}
    for n in heads:
        s.gate(n)
    s.wait_done()
    assert s.check().repeated == []
    s.nothing_left()


def test_keyed_messages_are_not_held_up_by_plain_ones(own_server, site):
    """Many plain messages before a keyed one, in the same queue: it gets its turn before they are through."""
    s = site(own_server)
    s.worker(c=2)
    for _ in range(400):
        s.send("late", ms=10)
    n = s.send("put", "a")
    s.wait("E", n, timeout=30)
    assert s.ended() < 300
    s.wait_done(timeout=30)
    s.check()


def test_one_worker_runs_the_keys_of_a_shard(own_server, site):
    """Many keys, few shards, three workers that come one after the other."""
    s = site(own_server, shards=4)
    s.worker(c=2)
    with Load(s, keys=40, ms=2):
        s.wait_ended(40)
        s.worker(c=2)
        s.wait_ended(80)
        s.worker(c=2)
        wait_until(
            lambda: len({event.main for event in s.of("S") if event.key}) == 3, 25,
            lambda: f"three workers run keyed messages; {s}",
        )  # fmt: skip
    s.wait_done()
    assert s.check().repeated == []


def test_what_gives_itself_back_stays_at_the_head(own_server, site):
    """Reject(requeue=True) in a keyed body: it is redelivered before its followers."""
    s = site(own_server)
    s.worker(c=4)
    n = s.send("requeued", "a", times=3)
    for _ in range(5):
        s.send("put", "a")
    s.wait_done()
    s.check()
    assert len(s.of("S", n=n)) == 4
    s.nothing_left()


def test_heads_that_never_run_free_their_key(own_server, site):
    """Rejected for good, expired, revoked, of an unknown task, over its time limit: the followers run."""
    s = site(own_server)
    s.worker(c=4)
    first = s.send("gated", "rejected")
    s.gate(first, outcome="reject")
    s.send("put", "rejected")

    gated = s.send("gated", "expired")
    expired = s.send("put", "expired", apply={"expires": 0.3})
    s.send("put", "expired")

    waits = s.send("gated", "revoked")
    revoked = s.send("put", "revoked", apply={"task_id": "to-be-revoked"})
    s.send("put", "revoked")
    s.app.control.revoke("to-be-revoked")

    @s.app.task(name="no.such.task", shard_key="k", shared=False)
    def unknown_to_the_worker(k, n):
        raise AssertionError

    unknown = s.send("no.such.task", "unknown")
    s.send("put", "unknown")

    overrun = s.send("overrun", "slow")
    s.send("put", "slow")

    skipped = {("expired", expired), ("revoked", revoked), ("unknown", unknown), ("slow", overrun)}
    started = s.wait("S", gated)
    wait_until(lambda: s.wait("S", overrun) and len(s.of("E", key="slow")) == 1, 15, lambda: f"the time limit; {s}")
    assert s.of("E", key="slow")[0].at > started.at + 0.3
    s.gate(gated)
    s.gate(waits)
    s.wait_done(skip=skipped)
    for event in s.of("S"):
        assert event.n not in (expired, revoked)
    for key, n in skipped:
        s.produced[key].remove(n)
    events = [event for event in s.events() if event.n != overrun]
    check(events, s.produced)
    s.nothing_left()


def test_a_key_of_the_call_and_of_a_signature(own_server, site):
    """shard_key= in apply_async and in signatures, also on a task that names none; ``42`` and ``"42"`` are one key."""
    s = site(own_server)
    s.worker(c=8)
    early = s.app.tasks["early"]
    numbers = s.numbers(30)
    for i, n in enumerate(numbers):
        key = 42 if i % 2 else "42"
        if i % 3:
            early.apply_async(kwargs={"n": n, "ms": 20}, shard_key=key)
        else:
            early.si(n=n, ms=20).set(shard_key=key).apply_async()
    wait_until(lambda: len(s.of("E")) == 30, 15, lambda: str(s))
    kinds = [(event.kind, event.n) for event in s.events() if event.kind in "SE"]
    assert kinds == [(kind, n) for n in numbers for kind in "SE"]


def test_a_canvas_of_keyed_tasks(own_server, site):
    """Chains, groups and chords of keyed tasks give their results, and keep the order of a key."""
    backend = f"redis://127.0.0.1:{own_server.port}/1"
    s = site(own_server, conf={"result_backend": backend, "task_ignore_result": False})
    s.worker(c=4)
    number, total = s.app.tasks["keyed_number"], s.app.tasks["total"]
    links = chain(*(number.si("a", n) for n in range(3)), app=s.app)()
    many = group((number.si("b", n) for n in range(10, 20)), app=s.app)()
    (end,) = s.numbers(1)
    chorded = (group((number.si("c", n) for n in range(20, 30)), app=s.app) | total.s(n=end))()
    assert links.get(timeout=15) == 2
    assert many.get(timeout=15) == list(range(10, 20))
    assert chorded.get(timeout=15) == sum(range(20, 30))
    for result in (links, many, chorded):
        result.forget()
    s.produced.update({"a": [0, 1, 2], "b": list(range(10, 20)), "c": list(range(20, 30)), None: [end]})
    assert s.check().repeated == []


@pytest.mark.parametrize("pool", sampled(["prefork", "threads", "solo"], "prefork", "threads"))
def test_shards_move_though_long_bodies_wait_in_the_worker(own_server, site, pool):
    """What a worker has fetched and not begun goes with its shard: only running bodies are waited for."""
    s = site(own_server, {"worker_prefetch_multiplier": 20}, shards=2, handover_timeout=1)
    first = s.worker(pool, c=1)
    for _ in range(3):
        for key in range(16):
            s.send("put", f"user{key}", ms=300)
    s.wait_ended(2)
    # However long the second takes to start, there is something left for it.
    with Load(s, keys=16, ms=100, pause=0.1):
        second = s.worker(pool, c=1)
        wait_until(lambda: len(s.of("S", main=second.pid)) >= 12, 25, lambda: f"the second worker has its part; {s}")
        assert len(s.of("S", main=first.pid)) >= 2
    s.wait_done(timeout=40)
    assert s.check().repeated == []
    s.nothing_left()
