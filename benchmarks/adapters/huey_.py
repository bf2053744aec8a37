"""Huey on Redis."""

from __future__ import annotations

from common import BODIES, URL, Adapter, main, tool
from huey import RedisHuey

huey = RedisHuey("bench", url=URL, results=False)
TASKS = {name: huey.task(name=name)(body) for name, body in BODIES.items()}


def worker(processes: int, concurrency: int) -> list[list[str]]:
    kind = ["-k", "thread", "-w", str(concurrency)] if concurrency else ["-k", "process", "-w", str(processes)]
    return [[tool("huey_consumer"), "huey_.huey", *kind, "--no-periodic", "--quiet"]]


if __name__ == "__main__":
    main(
        Adapter(
            packages=("huey", "redis", "hiredis"),
            settings={
                "worker": "-k process -w PROCESSES; -k thread -w 16 for the tasks that sleep; no periodic tasks",
                "results": "off",
            },
            worker=worker,
            sender=lambda task: TASKS[task],
        )
    )
