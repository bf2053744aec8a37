"""SAQ on Redis."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from common import ASYNC_BODIES, CONCURRENCY, URL, Adapter, main, tool
from saq import Queue

queue = Queue.from_url(URL, name="bench")
NAMES = {
    "noop": ("user_id", "payload"),
    "sleep": ("user_id", "payload", "ms"),
    "stamp": ("user_id", "payload", "number"),
    "mark": ("user_id", "payload", "number", "ms"),
}


def with_context(body: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    async def run(ctx: dict[str, Any], **arguments: Any) -> None:
        await body(**arguments)

    return run


settings = {
    "queue": queue,
    "functions": [(name, with_context(body)) for name, body in ASYNC_BODIES.items()],
    "concurrency": CONCURRENCY or 20,
}


@contextlib.asynccontextmanager
async def session() -> AsyncIterator[None]:
    await queue.connect()
    yield


def async_sender(task: str) -> Callable[..., Awaitable[object]]:
    enqueue, names = queue.enqueue, NAMES[task]
    return lambda *args: enqueue(task, ttl=-1, **dict(zip(names, args, strict=True)))


def worker(processes: int, concurrency: int) -> list[list[str]]:
    return [[tool("saq"), "saq_.settings", "--workers", str(processes)]]


if __name__ == "__main__":
    main(
        Adapter(
            packages=("saq", "redis", "hiredis"),
            settings={
                "concurrency": "20 (100 is slower), 16 for the tasks that sleep",
                "ttl": "-1: no result is stored",
            },
            worker=worker,
            session=session,
            async_sender=async_sender,
        )
    )
