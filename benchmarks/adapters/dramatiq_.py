"""Dramatiq on Redis."""

from __future__ import annotations

import os

import dramatiq
from common import BODIES, URL, Adapter, main, tool
from dramatiq.brokers.redis import RedisBroker

broker = RedisBroker(url=URL)
dramatiq.set_broker(broker)
ACTORS = {name: dramatiq.actor(body, actor_name=name) for name, body in BODIES.items()}


def worker(processes: int, concurrency: int) -> list[list[str]]:
    os.environ["dramatiq_queue_prefetch"] = "1000"  # noqa: SIM112 - that is its name
    return [[tool("dramatiq"), "dramatiq_", "--processes", str(processes), "--threads", str(concurrency or 1)]]


if __name__ == "__main__":
    main(
        Adapter(
            packages=("dramatiq", "redis", "hiredis"),
            settings={
                "worker": "--processes PROCESSES --threads 1 (its best for no-op tasks), 16 for the tasks that sleep",
                "dramatiq_queue_prefetch": "1000, which is much faster with one thread than twice the threads",
                "middleware": "the defaults; no results",
            },
            worker=worker,
            sender=lambda task: ACTORS[task].send,
        )
    )
