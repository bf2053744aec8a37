"""kill -9 and SIGSTOP of Celery workers: nothing lost, every key in order, what ran twice had not been acknowledged."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from typing import Any

import pytest

from tests.celery.rig import LEASE
from tests.helpers import is_alive, wait_until
from tests.parts import sampled


@pytest.mark.parametrize("what", ["main process", "pod"])
def test_a_worker_dies_and_its_messages_are_back_in_seconds(own_server, site, what):
    """Its messages wait until its lease has expired, and not one second of any visibility timeout."""
    s = site(own_server)
    victim = s.worker()
    held = [s.send("gated", f"user{i}") for i in range(4)]
    for n in held:
        s.wait("S", n)
    s.mix(keys=6, each=12, late=40, early=40, ms=60)
    other = s.start_worker()
    s.wait_ended(20)
    other.wait_ready()
    died = time.monotonic()
    (victim.kill if what == "main process" else victim.kill_all)()
    for n in held:
        s.gate(n)
        assert s.wait("S", n, main=other.pid).at - died < LEASE + 2
    s.wait_done(timeout=30)
    s.check()
    s.nothing_left()


def test_a_killed_workers_pool_processes_do_not_go_on(own_server, site):
    """An orphan that went on would run beside the redelivered message."""
    s = site(own_server)
    victim = s.worker(c=2)
    n = s.send("gated", "a")
    pid = s.wait("S", n).pid
    victim.kill()
    wait_until(lambda: not is_alive(pid), LEASE / 2, f"pool process {pid} ends with its main process")
    s.worker(c=2)
    assert s.wait("S", n, count=2).pid != pid
    s.gate(n)
    s.wait_done()
    s.check()


@pytest.mark.parametrize("name, key", [("poison", "a"), ("poison_late", None)])
def test_a_message_that_kills_its_pool_process_each_time(own_server, site, name, key):
    """It is given up after ``max_crashes``, lies whole among the dead letters, and its key goes on."""
    s = site(own_server, max_crashes=1)
    s.worker(c=2)
    n = s.send(name, key)
    others = [s.send("put", "a"), s.send("late")]
    # Celery looks for dead pool processes every 5 seconds.
    for other in others:
        s.wait("E", other, timeout=40)
    wait_until(lambda: dead(s), 40, lambda: f"a dead letter; {s}")
    assert len(s.of("S", n=n)) == 2
    ((_, fields),) = dead(s)
    assert json.loads(fields[b"error"])["reason"] == "crashed"
    s.nothing_left()


def test_a_message_that_crashed_is_counted_over_its_workers(own_server, site):
    """What it did to one worker's processes is known to the next worker."""
    s = site(own_server, max_crashes=1)
    worker = s.worker(c=1)
    n = s.send("poison", "a")
    s.wait("S", n, count=2, timeout=30)
    worker.kill()
    s.worker(c=1)
    wait_until(lambda: dead(s), 40, lambda: f"a dead letter; {s}")
    assert len(s.of("S", n=n)) <= 3  # the last crash before the worker's end may have gone unnoticed
    s.nothing_left()


@pytest.mark.parametrize(
    "pool, name, key",
    sampled(
        [
            ("solo", "poison", "a"),
            ("solo", "poison_late", None),
            ("threads", "poison_late", None),
            ("gevent", "poison", "a"),
        ],
        ("solo", "poison_late", None),
        ("gevent", "poison", "a"),
    ),
)
def test_a_message_that_kills_its_worker_each_time(own_server, site, pool, name, key):
    """Its first death is nobody's, for many bodies may have run; from its second run on they are counted. Not with those that
    had ended before it."""
    s = site(own_server, max_crashes=1)
    others = [s.send("put", "b"), s.send("late")]
    n = s.send(name, key)
    others += [s.send("put", "a"), s.send("late")]
    for count in (1, 2, 3):
        worker = s.start_worker(pool, c=1)
        s.wait("S", n, count=count, timeout=20)
        worker.spawned.wait(20)
    s.worker(pool, c=1)
    for other in others:
        s.wait("E", other)
    wait_until(lambda: dead(s), 20, lambda: f"a dead letter; {s}")
    assert len(s.of("S", n=n)) == 3
    ((_, fields),) = dead(s)
    assert json.loads(fields[b"error"])["reason"] == "crashed"
    s.nothing_left()


