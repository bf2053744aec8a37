"""What Celery's own settings promise holds as on its own transport."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.helpers import wait_until
from tests.parts import sampled

FOLLOWERS = 40
"""More than a lane keeps bodies of."""


@pytest.mark.parametrize("how", sampled(["rejected", "killed"], "killed"))
@pytest.mark.parametrize("key", [None, "a"], ids=["plain", "keyed"])
def test_deduplicate_successful_tasks(own_server, site, how, key):
    """Its result is stored, and its message comes again: the body does not run once more."""
    backend = f"redis://127.0.0.1:{own_server.port}/1"
    s = site(own_server, {"result_backend": backend, "worker_deduplicate_successful_tasks": True})
    first = s.send("unacknowledged_keyed" if key else "unacknowledged", key, how=how)
    for _ in range(FOLLOWERS):
        s.send("put" if key else "late", key)
    worker = s.worker(c=2)
    s.wait("Q", first)
    if how == "killed":
        worker.spawned.wait(15)
        s.worker(c=2)
    s.wait_done()
    s.nothing_left()
    assert [event.n for event in s.of("S", n=first)] == [first]


@pytest.mark.parametrize(
    "pool, name",
    sampled([("prefork", "early"), ("prefork", "free_gated"), ("threads", "free_gated")], ("prefork", "free_gated")),
)
def test_disable_prefetch(own_server, site, pool, name):
    """A worker is given what it has a free process for, and no more: what it can't begin is left to others."""
    s = site(own_server, {"worker_disable_prefetch": True})
    workers = s.start_workers(2, pool=pool, c=2)
    gated = {"gated": True} if name == "early" else {}
    numbers = [s.send(name, **gated) for _ in range(8)]

    def received():
        return [worker.log.count("] received") for worker in workers]

    for each in (2, 4):
        s.wait("S", count=2 * each)
        wait_until(lambda each=each: received() == [each, each], 10, received)
        for event in s.of("S"):
            s.gate(event.n)
    s.wait_done()
    starts = Counter(event.main for event in s.of("S"))
    assert starts == {worker.pid: 4 for worker in workers}
    assert sorted(event.n for event in s.of("S")) == numbers
    s.nothing_left()
