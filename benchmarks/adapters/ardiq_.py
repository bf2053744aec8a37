"""ArdiQ, whose core is written in Rust."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ardiq import Ardiq
from common import ASYNC_BODIES, CONCURRENCY, URL, Adapter, Calls, main, tool

app = Ardiq(redis_url=URL, queue_name="bench", concurrency=CONCURRENCY or 500, prefetch=1000)
TASKS = {name: app.task(name=name)(body) for name, body in ASYNC_BODIES.items()}


def async_bulk_sender(task: str) -> Callable[[Calls], Awaitable[object]]:
    prepare = TASKS[task].prepare
    return lambda calls: app.enqueue_many([prepare(*args) for args in calls])


def worker(processes: int, concurrency: int) -> list[list[str]]:
    return [[tool("ardiq"), "run", "ardiq_:app", "--quiet", "--workers", str(processes)]]


if __name__ == "__main__":
    main(
        Adapter(
            packages=("ardiq", "msgpack"),
            settings={
                "concurrency": "500, 16 for the tasks that sleep",
                "prefetch": "1000",
                "bulk": "Ardiq.enqueue_many",
            },
            worker=worker,
            async_sender=lambda task: TASKS[task].enqueue,
            async_bulk_sender=async_bulk_sender,
        )
    )
