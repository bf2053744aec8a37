"""A stock Celery app on streamtask: one changed setting, and a shard key where the order matters.

The log (``SHOP_LOG``, else ``shop.log``) stands for what the tasks do: one line when a body starts, one when it ends.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from celery import Celery
from celery.signals import worker_ready

import streamtask.celery  # noqa: F401  gives tasks the option shard_key

LOG = os.environ.get("SHOP_LOG", "shop.log")

app = Celery("shop", broker=os.environ.get("SHOP_BROKER_URL", "streamtask://localhost:6379/0"))
app.conf.update(
    task_ignore_result=True,
    # Celery's own settings for tasks that must survive their worker. Keyed tasks have them anyway.
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    # What falls due later than in a second waits in the broker (default: a minute).
    broker_transport_options={"eta_hold": 1},
)


def write(line: str) -> None:
    """One system call per line, so that the lines of several processes don't mix."""
    fd = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(fd, f"{line}\n".encode())
    finally:
        os.close(fd)


# The events of one user run in the order in which they were sent, one at a time, on whatever worker.
@app.task(shard_key="user_id")
def handle_event(user_id: int, number: int) -> None:
    write(f"start event {user_id} {number}")
    time.sleep(0.02)
    write(f"end event {user_id} {number}")


# Whoever is free takes it.
@app.task
def build_report(number: int) -> None:
    write(f"start report 0 {number}")
    time.sleep(0.05)
    write(f"end report 0 {number}")


@app.task
def remind(user_id: int, due: float) -> None:
    write(f"start reminder {user_id} {time.time() - due:.3f}")
    write(f"end reminder {user_id} 1")


@worker_ready.connect
def say_ready(sender: Any, **kwargs: Any) -> None:
    write(f"ready {sender.hostname or socket.gethostname()}")
