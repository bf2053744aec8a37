"""streaQ."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from common import ASYNC_BODIES, CONCURRENCY, URL, Adapter, Calls, main, tool
from streaq import Worker

worker_app = Worker(redis_url=URL, queue_name="bench", concurrency=CONCURRENCY or 32)
TASKS = {name: worker_app.task(name=name, ttl=0, timeout=None)(body) for name, body in ASYNC_BODIES.items()}


@contextlib.asynccontextmanager
async def session() -> AsyncIterator[None]:
    async with worker_app:
        yield


def async_sender(task: str) -> Callable[..., Awaitable[object]]:
    enqueue = TASKS[task].enqueue

    async def send(*args: object) -> None:
        await enqueue(*args)

    return send


def async_bulk_sender(task: str) -> Callable[[Calls], Awaitable[object]]:
    enqueue = TASKS[task].enqueue
    return lambda calls: worker_app.enqueue_many([enqueue(*args) for args in calls])


def worker(processes: int, concurrency: int) -> list[list[str]]:
    return [[tool("streaq"), "run", "streaq_:worker_app", "--workers", str(processes)]]


if __name__ == "__main__":
    main(
        Adapter(
            packages=("streaq", "coredis"),
            settings={
                "concurrency": "32 (100 is slower), and as much prefetch; 16 for the tasks that sleep",
                "ttl": "0: no result is stored",
                "bulk": "Worker.enqueue_many",
            },
            worker=worker,
            session=session,
            async_sender=async_sender,
            async_bulk_sender=async_bulk_sender,
        )
    )
