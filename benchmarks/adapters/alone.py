"""Python by itself, without Redis and messages: the same bodies in a thread pool, in threads that do nothing else, in asyncio.

What sits between a queue and its bodies can't be faster than this for long, or only by doing without what these do.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from common import ASYNC_BODIES, BODIES, Adapter, arguments, main

Seconds = dict[str, float]
GATHERED = 1000


def pool(task: str, n: int, width: int, ms: float = 0.0) -> Seconds:
    """``ThreadPoolExecutor.submit`` of all, then the wait for all."""
    body, calls = BODIES[task], arguments(task, 0, n, ms)
    with ThreadPoolExecutor(width) as executor:
        began = time.perf_counter()
        for future in [executor.submit(body, *args) for args in calls]:
            future.result()
        return {"n": n, "seconds": time.perf_counter() - began}


def threads(task: str, n: int, width: int, ms: float = 0.0) -> Seconds:
    """So many threads, each of which runs one body after the other."""
    body, calls = BODIES[task], iter(arguments(task, 0, n, ms))

    def run() -> None:
        for args in calls:
            body(*args)

    running = [threading.Thread(target=run) for _ in range(width)]
    began = time.perf_counter()
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return {"n": n, "seconds": time.perf_counter() - began}


async def gather(task: str, n: int, width: int, ms: float = 0.0) -> Seconds:
    """``asyncio.gather`` of a thousand at a time."""
    body, calls = ASYNC_BODIES[task], arguments(task, 0, n, ms)
    began = time.perf_counter()
    for start in range(0, n, GATHERED):
        await asyncio.gather(*(body(*args) for args in calls[start : start + GATHERED]))
    return {"n": n, "seconds": time.perf_counter() - began}


async def tasks(task: str, n: int, width: int, ms: float = 0.0) -> Seconds:
    """So many asyncio tasks, each of which awaits one body after the other."""
    body: Callable[..., Awaitable[Any]] = ASYNC_BODIES[task]
    calls = iter(arguments(task, 0, n, ms))

    async def run() -> None:
        for args in calls:
            await body(*args)

    began = time.perf_counter()
    await asyncio.gather(*(run() for _ in range(width)))
    return {"n": n, "seconds": time.perf_counter() - began}


if __name__ == "__main__":
    main(
        Adapter(
            packages=(),
            settings={"all": "the bodies alone: nothing is queued, kept or acknowledged"},
            extra={"pool": pool, "threads": threads, "gather": gather, "tasks": tasks},
        )
    )
