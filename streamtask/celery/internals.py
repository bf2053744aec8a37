"""What the plugin knows of the inside of Celery and billiard, which say it in no public way: each fact stands here once. All
were seen in Celery 5.3 to 5.7, with billiard 4.3 (``tests/celery/test_older_celery.py`` looks)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from celery._state import _get_active_apps, get_current_worker_task
from celery.concurrency.prefork import TaskPool as PreforkPool

# Apps


def active_apps() -> list[Any]:
    """All apps of this process."""
    return list(_get_active_apps())


def running_task() -> Any:
    """The task whose body runs in this thread, in a worker; None elsewhere."""
    return get_current_worker_task()


def known_task(app: Any, name: str) -> Any:
    """A task of an app; None where the app does not know it (yet). Makes nothing."""
    return app._tasks.get(name)


def has_unmade_tasks(app: Any) -> bool:
    """Whether tasks of a module are still to be made, as Celery does at their first use."""
    return bool(app._pending) and bool(app.autofinalize)


# Requests


def replace_task(request: Any, task: Any) -> None:
    """From now on a request asks this task what becomes of it."""
    request._task = task


def was_ended(request: Any) -> bool:
    """Whether Celery itself has ended the body of a request, because the connection was lost or somebody revoked it."""
    return bool(request._already_cancelled or request._already_revoked)


# Prefork pools: those of billiard, in Celery's event loop


def processes_of(pool: Any) -> Any:
    """The billiard pool of a prefork pool that was started; None of any other."""
    return pool._pool if isinstance(pool, PreforkPool) else None


def is_heard_by_loop(pool: Any) -> bool:
    """Whether the event loop has begun to hear the pool. Before that, its processes have been given nothing."""
    return "handle_event" in vars(pool._result_handler)


def processes(pool: Any) -> tuple[Any, ...]:
    return tuple(pool._pool)


def is_alive(process: Any) -> bool:
    return bool(process._is_alive())


def answers_by(pool: Any, process: Any) -> int | None:
    """The descriptor of the pipe that a process speaks by. Celery keeps the numbers of pipes that are closed, of processes that
    died: they may be another file's now, and None is answered."""
    fd: int = process.outqR_fd
    return fd if process._is_alive() and pool._fileno_to_outq.get(fd) is process else None


def jobs(pool: Any) -> Iterable[tuple[int, Any]]:
    """What the pool was given and has not ended, by its numbers."""
    return tuple(pool._cache.items())


def has_begun(job: Any) -> bool:
    return bool(job._accepted)


def process_of(job: Any) -> Any:
    """The process that a job was written to, or is just being written to; None where there is none yet."""
    return getattr(job, "_write_to", None)


def unwritten(pool: Any, job: Any) -> Iterator[Any] | None:
    """Writes the rest of a job to its process, step by step; None where nothing is left."""
    writer: Iterator[Any] | None = getattr(job, "_writer", lambda: None)()
    return writer if process_of(job) is not None and writer in pool._active_writers else None


def pipe_to(process: Any) -> Any:
    """What a process is given its jobs by."""
    return process.inq._writer


def put_back(pool: Any, number: int, job: Any) -> None:
    """The pool has forgotten a job that runs: it hears of its end again, or of that of its process."""
    pool._cache[number] = job
    process = job._write_to
    if process is not None and process._is_alive():
        pool._busy_workers.add(process.inqW_fd)  # gets nothing else to do meanwhile
    elif not job._worker_lost:
        job._worker_lost = time.monotonic(), getattr(process, "exitcode", None)  # the pool could not see it end
