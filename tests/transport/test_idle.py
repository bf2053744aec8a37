"""A Redis that closes idle connections, as its ``timeout`` says, and many a hosted one does: nobody takes it for an outage."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
from kombu import Exchange, Producer, Queue

from tests.fix_redis import RedisServer
from tests.helpers import wait_until
from tests.transport.kit import Inbox, Kit, publish, wait_until_closed


@pytest.fixture
def idle_kit(own_server_all: RedisServer, make_kit: Any, monkeypatch: pytest.MonkeyPatch) -> Kit:
    monkeypatch.setattr("streamtask.transport.poller.BLOCK_S", 0.5)
    own_server_all.config_set(timeout=1)
    kit: Kit = make_kit(own_server_all)
    return kit


def idle(kit: Kit) -> None:
    """Does nothing until Redis has closed all connections of this process but those that listen."""
    wait_until_closed(kit.client(), kit.server.port)


@pytest.mark.parametrize("count", [1, 3])
def test_who_consumes_goes_on(idle_kit: Kit, count: int) -> None:
    """Several connections, none of which was drained for long."""
    idle_kit.queue(idle_kit.channel())
    inboxes = [Inbox(idle_kit.channel(), "q", prefetch=1) for _ in range(count)]
    for inbox in inboxes:
        assert not inbox.drain(0.05)
    for _ in range(2):
        idle(idle_kit)
        for inbox in inboxes:
            publish(idle_kit.channel(), 1)
            inbox.take()[0].ack()
            assert not inbox.drain(0.05)


def test_who_gets_goes_on(idle_kit: Kit) -> None:
    queue = idle_kit.connect().SimpleQueue("q")
    for i in range(3):
        queue.put(i)
        message = queue.get(timeout=10)
        assert message.payload == i
        message.ack()
        with pytest.raises(queue.Empty):
            queue.get(timeout=0.1)
        idle(idle_kit)
    queue.close()


def test_who_publishes_goes_on(idle_kit: Kit) -> None:
    channel = idle_kit.channel()
    idle_kit.queue(channel)
    for i in range(3):
        publish(channel, i)
        publish(channel, i, headers={"shard_key": "u1"})
        idle(idle_kit)
    assert ready(idle_kit) == 6


def ready(kit: Kit) -> int:
    size: int = kit.channel()._size("q")
    return size


def test_who_listens_goes_on(idle_kit: Kit) -> None:
    exchange = Exchange("events", type="fanout")
    channel = idle_kit.channel()
    events = Queue("events", exchange)(channel)
    events.declare()
    inbox = Inbox(channel, events, no_ack=True)
    inbox.drain(0.05)
    idle_kit.queue(channel)
    mixed = Inbox(channel, "q")
    mixed.drain(0.05)
    for i in range(2):
        idle(idle_kit)
        Producer(idle_kit.channel(), exchange).publish(i)
        assert inbox.take()[0].payload == i
        publish(idle_kit.channel(), i)
        mixed.take()[0].ack()


@pytest.mark.parametrize("how", ["closed", "half open"])
def test_what_broke_while_nobody_looked_says_nothing_of_now(
    kit: Kit, make_kit: Any, proxy: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr("streamtask.transport.poller.BLOCK_S", 0.2)
    line = proxy(kit.server)
    far = make_kit(line, namespace=kit.namespace, socket_timeout=0.5, lease=10)
    kit.queue(kit.channel())
    inbox = Inbox(far.channel(), "q")
    assert not inbox.drain(0.05)
    if how == "half open":
        line.blackhole()
    time.sleep(2)  # on purpose: nobody drains for longer than a bell waits
    line.blackhole(False)
    line.cut()
    publish(kit.channel(), 1)
    inbox.take()[0].ack()


def test_a_shard_that_reads_no_further_wakes_nobody(kit: Kit) -> None:
    """As many of it wait here as may wait; nor does one that is to go, whose delayed message falls due."""
    channel = kit.channel()
    kit.queue(channel)
    inbox = Inbox(kit.channel(), "q", prefetch=3)
    session = inbox.channel.session
    session.ownership.settings = dataclasses.replace(session.ownership.settings, max_waiting=20)
    headers = {"shard_key": "u1"}
    publish(channel, *range(150), headers=headers)
    inbox.take()
    (shard,) = (shard for shard in session.consumed["q"].shards.values() if shard.backlog.handed)

    def commands() -> int:
        before = kit.client().info("stats")["total_commands_processed"]
        inbox.drain(1)
        return int(kit.client().info("stats")["total_commands_processed"] - before)

    wait_until(lambda: not (inbox.drain(0.1) or shard.reads_on()))
    assert commands() < 200
    shard.backlog.closing = True
    session.ownership.releasing.add(shard.backlog.number)
    shard.arrivals.next_due = time.monotonic()
    assert commands() < 200
