"""Consuming: prefetch, acks, rejects, priorities, time to live, channels and connections that close."""

from __future__ import annotations

import datetime as dt
import decimal
import threading
import time
import uuid
from typing import Any

import msgpack
import pytest
from kombu import Queue
from kombu.exceptions import ContentDisallowed

from streamtask.errors import EncodeError
from tests.helpers import Starved, wait_until
from tests.transport.kit import Inbox, Kit, publish


def ready(kit: Kit, queue: str = "q") -> int:
    size: int = kit.channel()._size(queue)
    return size


# --- prefetch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 10])
def test_prefetch_is_never_exceeded(kit: Kit, count: int) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, *range(25))
    inbox = Inbox(kit.channel(), "q", prefetch=count)
    inbox.drain_all()
    assert inbox.bodies == list(range(count))
    assert ready(kit) == 25 - count
    inbox.messages[0].ack()
    inbox.drain_all()
    assert inbox.bodies == list(range(count + 1))


def test_unlimited_prefetch_takes_all(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, *range(250))
    assert Inbox(kit.channel(), "q", prefetch=0).drain_all() == list(range(250))


def test_prefetch_grows_and_shrinks(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, *range(10))
    inbox = Inbox(kit.channel(), "q", prefetch=2)
    inbox.drain_all()
    inbox.consumer.qos(prefetch_count=5)
    assert inbox.drain_all() == list(range(5))
    inbox.consumer.qos(prefetch_count=1)
    for message in inbox.messages[:4]:
        message.ack()
    assert not inbox.drain()
    inbox.messages[4].ack()
    assert inbox.drain_all() == list(range(6))


def test_channels_of_a_connection_have_each_their_prefetch(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel, "a")
    kit.queue(channel, "b")
    publish(channel, *range(10), to="a")
    publish(channel, *range(10), to="b")
    connection = kit.connect()
    one, two = Inbox(connection.channel(), "a", prefetch=2), Inbox(connection.channel(), "b", prefetch=5)
    one.drain_all()
    assert (one.bodies, two.bodies) == ([0, 1], [0, 1, 2, 3, 4])


def test_two_channels_of_a_connection_on_one_queue(kit: Kit) -> None:
    """Both are served; a full one does not keep the other from its messages."""
    channel = kit.channel()
    kit.queue(channel)
    connection = kit.connect()
    one, two = Inbox(connection.channel(), "q", prefetch=2), Inbox(connection.channel(), "q", prefetch=3)
    publish(channel, *range(10))
    one.drain_all()
    assert (len(one.messages), len(two.messages)) == (2, 3)
    assert sorted(one.bodies + two.bodies) == list(range(5))
    for message in two.messages:
        message.ack()
    one.drain_all()
    assert (len(one.messages), len(two.messages)) == (2, 6)


def test_two_consumers_on_one_channel(kit: Kit) -> None:
    """Several consumer tags for one queue on one channel: cancelling one leaves the other."""
    channel = kit.channel()
    kit.queue(channel)
    consuming = kit.channel()
    one, two = Inbox(consuming, "q"), Inbox(consuming, "q")
    publish(channel, 1)
    wait_until(lambda: one.drain(0.05) or one.messages or two.messages)
    one.cancel()
    publish(channel, 2)
    two.drain_all()
    assert sorted(one.bodies + two.bodies) == [1, 2]


@pytest.mark.parametrize("order", ["round_robin", "sorted"])
def test_queues_of_a_channel(kit: Kit, order: str) -> None:
    """In turn, so that a long queue starves no short one; or in the order of their names."""
    channel = kit.channel()
    names = ["a", "b", "c"]
    for name in names:
        kit.queue(channel, name)
        publish(channel, *[name] * 20, to=name)
    consuming = kit.connect(transport_options={"queue_order_strategy": order}).channel()
    inbox = Inbox(consuming, *names, prefetch=1)
    for _ in range(12):
        inbox.take()[0].ack()
    counts = [inbox.bodies.count(name) for name in names]
    assert counts == ([4, 4, 4] if order == "round_robin" else [12, 0, 0])


