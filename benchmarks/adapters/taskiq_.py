"""Taskiq on Redis Streams."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from common import ASYNC_BODIES, URL, Adapter, main, tool
from taskiq_redis import RedisStreamBroker

broker = RedisStreamBroker(URL, consumer_id="0")
TASKS = {name: broker.register_task(body, task_name=name) for name, body in ASYNC_BODIES.items()}


@contextlib.asynccontextmanager
async def session() -> AsyncIterator[None]:
    await broker.startup()
    yield


def worker(processes: int, concurrency: int) -> list[list[str]]:
    argv = [tool("taskiq"), "worker", "taskiq_:broker", "--workers", str(processes), "--log-level", "ERROR"]
    return [[*argv, "--max-async-tasks", str(concurrency or 100)]]


if __name__ == "__main__":
    main(
        Adapter(
            packages=("taskiq", "taskiq-redis", "redis", "hiredis"),
            settings={
                "broker": "RedisStreamBroker, which reads 100 at a time; no result backend",
                "worker": "--workers PROCESSES --max-async-tasks 100, 16 for the tasks that sleep",
                "consumer_id": "0: the group begins with what is queued already",
            },
            worker=worker,
            session=session,
            async_sender=lambda task: TASKS[task].kiq,
        )
    )