@pytest.mark.parametrize("name, key", sampled([("poison", "a"), ("poison_late", None)], ("poison", "a")))
def test_what_runs_beside_a_message_that_kills_its_worker_is_spared(own_server, site, name, key):
    """It is counted with it at first; then they run one at a time, so that only one of them is counted."""
    s = site(own_server, max_crashes=1)
    beside = [s.send("put", f"user{i}", ms=200) for i in range(3)] + [s.send("late", ms=200) for _ in range(3)]
    n = s.send(name, key)

    def decided() -> bool:
        if not is_alive(workers[-1].pid):
            workers.append(s.start_worker("threads", c=8))
        return bool(dead(s)) and all(s.of("E", n=other) for other in beside)

    workers = [s.start_worker("threads", c=8)]
    wait_until(decided, 60, lambda: f"a dead letter; {s}", poll=0.05)
    s.nothing_left()
    assert [json.loads(fields[b"error"])["reason"] for _, fields in dead(s)] == ["crashed"]
    assert 3 <= len(s.of("S", n=n)) <= 4


@pytest.mark.parametrize("pool", sampled(["threads", "solo"], "threads"))
def test_a_worker_that_was_told_to_stop_and_is_killed_is_no_crash(own_server, site, pool):
    """As in a deployment whose grace period is shorter than its bodies, however often that happens."""
    s = site(own_server, max_crashes=1)

    def marks() -> list[bytes]:
        notes = [text for key in s.redis.scan_iter("*:notes:*") for text in s.redis.hvals(key)]
        return [mark for _, _, _, mark, _, _ in (text.split() for text in notes) if mark != b"0"]

    held = [s.send("gated", "a"), *([s.send("free_gated")] if pool == "threads" else [])]
    for count in range(1, 4):
        worker = s.worker(pool, c=2)
        for n in held:
            s.wait("S", n, count=count)
        assert len(marks()) == (len(held) if count > 1 else 0)
        worker.terminate()
        wait_until(lambda: not marks())
        worker.kill()
    s.worker(pool, c=2)
    for n in held:
        s.wait("S", n, count=4)
        s.gate(n)
    s.wait_done()
    s.nothing_left()
    assert dead(s) == []


@pytest.mark.parametrize(
    "pool, name, key",
    sampled(
        [("prefork", "hungry", "a"), ("solo", "hungry_late", None), ("threads", "hungry", "a")],
        ("prefork", "hungry", "a"),
    ),
)
def test_a_message_that_raises_memory_error_each_time(own_server, site, pool, name, key):
    """Celery ends the worker for it, and would do so for ever."""
    s = site(own_server, max_crashes=1)
    n = s.send(name, key)
    others = [s.send("put", "a"), s.send("late")]
    worker = s.start_worker(pool, c=1)
    ended = 0

    def decided() -> bool:
        nonlocal worker, ended
        if not is_alive(worker.pid):
            ended += 1
            worker = s.start_worker(pool, c=1)
        return bool(dead(s))

    wait_until(decided, 40, lambda: f"a dead letter; {s}", poll=0.05)
    for other in others:
        wait_until(lambda other=other: decided() and s.of("E", n=other), 20)
    assert len(s.of("S", n=n)) <= 3
    assert ended <= 3
    assert json.loads(dead(s)[0][1][b"error"])["reason"] == "crashed"
    s.nothing_left()


@pytest.mark.parametrize(
    "pool, name, key, most",
    [("prefork", "overrun_again", "a", 1), ("prefork", "overrun_late", None, 0), ("gevent", "overrun_again", "a", 1)],
)
def test_a_message_that_overruns_its_time_limit_each_time(own_server, site, pool, name, key, most):
    """Where that is not to acknowledge it, it comes again; ``max_crashes`` times, and its key goes on."""
    s = site(own_server, max_crashes=most)
    s.worker(pool, c=1)
    n = s.send(name, key)
    others = [s.send("put", "a"), s.send("late")]
    for other in others:
        s.wait("E", other, timeout=30)
    wait_until(lambda: dead(s), 20, lambda: f"a dead letter; {s}")
    ((_, fields),) = dead(s)
    error = json.loads(fields[b"error"])
    assert error["reason"] == "crashed"
    assert "time limit of 0.2 s" in error["message"]
    assert len(s.of("S", n=n)) == most + 1
    s.nothing_left()


