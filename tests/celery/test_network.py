"""Cut, silent and half-open connections, lost replies and a restarted server: each message runs once, and in order."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import uuid
from pathlib import Path

import pytest

from streamtask.redis.scripts import script
from tests.celery import app as sut
from tests.celery.rig import LEASE, Load, broker_url, close_app
from tests.helpers import free_port, is_alive, wait_until
from tests.parts import sampled
from tests.transport.fix_servers import wait_replicated


def test_the_reply_of_a_fetch_is_lost(own_server, site, wire):
    """The messages in it were delivered for Redis, and the worker has never seen them."""
    s, line = site(own_server), wire(own_server)
    s.worker(c=4, port=line.port)
    for i in range(4):
        for key in (None, "a"):
            task_id = str(uuid.uuid4())
            line.lose_reply(task_id.encode())
            s.send("put" if key else "late", key, apply={"task_id": task_id})
            s.send("put" if key else "early", key)
        wait_until(lambda lost=2 * i + 2: line.lost >= lost, 15, lambda: f"{line.lost} replies lost; {s}")
        s.wait_done(timeout=15)
    assert line.lost == 8
    assert s.check().repeated == []
    s.nothing_left()


@pytest.mark.parametrize("name, key", [("early", None), ("put", "a")])
def test_the_reply_of_a_publish_is_lost(own_server, site, proxy, name, key):
    """kombu publishes it again: there is one message."""
    s, line = site(own_server), proxy(own_server)
    app = s.producer(line.port)
    s.send(name, key, app=app)
    for _ in range(5):
        task_id = str(uuid.uuid4())
        line.cut_after_request(task_id.encode())
        s.send(name, key, app=app, apply={"task_id": task_id})
    assert line.cuts == 5
    s.worker("threads", c=2)
    s.wait_done()
    s.nothing_left()
    assert s.check().repeated == []
    assert len(s.of("S")) == 6


def test_two_publishes_at_once_over_a_bad_line(own_server, site, proxy):
    """Whatever dies between the producer and Redis: what was returned is stored once, in the order of the calls."""
    s, line = site(own_server), proxy(own_server)
    app = s.producer(line.port)
    stop = threading.Event()

    def cut() -> None:
        while not stop.wait(0.05):
            line.cut()

    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        for i in range(150):
            s.send("put", f"user{i % 4}", app=app)
            s.send("late", app=app)
    finally:
        stop.set()
        cutter.join()
    s.worker("threads", c=4)
    s.wait_done()
    assert s.check().repeated == []
    s.nothing_left()


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "restarted"])
def test_the_server_restarts(own_server, site, kill):
    """The workers go on without help, and producers' calls made meanwhile are kept."""
    s = site(own_server)
    s.start_workers(2, c=4)
    with Load(s, ms=10):
        s.wait_ended(40)
        own_server.restart(kill=kill)
        s.wait_ended(s.ended() + 100, timeout=30)
    s.wait_done(timeout=30)
    assert s.check().repeated == []
    s.nothing_left()


def test_the_server_is_away_for_longer_than_the_lease(own_server, site):
    """An outage of Redis alone kills no running body and moves nothing."""
    s = site(own_server)
    s.start_workers(2, c=4)
    running = [s.send("gated", f"user{i}") for i in range(4)]
    for n in running:
        s.wait("S", n)
    for i in range(4):
        s.send("put", f"user{i}")
    own_server.kill()
    gone = time.monotonic()
    s.gate(running[0])  # ends meanwhile: its ack waits
    s.wait("E", running[0])
    wait_until(lambda: time.monotonic() > gone + 2 * LEASE, 10)
    own_server.start()
    for n in running[1:]:
        s.gate(n)
    s.wait_done(timeout=30)
    assert s.check().repeated == []
    s.nothing_left()


def test_the_password_is_refused_for_longer_than_the_lease(own_server, site):
    """As while it is being changed: the workers wait for it, and calls made meanwhile are kept."""
    s = site(own_server)
    workers = s.start_workers(2, c=4)
    running = [s.send("gated", f"user{i}") for i in range(4)]
    for n in running:
        s.wait("S", n)
    for i in range(4):
        s.send("put", f"user{i}")
    let_in = own_server.lock_out()
    gone = time.monotonic()
    later = threading.Thread(target=s.send, args=("put", "user0"))
    later.start()
    s.gate(running[0])  # ends meanwhile: its ack waits
    s.wait("E", running[0])
    wait_until(lambda: time.monotonic() > gone + 2 * LEASE, 10)
    let_in()
    later.join(20)
    for n in running[1:]:
        s.gate(n)
    s.wait_done(timeout=30)
    assert s.check().repeated == []
    s.nothing_left()
    for worker in workers:
        assert "refused the user or password" in worker.log


