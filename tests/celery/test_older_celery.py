"""What releases of Celery before 5.7 do otherwise, when a connection is lost: workers of such a release, their messages
from the installed one."""

import os
import signal
import subprocess
import sys

import pytest

from tests.celery.rig import LEASE
from tests.helpers import ROOT, wait_until


@pytest.fixture(scope="module", params=["5.3.6", "5.5.3", "5.6.2"])
def older(request, tmp_path_factory):
    """The environment of a worker with that Celery; all that it stands on is what is installed."""
    folder = tmp_path_factory.mktemp(f"celery-{request.param}")
    argv = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*argv, "--target", folder, f"celery=={request.param}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return request.param, {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}


def test_bodies_go_on_without_their_connection(own_server, site, proxy, older):
    """They run once, the next of their keys follow, and a worker that ends warmly waits for those that run."""
    version, env = older
    s, line = site(own_server), proxy(own_server)
    worker = s.worker(c=4, port=line.port, env=env)
    assert f"v{version} " in worker.log
    running = [s.send("gated", f"user{i}") for i in range(3)]
    for n in running:
        s.wait("S", n)
    for i in range(3):
        s.send("put", f"user{i}")
    s.send("due", apply={"countdown": 2 * LEASE})
    wait_until(lambda: "Task due[" in worker.log, 10, lambda: f"it waits for its eta in the worker\n{worker.log}")
    assert line.cut() > 0
    free = s.send("late")
    s.wait("E", free)
    for n in running:
        s.gate(n)
    s.wait_done()
    last = s.send("gated", "user0")
    s.wait("S", last)
    assert line.cut() > 0
    worker.terminate()
    s.gate(last)
    worker.spawned.wait(20)
    s.check()
    assert not [n for n in (*running, last, free) if len(s.of("S", n=n)) != 1]
    s.nothing_left()


@pytest.mark.parametrize("together", [False, True], ids=["after", "together"])
def test_the_connection_is_cut_and_a_pool_process_dies(own_server, site, proxy, older, together):
    """Its message runs again: the worker has not forgotten who ran it."""
    _, env = older
    s, line = site(own_server), proxy(own_server)
    worker = s.worker(c=2, port=line.port, env=env)
    n = s.send("gated", "a")
    victim = s.wait("S", n)
    s.send("put", "a")
    if together:
        os.kill(worker.pid, signal.SIGSTOP)
        worker.kill_child(victim.pid)
        assert line.cut() > 0
        os.kill(worker.pid, signal.SIGCONT)
    else:
        assert line.cut() > 0
        s.wait("E", s.send("late"))  # it has a connection again
        worker.kill_child(victim.pid)
    s.wait("S", n, count=2)
    s.gate(n)
    s.wait_done()
    s.check()
    s.nothing_left()
