"""The yardstick: redis-py with hiredis, and msgpack. No framework, and none of what a framework does.

Options: ``batch`` is how many entries it fetches, runs and acknowledges at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import msgpack
import redis
import redis.asyncio
from common import BODIES, OPTIONS, URL, Adapter, Calls, main

STREAM, GROUP, FIELD = "bare:stream", "bare", "m"
PIPELINE = 250
FETCH = 200

port = urlsplit(URL).port or 6379
client = redis.Redis(port=port)  # with redis-py's defaults, as whoever writes such a loop has them
async_client: Any = redis.asyncio.Redis(port=port)


def envelope(task: str, args: tuple[Any, ...]) -> bytes:
    """What streamtask sends for this call, to the byte but for the random id; the harness checks that."""
    packed: bytes = msgpack.packb((task, str(args[0]).encode(), os.urandom(16), args, {}, None))
    return packed


def prepare(task: str, calls: Calls) -> Calls:
    return [(envelope(task, args),) for args in calls]


def sender(task: str) -> Callable[..., object]:
    xadd = client.xadd

    def send(body: bytes) -> None:
        xadd(STREAM, {FIELD: body})

    return send


def bulk_sender(task: str) -> Callable[[Calls], object]:
    def send(calls: Calls) -> None:
        for start in range(0, len(calls), PIPELINE):
            pipe = client.pipeline(transaction=False)
            for (body,) in calls[start : start + PIPELINE]:
                pipe.xadd(STREAM, {FIELD: body})
            pipe.execute()

    return send


def async_sender(task: str) -> Callable[..., Any]:
    xadd = async_client.xadd

    async def send(body: bytes) -> None:
        await xadd(STREAM, {FIELD: body})

    return send


def open_group() -> None:
    try:
        client.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
    except redis.ResponseError as error:
        if "BUSYGROUP" not in str(error):
            raise


def consume() -> None:
    """Reads, decodes, calls and acknowledges, until it is ended."""
    open_group()
    fetch = int(OPTIONS.get("batch", FETCH))
    consumer = str(os.getpid())
    unpack, tasks = msgpack.unpackb, BODIES
    while True:
        reply: Any = client.xreadgroup(GROUP, consumer, {STREAM: ">"}, count=fetch, block=1000)
        if not reply:
            continue
        # RESP3 answers with a map of lists of lists, RESP2 with a list of pairs.
        entries = reply[STREAM.encode()][0] if isinstance(reply, dict) else reply[0][1]
        done = []
        for entry_id, fields in entries:
            task, _, _, args, kwargs, _ = unpack(fields[b"m"])
            tasks[task](*args, **kwargs)
            done.append(entry_id)
        client.xack(STREAM, GROUP, *done)


if __name__ == "__main__":
    main(
        Adapter(
            packages=("redis", "hiredis", "msgpack"),
            settings={
                "producer": "XADD of envelopes that are made beforehand; in bulk: pipelines of 250, no transaction",
                "worker": "XREADGROUP COUNT 200 (or 1) BLOCK, decode, look up, call, one XACK for all",
                "asyncio": "one redis.asyncio.Redis for all tasks, whose pool gives each call a connection",
            },
            consume=consume,
            sender=sender,
            bulk_sender=bulk_sender,
            async_sender=async_sender,
            prepare=prepare,
        )
    )
