"""A deployment: three workers restarted one after the other, under load."""

from __future__ import annotations

import pytest

from tests.celery.rig import Load


@pytest.mark.parametrize("how", ["warm", "pod killed"])
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
