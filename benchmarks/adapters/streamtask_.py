"""streamtask, from the checkout."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from common import ASYNC_BODIES, BODIES, OPTIONS, PAYLOAD, URL, Adapter, Calls, arguments, main
from hiredis import pack_command
from recorder import recording

from streamtask import StreamTask

KEY = "user_id" if OPTIONS.pop("keyed", True) else None
bodies = ASYNC_BODIES if OPTIONS.pop("async", False) else BODIES
app = StreamTask("bench", broker=URL, **OPTIONS)
TASKS = {name: app.task(name=name, shard_key=KEY)(body) for name, body in bodies.items()}


def bulk_sender(task: str) -> Callable[[Calls], object]:
    send_many = TASKS[task].send_many
    return lambda calls: send_many([(args, {}) for args in calls])


def worker(processes: int, concurrency: int) -> list[list[str]]:
    argv = [sys.executable, "-m", "streamtask", "--log-level", "warning", "-A", "streamtask_:app", "worker"]
    return [[*argv, "-p", str(processes), "-c", str(concurrency or 1)]]


def shard_names() -> dict[str, Any]:
    """The keys that the harness looks at."""
    queue = app.queue("default")
    keys = [queue.shard_keys(shard) for shard in range(queue.shards)]
    return {"streams": [one.stream for one in keys], "dead": [one.dlq for one in keys]}


def save_calls(path: str, n: int) -> dict[str, int]:
    """Writes the very commands of N calls of ``delay`` to a file, for the program that sends them without streamtask."""
    with recording(urlsplit(URL).port or 6379) as (port, commands):
        other = StreamTask("bench", broker=f"redis://127.0.0.1:{port}/0", **OPTIONS)
        delay = other.task(name="noop", shard_key="user_id")(BODIES["noop"]).delay
        delay(0, "opens the shards")
        for args in arguments("noop", 0, n):
            delay(*args)
        other.close()
    packed = [pack_command(tuple(command)) for command in commands]
    calls = [one for one in packed if PAYLOAD.encode() in one]
    with open(path, "wb") as file:
        for one in calls:
            file.write(len(one).to_bytes(4, "big") + one)
    return {"n": len(calls)}


def dedupe(n: int) -> dict[str, int]:
    """Calls with a dedupe id each, a UUID."""
    task = TASKS["noop"]
    for args in arguments("noop", 0, n):
        task.apply_async(args, dedupe_id=str(uuid.uuid4()))
    return {"n": n}


if __name__ == "__main__":
    main(
        Adapter(
            packages=("redis", "hiredis", "msgpack"),
            settings={
                "all": "defaults: 8 shards, at-least-once, order kept by user_id, produce calls remembered",
                "worker": "streamtask worker -p PROCESSES; -c 1, and what the workload says",
            },
            worker=worker,
            sender=lambda task: TASKS[task].delay,
            bulk_sender=bulk_sender,
            async_sender=lambda task: TASKS[task].adelay,
            extra={"shard_names": shard_names, "save_calls": save_calls, "dedupe": dedupe},
        )
    )
