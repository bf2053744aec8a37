"""Redis is there and refuses: a Celery worker on streamtask stays, publishes wait, and all runs afterwards."""

from __future__ import annotations

import threading

import pytest

from tests.celery import app as sut
from tests.celery.rig import LEASE, SCHEME, close_app
from tests.fix_refusals import FAULTS, PASSING, refusing, server_for
from tests.parts import sampled


@pytest.fixture
def refuser(own_server_all, site, request):
    """A server that can refuse with the test's code, a site there, and what its workers have to know."""
    code = request.node.callspec.params["code"]
    with server_for(code, own_server_all) as server:
        on = site(server)
        if code != "CLUSTERDOWN":
            yield server, on, {}
            return
        url = f"streamtask+cluster://127.0.0.1:{server.port}"
        on.app = sut.make(url, on.options)
        yield server, on, {"broker_url": url}
        close_app(on.app)


@pytest.mark.old_redis("BUSY", "MISCONF", "OOM")
@pytest.mark.parametrize("code", sampled(FAULTS, "MISCONF", "NOPERM"))
def test_a_celery_worker_outlives_it(refuser, code):
    server, site, conf = refuser
    worker = site.worker("threads", 2, **conf)
    running = site.send("gated", "running")
    site.wait("S", running)
    idle = site.worker("solo", 1, **conf)
    failures: list[BaseException] = []

    def publish() -> None:
        try:
            for _ in range(5):
                site.send("put", "late")
        except Exception as exc:
            failures.append(exc)

    late = threading.Thread(target=publish)
    with refusing(server, code):
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


RULES = ("-zrem", "-evalsha", "-xread", "-psubscribe", "resetkeys")


def test_a_worker_that_never_may_says_what_it_lacks_and_ends(own_server, site):
    """Of Redis' access rules. One that has run waits until they are put right (above)."""
    s = site(own_server)
    workers = {}
    for rule in RULES:
        s.redis.execute_command("ACL", "SETUSER", f"u{rule}", "on", ">p", "~*", "&*", "+@all", rule)
        url = f"{SCHEME}://u{rule}:p@127.0.0.1:{own_server.port}/0"
        workers[rule] = s.start_worker("threads", 1, broker_url=url)
    for rule, worker in workers.items():
        assert worker.spawned.wait(60) == 1, rule
        assert "refuses the user a command or a key, which its ACL must allow" in worker.log
        assert "Trying again" not in worker.log
        assert rule.strip("-") in worker.log or rule == "resetkeys"
