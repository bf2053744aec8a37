"""A deployment: three workers restarted one after the other, under load."""

from __future__ import annotations

import pytest

from tests.celery.rig import Load
from tests.helpers import wait_until
from tests.parts import sampled


@pytest.mark.parametrize("how", sampled(["warm", "pod killed"], "pod killed"))
def test_three_workers_are_restarted_under_load(own_server, site, how):
    s = site(own_server)
    workers = s.start_workers(3, c=2)
    with Load(s, keys=12, ms=10, retries=True):
        for worker in workers:
            s.wait_ended(s.ended() + 40)
            if how == "warm":
                worker.stop()
            else:
                worker.kill_all()
            s.worker(c=2)
    s.wait_done(timeout=30)
    report = s.check()
    if how == "warm":
        assert report.repeated == []
    s.nothing_left()


def test_a_warm_shutdown_hands_over_at_once(own_server, site):
    """What the leaving worker had fetched and not started is run by the other one, without waiting for a lease."""
    s = site(own_server, lease=30)
    leaving, staying = s.start_workers(2, c=2)
    s.mix(keys=10, each=10, late=40, early=40, ms=20)
    s.wait_ended(20)
    leaving.stop()
    s.wait_done(timeout=20)
    assert s.check().repeated == []
    assert {event.main for event in s.of("S")} == {leaving.pid, staying.pid}
    s.nothing_left()


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_warm_shutdown_waits_for_a_long_body_alone(own_server, site, pool):
    """The other keys go on elsewhere meanwhile, also those whose messages the leaving worker had fetched."""
    s = site(own_server, {"worker_prefetch_multiplier": 20}, lease=30)
    leaving = s.worker(pool, c=1)
    held = s.send("gated", "long")
    s.wait("S", held)
    others = [s.send("put", f"user{i % 12}") for i in range(36)]
    staying = s.worker(pool, c=1)
    leaving.terminate()
    wait_until(lambda: s.ended() >= 24, 20, lambda: f"most others ended; {s}")
    assert leaving.spawned.returncode is None
    s.gate(held)
    s.wait_done()
    assert leaving.spawned.wait(20) == 0
    assert s.check().repeated == []
    assert {event.main for event in s.of("S") if event.n in others} == {staying.pid}
    s.nothing_left()
