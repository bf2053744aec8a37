"""A message that was delivered before says so, in its headers and its delivery_info: by whatever way it comes again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from kombu import Connection, Message

from streamtask.coordination.orders import Release
from streamtask.redis.scripts import script
from streamtask.transport import hooks
from tests.helpers import wait_until
from tests.parts import sampled
from tests.transport.kit import Inbox, Kit, publish

FOLLOWERS = 40
"""More than a lane keeps bodies of."""


def flags(message: Message) -> tuple[Any, Any]:
    return message.headers.get("redelivered", False), message.delivery_info.get("redelivered", False)


def requeue(kit: Kit, connection: Connection, message: Message) -> None:
    message.requeue()


def recover(kit: Kit, connection: Connection, message: Message) -> None:
    message.channel.basic_recover(requeue=True)


def close_channel(kit: Kit, connection: Connection, message: Message) -> None:
    message.channel.close()


def release(kit: Kit, connection: Connection, message: Message) -> None:
    connection.release()


def collect(kit: Kit, connection: Connection, message: Message) -> None:
    connection.collect()


def lose_connection(kit: Kit, connection: Connection, message: Message) -> None:
    kit.client().client_kill_filter(_type="normal", skipme=True)
    with contextlib.suppress(*connection.connection_errors):
        connection.drain_events(timeout=1)
    connection.collect()


def lose_lease(kit: Kit, connection: Connection, message: Message) -> None:
    """And nobody else lives who could take what the process held."""
    client = kit.client()
    for key in kit.keys("{kombu.q.*:lease:*"):
        client.delete(key)
    with contextlib.suppress(*connection.connection_errors):
        message.ack()
        connection.drain_events(timeout=10)
    connection.collect()


WAYS = [requeue, recover, close_channel, release, collect, lose_connection, lose_lease]


@pytest.mark.parametrize("key", [None, "u1"], ids=["plain", "keyed"])
@pytest.mark.parametrize("way", sampled(WAYS, requeue, lose_connection), ids=lambda way: way.__name__)
def test_it_says_so(kit: Kit, way: Callable[[Kit, Connection, Message], None], key: str | None) -> None:
    """Both are set, and only of what was delivered."""
    channel = kit.channel()
    kit.queue(channel)
    headers = {} if key is None else {"shard_key": key}
    publish(channel, *range(FOLLOWERS), headers=headers)
    connection = kit.connect()
    inbox = Inbox(connection.channel(), "q", prefetch=2 if key else 1)
    (message,) = inbox.take()
    assert (message.payload, flags(message)) == (0, (False, False))
    way(kit, connection, message)
    inbox = inbox if way in (requeue, recover) else Inbox(kit.channel(), "q", prefetch=1)
    (again,) = inbox.take()
    assert (again.payload, flags(again)) == (0, (True, True))
    again.ack()
    (following,) = inbox.take()
    assert following.payload == 1
    wait_until(lambda: kit.pending() >= 1)


@pytest.mark.parametrize("way", [requeue, close_channel, release], ids=lambda way: way.__name__)
def test_it_says_so_to_who_does_not_acknowledge(kit_all: Kit, way: Callable[..., None]) -> None:
    channel = kit_all.channel()
    kit_all.queue(channel)
    publish(channel, 1, 2)
    connection = kit_all.connect()
    message = connection.channel().basic_get("q")
    way(kit_all, connection, message)
    taking = kit_all.channel()
    got = [taking.basic_get("q", no_ack=True) for _ in range(2)]
    assert [(one.payload, flags(one)) for one in got] == [(1, (True, True)), (2, (False, False))]


def test_it_says_so_though_the_reply_with_it_was_lost(kit: Kit, make_kit: Any, proxy: Any) -> None:
    """It was given back, and Redis has given it to another, who never heard of it, but found it pending."""
    line = proxy(kit.server)
    far = make_kit(line, namespace=kit.namespace)
    other = far.channel()
    kit.queue(kit.channel())
    assert other.basic_get("q") is None  # what it needs for its first fetch is done
    publish(kit.channel(), 1, 2)
    kit.channel().basic_get("q").requeue()
    line.cut_after_request(script("fetch").sha.encode())
    with contextlib.suppress(*other.connection.connection_errors):
        other.basic_get("q")
    assert line.cuts == 1
    again = other.basic_get("q")
    assert (again.payload, flags(again)) == (1, (True, True))


def test_a_shard_that_goes_leaves_no_start_mark(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was received and has not begun goes to the next owner: should that one vanish, it is no crash of this one's."""
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, 1, headers={"shard_key": "u1"})
    inbox = Inbox(kit.channel(), "q")
    inbox.take()[0].requeue()
    (message,) = inbox.take()
    session, tag = inbox.channel.session, message.delivery_tag
    shards = session.consumed["q"].shards
    (shard,) = (shard for shard in shards.values() if shard.backlog.handed)

    def mark() -> bytes:
        (note,) = kit.client().hvals(shard.keys.notes("workers"))
        return bytes(note.split()[3])

    assert inbox.channel.receive(tag)
    assert int(mark()) == shard.lease.token
    inbox.channel.received(tag)
    monkeypatch.setattr(hooks, "not_begun", [lambda tags: tags])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.ownership.keeper(), "orders", lambda: [Release(shard.backlog.number)])
        session.receive_orders()
    wait_until(lambda: inbox.drain(0.1) or shards.get(shard.shard) is not shard)
    assert mark() == b"0"