def test_queues_in_the_order_they_were_given(kit: Kit) -> None:
    """queue_order_strategy priority: the first named queue first."""
    channel = kit.channel()
    for name in ("a", "z"):
        kit.queue(channel, name)
        publish(channel, *[name] * 5, to=name)
    consuming = kit.connect(transport_options={"queue_order_strategy": "priority"}).channel()
    inbox = Inbox(consuming, "z", "a", prefetch=1)
    for _ in range(6):
        inbox.take()[0].ack()
    assert inbox.bodies == ["z"] * 5 + ["a"]


# --- ends ----------------------------------------------------------------------------------------------------------------


def test_acknowledged_messages_leave_nothing(kit_all: Kit) -> None:
    channel = kit_all.channel()
    kit_all.queue(channel)
    publish(channel, *range(20))
    publish(channel, *range(20), priority=6)
    publish(channel, *range(20), headers={"shard_key": "u1"})
    inbox = Inbox(kit_all.channel(), "q")
    for _ in range(60):
        inbox.take()[0].ack()
    client = kit_all.client()
    wait_until(lambda: sum(client.xlen(key) for key in kit_all.keys("{kombu.q.*:stream")) == 0)
    assert kit_all.pending() == 0
    assert ready(kit_all) == 0


def test_ack_multiple(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, *range(5))
    consuming = kit.channel()
    inbox = Inbox(consuming, "q")
    messages = inbox.take(5)
    for unknown in ("", "nonsense", None):
        consuming.basic_ack(unknown, multiple=True)
    assert kit.pending() == 5
    messages[2].ack(multiple=True)
    consuming.basic_ack(messages[2].delivery_tag, multiple=True)
    inbox.cancel()
    consuming.close()
    again = Inbox(kit.channel(), "q")
    assert again.drain_all() == [3, 4]


def test_acks_from_another_thread_wake_a_blocking_drain(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, 1, 2)
    inbox = Inbox(kit.channel(), "q", prefetch=1)
    first = inbox.take()[0]
    timer = threading.Timer(0.3, first.ack)
    timer.start()
    watch = Starved()
    assert inbox.drain(10)
    assert watch.spent < 2
    assert inbox.bodies == [1, 2]
    timer.join()


def test_many_threads_acknowledge(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, *range(200))
    inbox = Inbox(kit.channel(), "q", prefetch=20)
    threads = []
    for _ in range(200):
        message = inbox.take()[0]
        threads.append(threading.Thread(target=message.ack))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert sorted(inbox.bodies) == list(range(200))
    wait_until(lambda: kit.pending() == 0)


def test_requeued_goes_to_the_head(kit_all: Kit) -> None:
    """And says that it is delivered again; the others don't."""
    channel = kit_all.channel()
    kit_all.queue(channel)
    publish(channel, 1, 2, 3)
    inbox = Inbox(kit_all.channel(), "q", prefetch=1)
    first = inbox.take()[0]
    assert not first.delivery_info.get("redelivered")
    first.reject(requeue=True)
    again = inbox.take()[0]
    assert again.payload == 1
    assert again.delivery_info["redelivered"] is True
    assert again.headers["redelivered"] is True
    assert again.delivery_tag != first.delivery_tag
    again.ack()
    following = inbox.take()[0]
    assert following.payload == 2
    assert not following.delivery_info.get("redelivered")
    assert "redelivered" not in following.headers


def test_requeued_several_keep_their_order(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, *range(6))
    consuming = kit.channel()
    inbox = Inbox(consuming, "q", prefetch=3)
    for message in reversed(inbox.take(3)):
        message.requeue()
    assert [message.payload for message in inbox.take(3)] == [0, 1, 2]


def test_requeued_is_taken_by_another(kit: Kit) -> None:
    """A consumer that hands back and stops: the message goes to whoever is there."""
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, 1)
    inbox = Inbox(kit.channel(), "q", prefetch=1)
    message = inbox.take()[0]
    other = Inbox(kit.channel(), "q")
    inbox.cancel()
    message.requeue()
    assert other.take()[0].payload == 1


