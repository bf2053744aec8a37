"""What is read from the pipes of a prefork pool when a worker's loop has ended, with a real pool and without a worker."""

from __future__ import annotations

import pytest

from tests.helpers import spawn

pytestmark = pytest.mark.slow

POOL = """
import os, select, signal, time
from types import SimpleNamespace as Some
from celery.concurrency.asynpool import AsynPool
from celery.concurrency.prefork import TaskPool
from kombu.asynchronous import Hub, set_event_loop
from streamtask.celery import pools

def turn(until, timeout=20):
    end = time.monotonic() + timeout
    loop = hub.create_loop()
    while not until():
        assert time.monotonic() < end
        hub.call_later(0.005, lambda: None)
        next(loop)

hub = Hub()
set_event_loop(hub)
early = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]
pool = AsynPool(processes=2, threads=False, synack=False, allow_restart=True, max_restarts=1000)
for fd in early:  # numbers that later files get
    os.close(fd)
pool.register_with_event_loop(hub)
begun = []
begin = lambda: pool.apply_async(time.sleep, (60,), accept_callback=lambda pid, at: begun.append(pid))
kept = TaskPool.__new__(TaskPool)
kept._pool = pool
consumer = Some(pool=kept, hub=hub, controller=Some())
"""


def run(script: str) -> str:
    with spawn("-c", POOL + script) as process:
        assert process.wait(30) == 0, str(process)
        return str(process.stdout)


def test_what_has_begun_is_heard_though_the_loop_has_ended() -> None:
    assert (
        run("""
class Weak(Some): __hash__ = object.__hash__
consumer = Weak(**vars(consumer))
pools.consumers.add(consumer)
begin()
turn(lambda: any(job._write_to is not None for job in pool._cache.values()))
assert not begun
hub.reset()
before = pools.given_back[0]
pools.hear_pools()
print(len(begun), pools.given_back[0] - before)
pool.terminate()
""")
        == "1 1\n"
    )


def test_pipes_of_processes_that_died_are_left_alone() -> None:
    """Celery remembers their numbers, which may be closed, or another file's at its end."""
    assert (
        run("""
for _ in range(3):
    begun.clear()
    begin()
    turn(lambda: begun)
    gone = next(process for process in pool._pool if process.pid == begun[0])
    fd = gone.outqR_fd
    os.kill(gone.pid, signal.SIGKILL)
    turn(lambda: all(process.pid != gone.pid for process in pool._pool) and len(pool._pool) == 2)
    for job in tuple(pool._cache.values()):
        job.discard()
    pool._fileno_to_outq[fd] = gone
    for make in (lambda: None, lambda: os.close(os.pipe()[1])):
        make()
        pools._hear(pool, hub)
print("done")
pool.terminate()
""")
        == "done\n"
    )


def test_a_process_that_dies_while_celery_forgets_is_not_lost() -> None:
    """Celery before 5.7 clears the list of jobs, and reaps right afterwards: the end of the process is for nobody."""
    assert (
        run("""
ends = []
pool.apply_async(
    time.sleep, (60,), accept_callback=lambda pid, at: begun.append(pid), lost_worker_timeout=0.1,
    error_callback=lambda info: ends.append("WorkerLostError" in str(info)),
)
turn(lambda: begun)
gone = next(process for process in pool._pool if process.pid == begun[0])
with pools.running_kept(Some(pool=kept, timer=Some(queue=[]))):
    pool._cache.clear()
    os.kill(gone.pid, signal.SIGKILL)
    gone.join()
    pool.maintain_pool()
    assert not pool._cache
turn(lambda: pool.maintain_pool() or ends)
print(ends, len(pool._cache))
pool.terminate()
""")
        == "[True] 0\n"
    )
