"""arq."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from arq import create_pool
from arq.connections import ArqRedis, RedisSettings
from arq.worker import func
from common import ASYNC_BODIES, CONCURRENCY, URL, Adapter, main, tool

SETTINGS = RedisSettings.from_dsn(URL)
pool: ArqRedis


def with_context(body: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    async def run(ctx: dict[str, Any], *args: Any) -> None:
        await body(*args)

    return run


class WorkerSettings:
    """What ``arq arq_.WorkerSettings`` reads."""

    functions = [func(with_context(body), name=name) for name, body in ASYNC_BODIES.items()]  # noqa: RUF012
    redis_settings = SETTINGS
    max_jobs = CONCURRENCY or 100
    poll_delay = 0.02
    queue_read_limit = 1000
    keep_result = 0


@contextlib.asynccontextmanager
async def session() -> AsyncIterator[None]:
    global pool
    pool = await create_pool(SETTINGS)
    yield


def async_sender(task: str) -> Callable[..., Awaitable[object]]:
    enqueue = pool.enqueue_job
    return lambda *args: enqueue(task, *args)


def worker(processes: int, concurrency: int) -> list[list[str]]:
    return [[tool("arq"), "arq_.WorkerSettings"]] * processes


if __name__ == "__main__":
    main(
        Adapter(
            packages=("arq", "redis", "hiredis"),
            settings={
                "max_jobs": "100, 16 for the tasks that sleep; a worker for each process",
                "poll_delay": "0.02 s instead of 0.5: it polls",
                "queue_read_limit": "1000",
                "keep_result": "0: no result is stored",
            },
            worker=worker,
            session=session,
            async_sender=async_sender,
        )
    )