def test_rejected_lies_whole_in_the_dead_letters(kit_all: Kit) -> None:
    channel = kit_all.channel()
    kit_all.queue(channel)
    publish(channel, {"body": [1, 2]}, headers={"task": "tasks.add", "id": "abc"}, correlation_id="cor")
    inbox = Inbox(kit_all.channel(), "q")
    inbox.take()[0].reject()
    wait_until(lambda: kit_all.dead() == 1)
    assert kit_all.pending() == 0
    (key,) = kit_all.keys("{kombu.q.*:dlq")
    ((_, fields),) = kit_all.client().xrange(key)
    everything = b" ".join([*fields.keys(), *fields.values()])
    for part in (b"tasks.add", b"abc", b"cor", b'{"body": [1, 2]}', b"rejected"):
        assert part in everything
    assert not inbox.drain(0.2)


def test_recover(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, 1, 2, 3)
    consuming = kit.channel()
    inbox = Inbox(consuming, "q")
    messages = inbox.take(3)
    messages[1].ack()
    inbox.consumer.recover(requeue=True)
    assert [(m.payload, m.delivery_info.get("redelivered")) for m in inbox.take(2)] == [(1, True), (3, True)]


@pytest.mark.parametrize("what", ["channel", "connection"])
def test_unacked_is_redelivered_when_it_closes(kit_all: Kit, what: str) -> None:
    """First, in order, and marked."""
    channel = kit_all.channel()
    kit_all.queue(channel)
    publish(channel, *range(6))
    connection = kit_all.connect()
    consuming = connection.channel()
    inbox = Inbox(consuming, "q", prefetch=4)
    messages = inbox.take(4)
    messages[1].ack()
    consuming.close() if what == "channel" else connection.release()
    other = Inbox(kit_all.channel(), "q")
    got = other.take(5)
    assert [message.payload for message in got] == [0, 2, 3, 4, 5]
    assert [bool(message.delivery_info.get("redelivered")) for message in got] == [True, True, True, False, False]


def test_a_late_ack_is_ignored(kit: Kit) -> None:
    """The channel is closed, so the message is another's: its ack must not take it away."""
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, 1)
    consuming = kit.channel()
    late = Inbox(consuming, "q").take()[0]
    consuming.close()
    late.ack()
    other = Inbox(kit.channel(), "q")
    again = other.take()[0]
    assert again.payload == 1
    late.channel.basic_ack(late.delivery_tag)
    assert kit.pending() == 1
    again.ack()
    wait_until(lambda: kit.pending() == 0)


def test_a_cancelled_consumers_messages_stay_its_own(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, 1, 2)
    consuming = kit.channel()
    inbox = Inbox(consuming, "q", prefetch=1)
    message = inbox.take()[0]
    inbox.cancel()
    other = Inbox(kit.channel(), "q")
    assert other.drain_all() == [2]
    message.ack()
    wait_until(lambda: kit.pending() == 1)
    consuming.close()
    assert other.drain_all() == [2]


