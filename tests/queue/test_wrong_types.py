"""A key of a wrong type: each way to send names it, also where the queue is only to be declared."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from streamtask import BulkSendError, StreamTask
from streamtask.errors import ReplyError
from streamtask.redis.keys import SHARED, app_queues
from tests.fix_redis import RedisServer

KEYS: dict[str, Callable[[StreamTask], str]] = {
    "queues": lambda app: app_queues("streamtask", "t"),
    "meta": lambda app: app.queue("default").keys.meta,
    "state": lambda app: app.queue("default").keys.shard(0, SHARED).state,
    "stream": lambda app: app.queue("default").keys.shard(0, SHARED).stream,
    "delayed": lambda app: app.queue("default").keys.shard(0, SHARED).delayed,
}


@pytest.mark.parametrize(
    "key, declared", [*((key, False) for key in KEYS), *((key, True) for key in KEYS if key not in ("queues", "meta"))]
)
def test_every_call_names_it(redis_server_all: RedisServer, key: str, declared: bool) -> None:
    app = StreamTask("t", broker=redis_server_all.url, shards=2)
    task = app.task(lambda n=0: None, name="t")
    if declared:
        app.queue("default").declare()
    name = KEYS[key](app)
    client = redis_server_all.client()
    client.delete(name)
    client.set(name, "x")
    calls: list[Callable[[], object]] = [
        task.delay,
        lambda: task.apply_async(countdown=9),
        lambda: task.apply_async(dedupe_id="x"),
        lambda: task.send_many([{"n": 1}, {"n": 2}]),
        lambda: asyncio.run(task.adelay()),
    ]
    said = []
    for call in calls:
        try:
            call()
            said.append("")
        except (ReplyError, BulkSendError) as exc:
            said.append(str(exc))
    # A call that has no use for the key is none the worse for it.
    met = {"delayed": said[1:2], "stream": [said[0], *said[2:]]}.get(key, said)
    assert all(f"{name} is a string, and has to be a " in text and "remove or rename it" in text for text in met), said
    app.close()
