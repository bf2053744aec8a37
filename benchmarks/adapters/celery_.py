"""Celery on Redis."""

from __future__ import annotations

from celery import Celery
from common import BODIES, URL, Adapter, main, tool

app = Celery("bench", broker=URL)
app.conf.update(
    task_ignore_result=True,
    worker_prefetch_multiplier=100,
    worker_send_task_events=False,
    broker_connection_retry_on_startup=True,
)
TASKS = {name: app.task(name=name)(body) for name, body in BODIES.items()}


def worker(processes: int, concurrency: int) -> list[list[str]]:
    argv = [tool("celery"), "-A", "celery_", "worker", "--loglevel", "ERROR"]
    argv += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    pool = ["--pool", "threads", "-c", str(concurrency)] if concurrency else ["--pool", "prefork", "-c", str(processes)]
    return [[*argv, *pool]]


if __name__ == "__main__":
    main(
        Adapter(
            packages=("celery", "kombu", "redis", "hiredis"),
            settings={
                "worker": "prefork -c PROCESSES; threads -c 16 for the tasks that sleep; no gossip, mingle, heartbeat",
                "worker_prefetch_multiplier": "100: read far ahead",
                "task_ignore_result": "no result is stored",
                "acks_late": "off, the default: acknowledged before the body runs, which is its fastest",
            },
            worker=worker,
            sender=lambda task: TASKS[task].delay,
        )
    )
