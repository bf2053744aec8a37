"""Celery as it comes, on kombu's redis transport, on ours, or on kombu's memory transport: all that differs is the broker's
URL. Memory is one process's own: there the worker sends itself what it is to run, before it starts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

from celery import Celery
from common import BODIES, FOLDER, OPTIONS, URL, Adapter, Calls, main, tool

OURS = OPTIONS["broker"] == "streamtask"
MEMORY = OPTIONS["broker"] == "memory"
QUEUED = os.path.join(FOLDER, "queued")
KEYED = bool(OPTIONS.get("keyed"))

if OURS:
    # The checkout is not installed here, so that kombu can't find it by itself.
    import streamtask.transport
if KEYED:
    import streamtask.celery  # noqa: F401

BROKER = "memory://" if MEMORY else URL.replace("redis://", "streamtask://", 1) if OURS else URL
app = Celery("bench", broker=BROKER)
app.conf.update(
    task_ignore_result=True,
    task_acks_late=bool(OPTIONS.get("late")),
    broker_connection_retry_on_startup=True,
)
TASKS = {
    name: app.task(name=name, **({"shard_key": "user_id"} if KEYED else {}))(body) for name, body in BODIES.items()
}


def worker(processes: int, concurrency: int) -> list[list[str]]:
    argv = ["worker", "--loglevel", "ERROR", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    argv += ["--pool", "prefork", "-c", str(processes)]
    if MEMORY:
        return [[sys.executable, os.path.abspath(__file__), "here", *argv]]
    return [[tool("celery"), "-A", "celery_stock", *argv]]


def write_down(task: str) -> Callable[[Calls], object]:
    """For the worker that sends them itself."""

    def write(calls: Calls) -> None:
        with open(QUEUED, "a") as file:
            file.writelines(json.dumps([task, args]) + "\n" for args in calls)

    return write


def work_here(argv: list[str]) -> None:
    with open(QUEUED) as file:
        calls = [json.loads(line) for line in file]
    os.unlink(QUEUED)
    for task, args in calls:
        TASKS[task].delay(*args)
    app.worker_main(argv)


if __name__ == "__main__" and sys.argv[1] == "here":
    work_here(sys.argv[2:])
elif __name__ == "__main__":
    main(
        Adapter(
            packages=("celery", "kombu", "redis", "hiredis", *(("msgpack",) if OURS else ())),
            settings={
                "all": "Celery's and the transport's defaults; so worker_prefetch_multiplier is 4",
                "worker": "prefork -c 1 or 4; no gossip, mingle, heartbeat",
                "task_ignore_result": "no result is stored",
                "task_acks_late": "off, the default, or on where the line says so",
            }
            | ({"keyed": "shard_key='user_id', of 1,000 users; 8 shards; always acknowledged late"} if OURS else {}),
            worker=worker,
            sender=None if MEMORY else lambda task: TASKS[task].delay,
            bulk_sender=write_down if MEMORY else None,
        )
    )