def test_a_half_open_connection(own_server, site, wire):
    """Everything sent is swallowed and nothing is closed: the worker finds out by itself, and goes on."""
    s, line = site(own_server, health_check_interval=1, socket_timeout=2), wire(own_server)
    s.worker(c=4, port=line.port)
    s.mix(keys=4, each=5, late=5, ms=10)
    s.wait_done()
    assert line.freeze() > 0
    s.mix(keys=4, each=5, late=5, ms=10)
    s.wait_done(timeout=30)
    s.check()
    s.nothing_left()


def test_a_half_open_connection_of_a_busy_worker(own_server, site, wire):
    """Running bodies end, and are not run again by the same worker; what it had not started comes back."""
    s, line = site(own_server, health_check_interval=1, socket_timeout=2), wire(own_server)
    s.worker(c=4, port=line.port)
    running = [s.send("gated", f"user{i}") for i in range(2)]
    for n in running:
        s.wait("S", n)
    s.mix(keys=4, each=3, late=5)
    frozen = line.freeze()
    assert frozen > 0
    for n in running:
        s.gate(n)
    s.wait_done(timeout=40)
    s.check()
    s.nothing_left()


def test_silence_and_a_second_worker(own_server, site, proxy):
    """A worker is cut off from Redis for longer than its lease: the other one takes over, and it comes back."""
    s, line = site(own_server, health_check_interval=1, socket_timeout=2), proxy(own_server)
    lonely = s.worker(c=4, port=line.port)
    s.mix(keys=8, each=4, late=10, ms=20)
    s.worker(c=4)
    s.wait_ended(10)
    s.paused[lonely.pid] = time.monotonic()  # cut off: what it runs may run again elsewhere
    line.blackhole()
    s.mix(keys=8, each=4, late=10, ms=20)
    s.wait_done(timeout=30)
    line.blackhole(False)
    s.mix(keys=8, each=2, late=10, ms=20)
    s.wait_done(timeout=30)
    s.check()
    s.nothing_left()