def dead(s):
    return [letter for key in s.redis.scan_iter("*:dlq") for letter in s.redis.xrange(key)]


def test_a_pool_process_dies_in_a_keyed_body(own_server, site):
    """It is rejected and redelivered at the head of its key, by the same worker, at once."""
    s = site(own_server)
    worker = s.worker()
    n = s.send("gated", "a")
    first = s.wait("S", n)
    for _ in range(5):
        s.send("put", "a")
        s.send("put", "b")
    worker.kill_child(first.pid)
    second = s.wait("S", n, count=2)
    assert second.pid != first.pid
    assert second.at - s.killed[first.pid] < 5
    assert second.redelivered
    s.gate(n)
    s.wait_done()
    assert len(s.check().repeated) == 1
    s.nothing_left()


def test_pool_processes_die_under_load(own_server, site):
    """Those of keyed and late-acknowledged bodies, one after the other."""
    s = site(own_server)
    worker = s.worker(c=4)
    s.mix(keys=5, each=20, late=40, ms=30)

    def running() -> list[Any]:
        ended = {(event.key, event.n) for event in s.events() if event.kind == "E"}
        return [event for event in s.of("S") if (event.key, event.n) not in ended and is_alive(event.pid)]

    for i in range(4):
        s.wait_ended(10 + 15 * i)
        worker.kill_child(wait_until(running, 20)[-1].pid)
    s.wait_done(timeout=30)
    s.check()
    s.nothing_left()


def test_a_worker_is_stopped_beyond_its_lease_and_continued(own_server, site):
    """The other worker goes on meanwhile; the continued one starts nothing that was taken from it."""
    s = site(own_server)
    paused = s.worker()
    running = [s.send("gated", f"held{i}") for i in range(3)]
    for n in running:
        s.wait("S", n)
    other = s.worker()
    s.mix(keys=8, each=8, late=30, ms=30)
    for i in range(3):
        s.send("put", f"held{i}")
    s.wait_ended(15)
    paused.pause()
    for n in running:
        s.wait("S", n, count=2, timeout=LEASE + 8)  # the other one has it now
        s.gate(n, main=other.pid)
    s.wait_done(timeout=30)
    for n in running:
        s.gate(n, main=paused.pid)  # the old bodies end, which changes nothing
    before = s.events()
    paused.resume()
    keyed = {s.send("put", f"after{i}") for i in range(6)}
    for _ in range(6):
        s.send("late")
    s.wait_done(timeout=20)
    s.check()
    fresh = s.events()[len(before) :]
    assert {event.n for event in fresh if event.kind == "S" and event.key} == keyed
    s.nothing_left()
    print("the continued worker lives" if is_alive(paused.pid) else "the continued worker was ended")


def test_a_short_stop_costs_nothing(own_server, site):
    """Shorter than the lease: nothing moves, nothing runs twice."""
    s = site(own_server, lease=9)
    worker, _ = s.start_workers(2, c=8)
    s.mix(keys=8, each=1)

    def leases() -> dict[bytes, tuple[bytes, ...]]:
        keys = sorted(key for key in s.redis.scan_iter("*:lease:*", count=1000) if b".shared}" not in key)
        return dict(zip(keys, (tuple(s.redis.hmget(key, "owner", "token")) for key in keys), strict=True))

    # Stopped in the middle of a hand-over, it would keep the other one waiting.
    wait_until(lambda: [*Counter(owner for owner, _ in leases().values() if owner).values()] == [4, 4], 15, leases)
    before = leases()
    running = [s.send("gated", f"user{i}") for i in range(8)]
    for n in running:
        s.wait("S", n)
    s.mix(keys=8, each=5, late=20)
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        for n in running[:4]:
            s.gate(n)  # those of its pool end meanwhile
        time.sleep(4)  # longer than from one renewal to the next
    finally:
        os.kill(worker.pid, signal.SIGCONT)
    for n in running[4:]:
        s.gate(n)
    s.wait_done(timeout=30)
    assert s.check().repeated == []
    assert leases() == before
