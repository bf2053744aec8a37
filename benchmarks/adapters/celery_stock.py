"""Celery as it comes, on kombu's redis transport or on ours: all that differs is the scheme of the broker's URL."""

from __future__ import annotations

from celery import Celery
from common import BODIES, OPTIONS, URL, Adapter, main, tool

OURS = OPTIONS["broker"] == "streamtask"
KEYED = bool(OPTIONS.get("keyed"))

if OURS:
    # The checkout is not installed here, so that kombu can't find it by itself.
    import streamtask.transport
if KEYED:
    import streamtask.celery  # noqa: F401

app = Celery("bench", broker=URL.replace("redis://", "streamtask://", 1) if OURS else URL)
app.conf.update(
    task_ignore_result=True,
    task_acks_late=bool(OPTIONS.get("late")),
    broker_connection_retry_on_startup=True,
)
TASKS = {
    name: app.task(name=name, **({"shard_key": "user_id"} if KEYED else {}))(body) for name, body in BODIES.items()
}


def worker(processes: int, concurrency: int) -> list[list[str]]:
    argv = [tool("celery"), "-A", "celery_stock", "worker", "--loglevel", "ERROR"]
    argv += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    return [[*argv, "--pool", "prefork", "-c", str(processes)]]


if __name__ == "__main__":
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
            sender=lambda task: TASKS[task].delay,
        )
    )