@pytest.mark.parametrize(
    "pool, what",
    sampled(
        [("prefork", "worker"), ("threads", "worker"), ("threads", "keeper")],
        ("prefork", "worker"),
        ("threads", "keeper"),
    ),
)
def test_a_worker_that_is_cut_off_starts_nothing_that_it_had_prefetched(own_server, site, proxy, pool, what):
    """Once its lease is over, also before it finds out: another worker has taken over, and goes on alone. Also where the
    keeper of its leases alone is stopped, and it reaches Redis itself."""
    s, line = site(own_server, socket_timeout=1, shards=1), proxy(own_server)
    held = s.send("gated", "a")
    prefetched = [s.send("put", key) for key in ("b", "c")]
    lonely = s.worker(pool, c=1, port=line.port, words=("--without-mingle", "--without-heartbeat"))
    s.wait("S", held)
    wait_until(lambda: lonely.log.count("] received") == 3, 10, lambda: lonely.log)
    s.paused[lonely.pid] = time.monotonic()
    if what == "worker":
        line.blackhole()
    else:
        (keeper,) = [pid for pid in lonely.children() if b"keeper_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(keeper, signal.SIGSTOP)
    other = s.worker("threads", c=4)
    behind = [s.send("put", key) for key in ("b", "c", "b")]
    s.wait("S", held, main=other.pid)
    for n in (*prefetched, *behind):
        s.wait("E", n, main=other.pid)
    s.gate(held)  # ends in both, and leaves room for what was prefetched
    s.wait("E", held, main=lonely.pid)
    told = ("is not started", "broker lost")
    wait_until(lambda: any(words in lonely.log for words in told) or len(s.of("S", main=lonely.pid)) > 1, 20)
    other.stop()
    if what == "worker":
        line.blackhole(False)
    else:
        with contextlib.suppress(ProcessLookupError):  # its worker may have another by now
            os.kill(keeper, signal.SIGCONT)
    s.mix(keys=4, each=2, late=2)
    s.wait_done(timeout=30)
    assert all(len(s.of("S", n=n)) == 1 for n in (*prefetched, *behind)), s.of("S")
    s.check()
    s.nothing_left()


def test_the_connection_is_cut_under_long_keyed_bodies(own_server, site, proxy):
    """With -c 8 and bodies of 10 s, many leases: each runs once, in order, though its ack goes over another connection."""
    s, line = site(own_server), proxy(own_server)
    s.worker(c=8, port=line.port)
    for leases in (10, 2.5):
        for i in range(6):
            s.send("put", f"user{i}", ms=leases * LEASE * 1000)
        s.send("late", ms=leases * LEASE * 1000)
    for i in range(20):
        s.send("put", f"user{i % 6}")
        s.send("late")
    # One of each key, and both of the others.
    wait_until(lambda: len(s.of("S")) >= 8, 10, lambda: f"8 running; {s}")
    assert line.cut() > 0
    s.wait_ended(4, timeout=30)
    line.cut()
    s.wait_done(timeout=40)
    assert s.check().repeated == []
    s.nothing_left()


def idle_seconds(server):
    """Of each connection that waits for nothing, and so is Redis' to close: for how long it has done nothing."""
    rows = server.client().client_list(_type="normal")
    return {row["id"]: int(row["idle"]) for row in rows if "b" not in row["flags"]}


def wait_closed(server):
    """Waits until Redis has closed those of its connections that rest."""
    before = idle_seconds(server)

    def closed():
        left = {number: idle for number, idle in idle_seconds(server).items() if number in before}
        return len(left) < len(before) and not any(left.values())

    wait_until(closed, 10)


@pytest.mark.parametrize("pool, most", sampled([("prefork", 4), ("prefork", 1), ("threads", 1)], ("threads", 1)))
def test_redis_closes_idle_connections(own_server, site, pool, most):
    """As its ``timeout`` says, and many a hosted Redis does: a worker at rest, or in a long body, does not take it for an
    outage."""
    own_server.config_set(timeout=1)
    s = site(own_server, {"worker_prefetch_multiplier": most})
    worker = s.worker(pool, c=2)
    for _ in range(2):
        s.send("put", "a", ms=2500)
        s.send("late", ms=2500)
        s.wait_done()
        wait_closed(own_server)
    s.mix(keys=2, each=2, late=2)
    s.wait_done()
    assert s.check().repeated == []
    s.nothing_left()
    assert "WARNING" not in worker.log


def test_the_connection_is_lost_while_a_worker_starts(own_server, site, proxy):
    """Its pool has begun by then, and nothing reads from that yet."""
    s, line = site(own_server), proxy(own_server)
    line.cut_before_request(script("bind_queue").sha.encode(), times=3)
    worker = s.worker(c=2, port=line.port)
    assert line.cuts == 3
    assert "Connection to broker lost" in worker.log
    s.mix(keys=2, each=2, late=2)
    s.wait_done()
    assert s.check().repeated == []


def test_many_cuts_under_load(own_server, site, proxy):
    s, line = site(own_server), proxy(own_server)
    s.worker(c=4, port=line.port)
    with Load(s, ms=5, retries=True):
        for i in range(6):
            s.wait_ended(30 * (i + 1), timeout=30)
            line.cut()
    s.wait_done(timeout=30)
    assert s.check().repeated == []
    s.nothing_left()


def test_bodies_are_cancelled_on_connection_loss(own_server, site, proxy):
    """With Celery's setting for it the body is stopped, and its message comes again, at the head of its key."""
    s = site(own_server, {"worker_cancel_long_running_tasks_on_connection_loss": True})
    line = proxy(own_server)
    s.worker(c=2, port=line.port)
    n = s.send("gated", "a")
    first = s.wait("S", n)
    behind = s.send("put", "a")
    line.cut()
    again = s.wait("S", n, count=2)
    assert again.redelivered
    assert not is_alive(first.pid)
    s.gate(n)
    s.wait_done()
    assert [(event.kind, event.n) for event in s.events() if event.key == "a"][-4:] == [
        ("S", n), ("E", n), ("S", behind), ("E", behind),
    ]  # fmt: skip
    s.nothing_left()


def test_sentinels_name_another_master(sentinels, site):
    """The master dies under a worker that waits: it goes on with the new one, and producers' calls are kept."""
    master = sentinels.master
    s = site(master)
    url = f"streamtask+sentinel://127.0.0.1:{sentinels.ports[0]}/{sentinels.name}/0"
    app = sut.make(url, s.options)
    try:
        s.worker(c=2, broker_url=url)
        for _ in range(3):
            s.send("put", "a", app=app)
            s.send("late", app=app)
        s.wait_done()
        wait_replicated(master)
        master.kill()
        for _ in range(3):
            s.send("put", "a", app=app)
            s.send("late", app=app)
        s.wait_done(timeout=40)
    finally:
        close_app(app)
    assert sentinels.master is not master
    assert s.check().repeated == []


def test_a_failover_list_with_a_dead_first_server(own_server, site):
    """The second address of the list is used where the first one refuses."""
    s = site(own_server)
    url = f"{broker_url(free_port())};{broker_url(own_server.port)}"
    s.worker("threads", c=2, broker_url=url)
    s.send("put", "a")
    s.send("late")
    s.wait_done()
    s.check()
