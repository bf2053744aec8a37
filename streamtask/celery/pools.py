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

from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.worker import state
from celery.worker.request import Request

from ..clock import mono_s

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
        if isinstance(consumer.pool, PreforkPool) and consumer.pool._pool is not None:
            pool, hub = consumer.pool._pool, consumer.hub
            # Before the loop hears the pool, its processes have been given nothing.
            if hub is None or "handle_event" in vars(pool._result_handler):
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
    pool = consumer.pool._pool if isinstance(consumer.pool, PreforkPool) else None
    if pool is None:
        yield
        return
    running = {number: job for number, job in tuple(pool._cache.items()) if job._accepted}
    if not hasattr(state, "scheduled_requests"):
        for item in consumer.timer.queue:
            if item.entry.args and isinstance(item.entry.args[0], Request):
                item.entry.cancel()
    yield
    for number, job in running.items():
        if number in pool._cache or job.ready():
            continue
        pool._cache[number] = job
        process = job._write_to
        if process is not None and process._is_alive():
            pool._busy_workers.add(process.inqW_fd)  # gets nothing else to do meanwhile
        elif not job._worker_lost:
            job._worker_lost = time.monotonic(), getattr(process, "exitcode", None)  # the pool could not see it end


def _hand_over(pool: Any, until: float) -> None:
    """Writes to its end what a process of a prefork pool has been given in part."""
    for job in tuple(pool._cache.values()):
        receiver, writer = getattr(job, "_write_to", None), getattr(job, "_writer", lambda: None)()
        if receiver is None or writer is None or writer not in pool._active_writers:
            continue
        room = select.poll()
        room.register(receiver.inq._writer, select.POLLOUT)
        while mono_s() < until and receiver._is_alive():
            if room.poll(10):
                try:
                    next(writer)
                except (StopIteration, OSError):
                    break


def _about_to_begin(pool: Any) -> bool:
    """Whether an idle process of a prefork pool has been given a message and has not said yet that it begins."""
    given = [job for job in tuple(pool._cache.values()) if getattr(job, "_write_to", None) is not None]
    busy = {id(job._write_to) for job in given if job._accepted}
    return any(id(job._write_to) not in busy and job._write_to._is_alive() for job in given if not job._accepted)


def _hear(pool: Any, hub: Any, wait_s: float = 0.0) -> None:
    """Reads what the processes of a prefork pool have said so far, above all that they have begun a body."""
    if hub is None:
        time.sleep(wait_s)  # a thread of the pool reads
        return
    waiting = select.poll()
    for process in tuple(pool._pool):
        # Celery keeps the numbers of pipes that are closed, of processes that died: they may be another file's now.
        if process._is_alive() and pool._fileno_to_outq.get(process.outqR_fd) is process:
            waiting.register(process.outqR_fd, select.POLLIN)
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