def test_cancel_and_consume_again(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    consuming = kit.channel()
    for round_ in range(5):
        inbox = Inbox(consuming, "q", prefetch=1)
        publish(channel, round_)
        inbox.take()[0].ack()
        assert inbox.bodies == [round_]
        inbox.cancel()


def test_what_was_fetched_for_a_cancelled_consumer_goes_back(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, *range(10))
    inbox = Inbox(kit.channel(), "q", prefetch=10)
    inbox.take(1)
    inbox.cancel()
    other = Inbox(kit.channel(), "q", prefetch=100)
    assert sorted(other.drain_all()) == list(range(1, 10))


def test_an_unknown_tag(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    channel.basic_ack("nonsense")
    channel.basic_reject("nonsense", requeue=True)
    publish(channel, 1)
    assert channel.basic_get("q").payload == 1


def test_acked_twice(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, 1, 2)
    inbox = Inbox(kit.channel(), "q", prefetch=1)
    message = inbox.take()[0]
    message.ack()
    message.channel.basic_ack(message.delivery_tag)
    assert inbox.take()[0].payload == 2
    assert not inbox.drain(0.2)
    assert kit.pending() == 1


# --- ways of taking ------------------------------------------------------------------------------------------------------


def test_drain_delivers_one_a_call(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, *range(3))
    inbox = Inbox(kit.channel(), "q", prefetch=10)
    for count in (1, 2, 3):
        assert inbox.drain(5)
        assert len(inbox.messages) == count


def test_drain_times_out(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    inbox = Inbox(kit.channel(), "q")
    began, watch = time.monotonic(), Starved()
    with pytest.raises(TimeoutError):  # which socket.timeout is another name of
        inbox.connection.drain_events(timeout=0.4)
    assert time.monotonic() - began > 0.35
    assert watch.spent < 1.5
    with pytest.raises(TimeoutError):
        inbox.connection.drain_events(timeout=0)


def test_drain_without_consumers_times_out(kit: Kit) -> None:
    connection = kit.connect()
    connection.connect()
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.1)


def test_a_waiting_drain_hears_of_a_message_at_once(kit_all: Kit) -> None:
    channel = kit_all.channel()
    kit_all.queue(channel)
    inbox = Inbox(kit_all.channel(), "q")
    inbox.drain(0.2)
    for options in ({}, {"priority": 9}, {"headers": {"shard_key": "u1"}}, {"priority": 9}, {}):
        timer = threading.Timer(0.2, publish, (kit_all.channel(), 1), options)
        timer.start()
        watch = Starved()
        # A first message with a key has its shard given out, first; that takes a little.
        assert inbox.drain(20)
        assert watch.spent < 3
        timer.join()
        inbox.messages.pop().ack()


def test_without_acknowledging(kit_all: Kit) -> None:
    channel = kit_all.channel()
    kit_all.queue(channel)
    publish(channel, *range(10))
    publish(channel, 10, priority=6)
    consuming = kit_all.channel()
    inbox = Inbox(consuming, "q", no_ack=True, prefetch=2)
    assert sorted(inbox.drain_all()) == list(range(11))
    consuming.close()
    assert kit_all.channel().basic_get("q") is None
    assert kit_all.pending() == 0


def test_what_is_taken_for_good_is_not_lost_with_its_consumer(kit: Kit) -> None:
    """Without acknowledging a consumer is given no more than it sees, also with a prefetch limit."""
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, *range(6))
    inbox = Inbox(kit.channel(), "q", prefetch=10, no_ack=True)
    inbox.take(2)
    inbox.cancel()
    rest = Inbox(kit.channel(), "q", prefetch=10, no_ack=True)
    rest.take(4)
    assert [*inbox.bodies, *rest.bodies] == list(range(6))


def test_without_acknowledging_what_has_keys(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, *range(5), headers={"shard_key": "u1"})
    inbox = Inbox(kit.channel(), "q", no_ack=True)
    inbox.take(5)
    assert inbox.bodies == list(range(5))


def test_get(kit_all: Kit) -> None:
    channel = kit_all.channel()
    queue = kit_all.queue(channel)
    assert queue.get() is None
    publish(channel, 1, 2)
    first = queue.get()
    assert first.payload == 1
    assert queue.get(no_ack=True).payload == 2
    assert queue.get() is None
    first.reject(requeue=True)
    again = queue.get()
    assert (again.payload, again.delivery_info["redelivered"]) == (1, True)
    again.ack()
    assert queue.get() is None


def test_get_finds_priorities_and_keys(kit: Kit) -> None:
    channel = kit.channel()
    queue = kit.queue(channel)
    assert queue.get() is None
    publish(channel, "low", priority=9)
    publish(channel, "high")
    publish(channel, "keyed", headers={"shard_key": "u1"})
    found: list[Any] = []

    def take() -> bool:
        message = queue.get()
        if message is not None:
            found.append(message.payload)
            message.ack()
        return len(found) == 3

    wait_until(take)
    assert sorted(found) == ["high", "keyed", "low"]


def test_simple_queue(kit: Kit) -> None:
    with kit.connect().SimpleQueue("simple") as queue, kit.connect().SimpleQueue("simple") as other:
        queue.put({"n": 1})
        queue.put({"n": 2})
        message = other.get(timeout=5)
        assert message.payload == {"n": 1}
        message.ack()
        wait_until(lambda: queue.qsize() == 1)
        message = other.get(timeout=5)
        message.ack()
        with pytest.raises(other.Empty):
            other.get(timeout=0.1)
        with pytest.raises(other.Empty):
            other.get_nowait()
        queue.put({"n": 3})
        queue.put({"n": 4})
        assert queue.clear() == 2


def test_simple_buffer(kit: Kit) -> None:
    with kit.connect().SimpleBuffer("buffer") as buffer:
        buffer.put("x")
        assert buffer.get(timeout=5).payload == "x"
        with pytest.raises(buffer.Empty):
            buffer.get(timeout=0.1)


# --- order ---------------------------------------------------------------------------------------------------------------


def test_priorities(kit_all: Kit) -> None:
    """Steps of 0, 3, 6, 9; the lowest number first; in order within a step."""
    channel = kit_all.channel()
    kit_all.queue(channel)
    for priority in (9, 5, 0, 3, 8, 2, 6, 4, 1, 7):
        publish(channel, priority, priority=priority)
    publish(channel, "none")
    inbox = Inbox(kit_all.channel(), "q", prefetch=1)
    for _ in range(11):
        inbox.take()[0].ack()
    assert inbox.bodies == [0, 2, 1, "none", 5, 3, 4, 8, 6, 7, 9]


def test_priority_of_what_comes_later(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, *["low"] * 3, priority=9)
    inbox = Inbox(kit.channel(), "q", prefetch=1)
    inbox.take()[0].ack()
    publish(channel, "middle", priority=3)
    publish(channel, "high", priority=0)
    # One that was read ahead may come first.
    for _ in range(4):
        inbox.take()[0].ack()
    assert inbox.bodies == ["low", "high", "middle", "low", "low"]


def test_requeued_keeps_its_priority(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, "low", priority=9)
    inbox = Inbox(kit.channel(), "q", prefetch=1)
    low = inbox.take()[0]
    publish(channel, "high", priority=0)
    low.requeue()
    inbox.take()[0].ack()
    inbox.take()[0].ack()
    assert inbox.bodies == ["low", "high", "low"]
    assert inbox.messages[-1].properties["priority"] == 9


def test_own_priority_steps(kit: Kit) -> None:
    connection = kit.connect(transport_options={"priority_steps": [0, 1, 2, 3]})
    channel = connection.channel()
    kit.queue(channel)
    for priority in (3, 2, 1, 0):
        publish(channel, priority, priority=priority)
    inbox = Inbox(channel, "q", prefetch=1)
    for _ in range(4):
        inbox.take()[0].ack()
    assert inbox.bodies == [0, 1, 2, 3]


def test_keyed_messages_ignore_priority(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    for priority in (9, 3, 0):
        publish(channel, priority, priority=priority, headers={"shard_key": "u1"})
    inbox = Inbox(kit.channel(), "q", prefetch=1)
    for _ in range(3):
        inbox.take()[0].ack()
    assert inbox.bodies == [9, 3, 0]


def test_odd_priorities(kit: Kit) -> None:
    """Each is read as kombu reads it."""
    channel = kit.channel()
    kit.queue(channel)
    read = {"high": 0, -1: 0, -7.5: 0, "5": 3, 4.5: 3, 100: 9, None: 0, float("inf"): 0, float("nan"): 0, (): 0}
    for priority in read:
        publish(channel, str(priority), priority=priority)
    client = kit.client()
    found = {}
    for key in kit.keys("{kombu.q.0.shared}:*stream"):
        step = key.partition("}:")[2].removesuffix("stream").strip(":")
        for _, fields in client.xrange(key):
            found[msgpack.unpackb(fields[b"m"])[3][0].decode()] = int(step or 0)
    assert found == {str(one): step for one, step in read.items()}
    for _ in read:
        assert channel.basic_get("q") is not None


# --- time to live --------------------------------------------------------------------------------------------------------


def test_expired_messages_are_dropped(kit_all: Kit) -> None:
    """Also one that lies behind others, and by the queue's argument; the shorter time counts."""
    channel = kit_all.channel()
    kit_all.queue(channel)
    kit_all.queue(channel, "ttl", message_ttl=0.2)
    publish(channel, "stays")
    publish(channel, "short", expiration=0.2)
    publish(channel, "long", expiration=60)
    publish(channel, "keyed", expiration=0.2, headers={"shard_key": "u1"})
    publish(channel, "by the queue", to="ttl")
    publish(channel, "by the queue too", to="ttl", expiration=60)
    time.sleep(0.5)  # on purpose: they expire by the clock
    publish(channel, "fresh", to="ttl")
    inbox = Inbox(kit_all.channel(), "q", "ttl")
    assert sorted(inbox.drain_all(1)) == ["fresh", "long", "stays"]
    for message in inbox.messages:
        message.ack()
    wait_until(lambda: kit_all.pending() == kit_all.pending("ttl") == 0)
    assert kit_all.dead() == 0


def test_expired_messages_are_not_got(kit: Kit) -> None:
    channel = kit.channel()
    queue = kit.queue(channel)
    publish(channel, *range(5), expiration=0.1)
    publish(channel, "fresh")
    time.sleep(0.3)  # on purpose
    assert queue.get().payload == "fresh"
    publish(channel, 1, expiration=0.1)
    publish(channel, "second")
    time.sleep(0.3)  # on purpose
    assert queue.get(no_ack=True).payload == "second"


def test_expired_ones_use_up_no_prefetch(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, *range(50), expiration=0.1)
    publish(channel, "a", "b")
    time.sleep(0.3)  # on purpose
    inbox = Inbox(kit.channel(), "q", prefetch=2)
    inbox.take(2, timeout=3)
    assert inbox.bodies == ["a", "b"]


# --- content -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("serializer", ["json", "pickle", "yaml"])
def test_serializers(kit: Kit, serializer: str) -> None:
    channel = kit.channel()
    kit.queue(channel)
    body = {"text": "äöü\u0000\U0001f600", "list": [1, 2.5, None, True], "nested": {"a": {"b": []}}}
    publish(channel, body, serializer=serializer)
    assert Inbox(kit.channel(), "q").take()[0].payload == body


@pytest.mark.parametrize("compression", ["gzip", "bzip2", "lzma"])
def test_compression(kit: Kit, compression: str) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, {"x": "y" * 10_000}, compression=compression)
    assert Inbox(kit.channel(), "q").take()[0].payload == {"x": "y" * 10_000}


@pytest.mark.parametrize("body", [b"", b"\x00\xff\xfe", bytes(range(256)) * 100], ids=["empty", "short", "all"])
def test_bytes(kit: Kit, body: bytes) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, body, content_type="application/data", content_encoding="binary")
    message = Inbox(kit.channel(), "q").take()[0]
    assert bytes(message.body) == body
    assert bytes(message.payload) == body


