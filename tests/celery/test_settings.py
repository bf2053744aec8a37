"""What Celery's own settings promise holds as on its own transport."""

from __future__ import annotations

import pytest

FOLLOWERS = 40
"""More than a lane keeps bodies of."""


@pytest.mark.parametrize("how", ["rejected", "killed"])
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
