"""ETA and countdown: far ones wait in the broker, not in a worker's memory, and each runs once."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from time import time

from tests.celery.rig import SCHEME, Load


def in_seconds(seconds: float) -> datetime:
    return datetime.now(timezone.utc) + timedelta(seconds=seconds)


def test_a_thousand_eta_tasks_over_restarts_of_every_worker(own_server, site):
    s = site(own_server, eta_hold=0.3)
    workers = s.start_workers(3, c=2)
    began = time()
    for _ in range(50):
        s.send("early")
    # Time to publish them all on this machine, as it is now.
    start = in_seconds(5 + 3 * (time() - began) * 1000 / 50)
    for i in range(1000):
        s.send("due", apply={"eta": start + timedelta(seconds=i * 0.005)})
    stats = s.app.control.inspect(timeout=1).stats() or {}
    assert len(stats) == 3
    swollen = {name: stat["prefetch_count"] for name, stat in stats.items()}
    if SCHEME == "streamtask":
        assert set(swollen.values()) == {8}, f"prefetch counts {swollen} with 1,000 waiting"
    # One is killed while all of them wait, the others are shut down before and while they fall due.
    workers[0].kill_all()
    workers[1].terminate()
    workers += [s.start_worker(c=2), s.start_worker(c=2)]
    for worker in workers[3:]:
        worker.wait_ready()
    s.wait_ended(200, timeout=30)
    workers[2].terminate()
    s.wait_ended(400, timeout=30)
    workers.append(s.worker(c=2))
    s.wait_done(timeout=30)
    assert s.check().repeated == []
    waited = [e for e in s.of("S") if "eta" in e.more]
    early = [e.more for e in waited if e.more["wall"] < datetime.fromisoformat(e.more["eta"]).timestamp() - 0.01]
    assert early == []
    s.nothing_left()


def test_what_waits_keeps_nothing_from_running(own_server, site):
    """More waiting ETA tasks than any prefetch; the plain ones run meanwhile, and an order of dues is kept."""
    s = site(own_server, eta_hold=0.2)
    s.worker("threads", c=2)
    for _ in range(100):
        s.send("due", apply={"countdown": 60})
    plain = [s.send("late") for _ in range(50)]
    s.wait_ended(len(plain), timeout=5)
    assert s.app.control.inspect(timeout=1).scheduled() == {"w1@test": []}


def test_keyed_messages_take_their_place_when_due(own_server, site):
    """A delayed message of a key lets later immediate ones go first, and never holds their lane."""
    s = site(own_server)
    s.worker("threads", c=2)
    delayed = s.send("put", "a", apply={"countdown": 1.5})
    later = [s.send("put", "a") for _ in range(10)]
    s.wait_done(timeout=15)
    assert [event.n for event in s.of("S", key="a")] == [*later, delayed]
    s.produced["a"] = [*later, delayed]
    s.check()


def test_near_etas_come_back_after_a_kill(own_server, site):
    """Those within eta_hold lie in a worker's memory, unacknowledged: they are back when its lease is over."""
    s = site(own_server, eta_hold=30)
    victim = s.worker(c=2)
    for _ in range(20):
        s.send("due", apply={"countdown": 4})
    scheduled = s.app.control.inspect(timeout=1).scheduled() or {}
    assert len(scheduled.get(victim.name, [])) > 0
    victim.kill_all()
    s.worker(c=2)
    s.wait_done(timeout=20)
    assert s.check().repeated == []


def test_near_etas_survive_a_cut(own_server, site, proxy):
    """Celery drops the ETA requests of a lost connection; they are delivered again, and run once."""
    s, line = site(own_server, eta_hold=30), proxy(own_server)
    s.worker(c=2, port=line.port)
    for _ in range(20):
        s.send("due", apply={"countdown": 3})
    s.send("late")
    s.wait_ended(1)
    line.cut()
    with Load(s, pause=0.05):
        s.wait_ended(30)
    s.wait_done(timeout=20)
    assert s.check().repeated == []
