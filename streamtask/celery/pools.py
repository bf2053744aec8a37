"""What the processes of a prefork pool have begun. Celery's loop learns it from their pipes, and not all of it when it ends."""

from __future__ import annotations

import inspect
import mmap
import secrets
import select
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery.worker import state
from celery.worker.request import Request

from ..clock import mono_s
from . import internals

BEGIN_S = 2.0
"""How long a lost connection waits at most for idle pool processes to begin what they have been given."""

given_back = memoryview(mmap.mmap(-1, 16)).cast("Q")
"""Shared with the pool processes that are forked from this one: how often messages were given back, and a mark that tells
this memory from that of a process which was not forked."""
given_back[1] = secrets.randbits(63)


consumers: weakref.WeakSet[Any] = weakref.WeakSet()
"""Those of Celery, each with its pool."""


def hear_pools() -> None:
    """The connection is lost, or closed: from now on no late body starts in a pool process, and which have started is known."""
    pools = []
    for consumer in tuple(consumers):
        semaphore = getattr(consumer.controller, "semaphore", None)
        if semaphore is not None:
            semaphore.clear()  # a body that ends would let another one begin
        pool, hub = internals.processes_of(consumer.pool), consumer.hub
        if pool is not None and (hub is None or internals.is_heard_by_loop(pool)):
            pools.append((pool, hub))
    until = mono_s() + BEGIN_S
    for pool, _ in pools:
        _hand_over(pool, until)
    while any(_about_to_begin(pool) for pool, _ in pools) and mono_s() < until:
        for pool, hub in pools:
            _hear(pool, hub, 0.005)
    given_back[0] += 1
    for pool, hub in pools:
        _hear(pool, hub)


@contextmanager
def running_kept(consumer: Any) -> Iterator[None]:
    """Around what Celery forgets when a connection is lost. Before 5.7 that is too much, the bodies that run: nobody would hear
    of their ends; and in 5.6 too little, the requests that wait for their eta: they would run although they were given back."""
    pool = internals.processes_of(consumer.pool)
    if pool is None:
        yield
        return
    running = [(number, job) for number, job in internals.jobs(pool) if internals.has_begun(job)]
    if not hasattr(state, "scheduled_requests"):
        for item in consumer.timer.queue:
            if item.entry.args and isinstance(item.entry.args[0], Request):
                item.entry.cancel()
    yield
    kept = {number for number, _ in internals.jobs(pool)}
    for number, job in running:
        if number not in kept and not job.ready():
            internals.put_back(pool, number, job)


def _hand_over(pool: Any, until: float) -> None:
    """Writes to its end what a process of a prefork pool has been given in part."""
    for _, job in internals.jobs(pool):
        receiver, writer = internals.process_of(job), internals.unwritten(pool, job)
        if writer is None:
            continue
        room = select.poll()
        room.register(internals.pipe_to(receiver), select.POLLOUT)
        while mono_s() < until and internals.is_alive(receiver):
            if room.poll(10):
                try:
                    next(writer)
                except (StopIteration, OSError):
                    break


def _about_to_begin(pool: Any) -> bool:
    """Whether an idle process of a prefork pool has been given a message and has not said yet that it begins."""
    given = [(job, internals.process_of(job)) for _, job in internals.jobs(pool)]
    given = [(job, process) for job, process in given if process is not None]
    busy = {id(process) for job, process in given if internals.has_begun(job)}
    return any(
        id(process) not in busy and internals.is_alive(process)
        for job, process in given
        if not internals.has_begun(job)
    )


def _hear(pool: Any, hub: Any, wait_s: float = 0.0) -> None:
    """Reads what the processes of a prefork pool have said so far, above all that they have begun a body."""
    if hub is None:
        time.sleep(wait_s)  # a thread of the pool reads
        return
    waiting = select.poll()
    for process in internals.processes(pool):
        fd = internals.answers_by(pool, process)
        if fd is not None:
            waiting.register(fd, select.POLLIN)
    for fd, events in waiting.poll(int(wait_s * 1000)):
        if events & select.POLLIN:
            _hear_one(pool, hub, fd)


def _hear_one(pool: Any, hub: Any, fd: int) -> None:
    waiting = select.poll()
    waiting.register(fd, select.POLLIN)
    # A loop that has ended has no readers any more; one that reads a message in part has another.
    while hub.readers.get(fd, (pool.handle_result_event,))[0] == pool.handle_result_event and waiting.poll(0):
        pool.handle_result_event(fd)
        reader = hub.readers.get(fd, (None,))[0]
        try:
            while inspect.isgenerator(reader) and waiting.poll(100):
                next(reader)  # a part was read: the loop is about to forget it
        except (StopIteration, EOFError, OSError):
            pass
        if fd not in hub.readers:
            return  # the pipe is closed
