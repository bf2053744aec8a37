"""What a producer remembers of the queues that it sends to does not grow with their number."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from streamtask import StreamTask
from streamtask.queue import producer
from tests.transport.kit import Kit

MOST = 10


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(producer, "MOST_TARGETS", MOST)


def remembered(one):
    return len(one._targets) + len(one._older)


@pytest.mark.parametrize("way", ["sync", "async", "many", "delayed"])
def test_of_an_app(redis_server, way):
    app = StreamTask("t", broker=redis_server.url, shards=1)

    async def later(task):
        await task.adelay(1)

    ways = {
        "sync": lambda task: task.delay(1),
        "async": lambda task: asyncio.run(later(task)),
        "many": lambda task: task.send_many([{"n": 1}]),
        "delayed": lambda task: task.apply_async((1,), countdown=60),
    }

    def task_of(name):
        def body(n):
            pass

        return app.task(name=name, queue=name)(body)

    tasks = [task_of(f"q{n}") for n in range(5 * MOST)]
    busy = tasks[0]
    ways[way](busy)
    (kept,) = app.sender.producer._targets.values()
    for task in tasks[1:]:
        ways[way](task)
        ways[way](busy)
        assert remembered(app.sender.producer) <= 2 * MOST
    assert kept in app.sender.producer._targets.values(), "what is in use keeps its ids"
    for task in tasks:
        ways[way](task)
    client = redis_server.client()
    streams = sum(map(client.xlen, client.scan_iter("*:stream", count=1000)))
    delayed = sum(map(client.zcard, client.scan_iter("*:delayed", count=1000)))
    assert streams + delayed == 5 * MOST * 2 + 5 * MOST - 1
    app.close()


def test_of_the_transport(redis_server):
    kit = Kit(redis_server)
    connection = kit.connect()
    sending = connection.Producer()
    one = connection.transport.session.producer
    for n in range(5 * MOST):
        sending.publish("x", routing_key=f"reply{n}")
        assert remembered(one) <= 2 * MOST
    with sending.batch():
        for n, key in itertools.product(range(2), range(5 * MOST)):
            sending.publish(n, routing_key=f"reply{key}")
    assert remembered(one) <= 2 * MOST
    client = redis_server.client()
    assert sum(map(client.xlen, client.scan_iter(f"{kit.namespace}*:stream", count=1000))) == 3 * 5 * MOST
    kit.close()
