"""Redis is there and refuses: a Celery worker on streamtask stays, publishes wait, and all runs afterwards."""

from __future__ import annotations

import threading

import pytest

from tests.celery.rig import LEASE
from tests.fix_refusals import FAULTS, PASSING, refusing


@pytest.mark.parametrize("code", FAULTS)
def test_a_celery_worker_outlives_it(own_server_all, site, code):
    site = site(own_server_all)
    worker = site.worker("threads", 2)
    running = site.send("gated", "running")
    site.wait("S", running)
    idle = site.worker("solo", 1)
    failures: list[BaseException] = []

    def publish() -> None:
        try:
            for _ in range(5):
                site.send("put", "late")
        except Exception as exc:
            failures.append(exc)

    late = threading.Thread(target=publish)
    with refusing(own_server_all, code):
        if code in PASSING:
            late.start()
        for one in (worker, idle):
            with pytest.raises(AssertionError):
                one.spawned.wait(LEASE * 1.5)  # it does not end
    if code not in PASSING:
        late.start()
    site.gate(running)
    late.join(60)
    assert not late.is_alive()
    assert failures == []
    site.wait_ended(6, timeout=60)
    site.check()
    assert (worker.spawned.returncode, idle.spawned.returncode) == (None, None)
    site.nothing_left()
