"""An app of keyed tasks. What its bodies and its messages did is written to one list in Redis, as JSON."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import redis
from celery import Celery, signals

import streamtask.transport  # noqa: F401 - an installed streamtask is found without it

NOTES = "notes"
PORT = os.environ.get("WORK_PORT", "0")

app = Celery("work", broker=f"streamtask://127.0.0.1:{PORT}/0", backend=f"redis://127.0.0.1:{PORT}/1")
app.conf.update(
    json.loads(os.environ.get("WORK_CONF", "{}")),
    broker_transport_options={"lease": 1.0},
    broker_connection_retry_on_startup=True,
    result_extended=True,
)
notes = redis.Redis(port=int(PORT), db=2)


def note(kind: str, **more: Any) -> None:
    notes.rpush(NOTES, json.dumps({"kind": kind, "pid": os.getpid(), **more}))


@signals.before_task_publish.connect
def on_publish(sender: str, headers: dict[str, Any], body: Any, **_: Any) -> None:
    private = {name: value for name, value in headers.items() if name.startswith(("shard", "streamtask"))}
    note("published", name=sender, **private)


@app.task(bind=True, shard_key="k")
def keyed(self: Any, k: str, n: int = 0, ms: float = 20) -> str:
    note("start", k=k, n=n, headers=sorted(self.request.headers or {}))
    time.sleep(ms / 1000)
    note("end", k=k, n=n)
    return k


@app.task
def early(n: int, ms: float = 20) -> None:
    """Acknowledged before it runs, but for calls with a key."""
    note("start", n=n)
    time.sleep(ms / 1000)
    note("end", n=n)


@app.task
def dying(n: int) -> None:
    note("start", n=n)
    if notes.set(f"died-{n}", 1, nx=True):
        os.kill(os.getpid(), signal.SIGKILL)
    note("end", n=n)


@app.task(bind=True, shard_key="k", max_retries=3)
def retrying(self: Any, k: str, n: int = 0) -> None:
    note("start", k=k, n=n, retries=self.request.retries)
    if not self.request.retries:
        early.apply_async((100,), headers=self.request.headers)
        raise self.retry(countdown=0)
    note("end", k=k, n=n)


@app.task(bind=True, shard_key="k")
def failing(self: Any, k: str) -> None:
    raise ValueError("fails")


@app.task(bind=True, shard_key="k")
def of_task_id(self: Any, k: str) -> None:
    """An error callback of the old kind: it gets the id of the task that failed."""
    note("errback", k=k)


@app.task(bind=True, shard_key="k")
def publishing(self: Any, k: str, n: int) -> None:
    """Publishes with transport options of its own, so its process gets a session of its own."""
    note("start", k=k, n=n)
    with app.connection_for_write(transport_options={"lease": 1.5}) as connection:
        keyed.apply_async(("other", n), connection=connection)
    note("end", k=k, n=n)
