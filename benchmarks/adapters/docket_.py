"""Docket."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from common import ASYNC_BODIES, URL, Adapter, Calls, main, tool
from docket import Docket

TASKS = ASYNC_BODIES
tasks = list(TASKS.values())
docket: Docket


@contextlib.asynccontextmanager
async def session() -> AsyncIterator[None]:
    global docket
    async with Docket(name="bench", url=URL) as docket:
        for body in tasks:
            docket.register(body)
        yield


def async_sender(task: str) -> Callable[..., Awaitable[object]]:
    add, body = docket.add, TASKS[task]
    return lambda *args: add(body)(*args)


def async_bulk_sender(task: str) -> Callable[[Calls], Awaitable[object]]:
    call, body = docket.call, TASKS[task]
    return lambda calls: docket.add_many([call(body)(*args) for args in calls])


def worker(processes: int, concurrency: int) -> list[list[str]]:
    argv = [tool("docket"), "worker", "--docket", "bench", "--url", URL, "--tasks", "docket_:tasks"]
    argv += ["--logging-level", "ERROR", "--concurrency", str(concurrency or 50)]
    return [[*argv, "--name", f"worker-{number}"] for number in range(processes)]


if __name__ == "__main__":
    main(
        Adapter(
            packages=("pydocket", "redis", "hiredis"),
            settings={
                "worker": "--concurrency 50 (100 want more connections than its pool has), 16 for the tasks that sleep; "
                "a worker for each process",
                "bulk": "Docket.add_many",
            },
            worker=worker,
            session=session,
            async_sender=async_sender,
            async_bulk_sender=async_bulk_sender,
        )
    )