def test_text(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, "plain ä", content_type="text/plain", content_encoding="utf-8")
    assert Inbox(kit.channel(), "q").take()[0].payload == "plain ä"


def test_large_bodies(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    bodies = [bytes([n]) * 8_000_000 for n in range(3)]
    for body in bodies:
        publish(channel, body, content_type="application/data", content_encoding="binary")
    inbox = Inbox(kit.channel(), "q", prefetch=3)
    inbox.take(3)
    assert [bytes(m.body) for m in inbox.messages] == bodies


def test_headers_and_properties(kit_all: Kit) -> None:
    """Whatever kombu's own JSON takes arrives as what it was, or as kombu's redis transport would give it."""
    channel = kit_all.channel()
    kit_all.queue(channel)
    when, id_ = dt.datetime(2024, 5, 1, 12, 30, 1, 250_000, tzinfo=dt.timezone.utc), uuid.uuid4()
    headers = {
        "when": when, "id": id_, "day": dt.date(2024, 5, 1), "price": decimal.Decimal("1.10"), "set": [1, [2, {"x": None}]],
        "big": 2**70, "negative": -(2**63), "float": 1e300, "bytes": b"\x00\xff", "ä": "ö",
    }  # fmt: skip
    publish(channel, 1, headers=headers, correlation_id="c", reply_to="r", priority=3, app_id="me", timestamp=5)
    message = Inbox(kit_all.channel(), "q").take()[0]
    got = message.headers
    assert got["when"] == when
    assert str(got["id"]) == str(id_)
    assert str(got["price"]) == "1.10"
    assert str(got["day"]).startswith("2024-05-01")
    for name in ("set", "big", "negative", "float", "bytes", "ä"):
        assert got[name] == headers[name], name
    properties = message.properties
    assert (properties["correlation_id"], properties["reply_to"], properties["priority"]) == ("c", "r", 3)
    assert properties["delivery_mode"] == 2
    assert message.delivery_info["routing_key"] == "q"
    assert message.delivery_info["exchange"] == ""
    assert "streamtask_produce_id" not in properties


@pytest.mark.parametrize("how", [{}, {"serializer": "pickle"}, {"compression": "gzip"}], ids=["json", "pickle", "gzip"])
def test_headers_that_kombus_json_takes(kit: Kit, how: dict[str, Any]) -> None:
    """Also where the body is bytes. What nothing could store or print later is refused."""

    class Lazy:
        def __json__(self) -> str:
            return "lazy"

    channel = kit.channel()
    kit.queue(channel)
    publish(channel, {"n": 1}, headers={"x": Lazy(), "y": 2**70, "z": b"\xff"}, **how)
    (message,) = Inbox(kit.channel(), "q").take()
    assert message.payload == {"n": 1}
    assert (message.headers["x"], message.headers["y"], message.headers["z"]) == ("lazy", 2**70, b"\xff")
    with pytest.raises(EncodeError, match="surrogates not allowed"):
        publish(channel, 1, headers={"x": "\ud800"}, **how)


def test_content_that_is_not_accepted(kit: Kit) -> None:
    """By this consumer: another of the process, which accepts it, changes nothing for it, before or after."""
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, *[{"x"}] * 3, serializer="pickle")
    for accept in (["json"], ["json", "pickle"], ["json"]):
        inbox = Inbox(kit.channel(), "q", accept=accept, prefetch=1)
        (message,) = inbox.take(1)
        if "pickle" in accept:
            assert message.decode() == {"x"}
        else:
            with pytest.raises(ContentDisallowed):
                message.decode()
        message.ack()
        inbox.channel.close()


