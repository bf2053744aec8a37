"""What is remembered of a queue's name does not stay for ever: replies go to a new queue for each process that asks."""

from __future__ import annotations

from typing import Any

import pytest
from kombu import Exchange, Queue

from tests.transport.kit import Inbox, Kit, publish

MOST = 20
NAMES = [f"reply{i}" for i in range(10 * MOST)]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamtask.transport.vhost.MOST_UNUSED", MOST)


def remembered(channel: Any) -> dict[str, int]:
    """How many names each of these knows."""
    session = channel.session
    known = {
        "queues": session.vhost.queues, "touched": session.vhost.touched, "fanout": session.vhost.fanout_queues,
        "consumed": session.consumed, "listened": session.listened,
        "auto delete": channel._auto_delete, "callbacks": channel._receivers,
    }  # fmt: skip
    return {what: len(names) for what, names in known.items() if names}


def test_of_whom_answers(kit: Kit) -> None:
    """And what it consumes itself, it still does."""
    channel = kit.channel()
    kit.queue(channel)
    inbox = Inbox(channel, "q")
    for name in NAMES:
        publish(channel, 1, to=name)
    sizes = remembered(channel)
    assert sizes.pop("queues") <= MOST + 1
    assert sizes == {"consumed": 1, "callbacks": 1}
    publish(channel, 1)
    inbox.take()[0].ack()
    assert channel._size(NAMES[0]) == 1


@pytest.mark.parametrize("no_ack", [False, True])
def test_of_whom_asks(kit: Kit, no_ack: bool) -> None:
    channel = kit.channel()
    for name in NAMES:
        Queue(name, expires=60, auto_delete=True)(channel).declare()
        publish(channel, 1, to=name)
        inbox = Inbox(channel, name, no_ack=no_ack)
        (message,) = inbox.take()
        if not no_ack:
            message.ack()
        inbox.cancel()
    for touched in channel.session.vhost.touched.values():
        touched.over_at = 0.0  # as after that minute
    for name in NAMES:
        publish(channel, 1, to=name + "x")
    sizes = remembered(channel)
    assert sizes.pop("queues") <= MOST
    assert sizes.pop("touched", 0) <= MOST
    assert sizes == {}


def test_of_who_listens(kit: Kit) -> None:
    exchange = Exchange("events", type="fanout")
    for name in NAMES[:MOST]:
        channel = kit.channel()
        queue = Queue(name, exchange, auto_delete=True)(channel)
        queue.declare()
        Inbox(channel, queue, no_ack=True).drain(0)
        channel.close()
    assert remembered(channel) == {}


def test_a_number_of_shards_is_remembered(kit: Kit) -> None:
    """It is recorded with the first keyed message."""
    channel = kit.channel()
    kit.queue(channel, queue_arguments={"x-shards": 3})
    for name in NAMES:
        publish(channel, 1, to=name)
    publish(channel, 1, headers={"shard_key": "u1"})
    assert channel.session.vhost.queue("q").shape().shards == 3