def test_message_attributes_for_the_redis_driver(kit: Kit) -> None:
    """Celery asks these of a transport."""
    transport = kit.connect().transport
    assert (transport.driver_type, transport.implements.asynchronous) == ("redis", True)
    assert not transport.implements.heartbeats
    assert transport.implements.exchange_type == frozenset(["direct", "topic", "fanout"])
    assert transport.driver_version()


def test_delivery_tags_are_unique(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, *range(50))
    publish(channel, *range(50), priority=9)
    one, two = Inbox(kit.channel(), "q", prefetch=25), Inbox(kit.channel(), "q")
    one.take(25)
    two.drain_all()
    tags = [message.delivery_tag for message in one.messages + two.messages]
    assert len(set(tags)) == len(tags) == 100


def test_a_message_can_be_passed_on(kit: Kit) -> None:
    """Its headers and properties published again as they are: a message of its own."""
    channel = kit.channel()
    kit.queue(channel)
    kit.queue(channel, "next")
    publish(channel, 1, headers={"a": 1})
    message = Inbox(kit.channel(), "q").take()[0]
    for _ in range(2):
        channel.basic_publish(
            channel.prepare_message(
                message.body, None, message.content_type, message.content_encoding, message.headers, message.properties
            ),
            exchange="",
            routing_key="next",
        )
    assert Inbox(kit.channel(), "next").drain_all() == [1, 1]


def test_consumers_of_queue_objects_declare(kit: Kit) -> None:
    connection = kit.connect()
    with connection.Consumer(Queue("fresh"), accept=["json"], callbacks=[lambda body, message: message.ack()]):
        assert kit.channel().queue_declare("fresh", passive=True).queue == "fresh"


def test_a_wrapped_can_consume_is_asked_for_each_message(kit: Kit) -> None:
    """As Celery's ``worker_disable_prefetch`` wraps it; what it refuses is there for another consumer."""
    first, second = (Inbox(kit.channel(), "q", prefetch=8) for _ in range(2))
    plain = first.channel.qos.can_consume
    first.channel.qos.can_consume = lambda: len(first.messages) < 2 and plain()
    publish(first.channel, *range(8))
    assert len(first.drain_all()) == 2
    second.take(6)
    assert sorted(first.bodies + second.bodies) == list(range(8))
