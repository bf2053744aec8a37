"""Publishing: repeats after lost replies, batches, messages that wait for their time, keys and their shards."""

from __future__ import annotations

import datetime as dt
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from kombu import Connection, Exchange, Producer, Queue
from kombu.exceptions import BatchPublishError, OperationalError

from streamtask.errors import ConfigError, ReplyError
from streamtask.sharding import shard_of
from tests.fix_proxy import Proxy
from tests.fix_redis import RedisServer
from tests.helpers import Starved, wait_until
from tests.transport.kit import Inbox, Kit, publish

RETRY = {"max_retries": 5, "interval_start": 0.05, "interval_step": 0.05, "interval_max": 0.2}


def eta(seconds: float) -> str:
    return (dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=seconds)).isoformat()


@pytest.fixture
def cut(make_kit: Any, redis_server: RedisServer, proxy: Callable[[RedisServer], Proxy]) -> tuple[Kit, Proxy, Kit]:
    """A kit through a proxy, the proxy, and a kit that looks at the same without it."""
    between = proxy(redis_server)
    direct: Kit = make_kit(redis_server)
    return make_kit(between, namespace=direct.namespace), between, direct


# --- repeats -------------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "priority": {"priority": 6},
    "keyed": {"headers": {"shard_key": "u1"}},
    "eta": {"headers": {"eta": "2999-01-01T00:00:00+00:00"}},
    "keyed eta": {"headers": {"eta": "2999-01-01T00:00:00+00:00", "shard_key": "u1"}},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("losses", [1, 3])
def test_a_lost_reply_stores_one(cut: tuple[Kit, Proxy, Kit], kind: str, losses: int) -> None:
    kit, proxy, direct = cut
    channel = direct.channel()
    direct.queue(channel)
    producer = kit.connect().Producer()
    producer.publish("before", routing_key="q", retry=True, retry_policy=RETRY, **KINDS[kind])
    proxy.cut_after_request(b"marked", times=losses)
    producer.publish("marked", routing_key="q", retry=True, retry_policy=RETRY, **KINDS[kind])
    assert proxy.cuts == losses
    assert channel._size("q") == 2


def test_a_lost_request_stores_one(cut: tuple[Kit, Proxy, Kit]) -> None:
    kit, proxy, direct = cut
    channel = direct.channel()
    direct.queue(channel)
    producer = kit.connect().Producer()
    producer.publish("before", routing_key="q")
    proxy.cut_before_request(b"marked", times=2)
    producer.publish("marked", routing_key="q", retry=True, retry_policy=RETRY)
    assert channel._size("q") == 2


@pytest.mark.parametrize(
    "losses",
    [
        1,
        2,
    ],
)
def test_a_repeat_of_kombus_stores_one(cut: tuple[Kit, Proxy, Kit], losses: int) -> None:
    """The transport repeats nothing here: kombu makes a new connection and channel, and publishes again."""
    kit, proxy, direct = cut
    channel = direct.channel()
    direct.queue(channel)
    producer = kit.connect(transport_options={"send_timeout": 0}).Producer()
    producer.publish("before", routing_key="q")
    proxy.cut_after_request(b"marked", times=losses)
    errors: list[Any] = []
    policy = {**RETRY, "errback": lambda exc, interval: errors.append(exc)}
    producer.publish("marked", routing_key="q", retry=True, retry_policy=policy)
    assert proxy.cuts == losses
    assert len(errors) == losses
    assert channel._size("q") == 2


def test_a_lost_reply_to_several_queues(cut: tuple[Kit, Proxy, Kit]) -> None:
    """Some of them have it already when kombu repeats it: each has one in the end."""
    kit, proxy, direct = cut
    channel = direct.channel()
    exchange = Exchange("t", type="topic")
    for name in ("a", "b", "c"):
        Queue(name, exchange, routing_key="x.*")(channel).declare()
    producer = kit.connect().Producer(exchange=exchange)
    producer.publish("before", routing_key="x.1", retry=True, retry_policy=RETRY)
    for _ in range(3):
        proxy.cut_after_request(b"marked")
        producer.publish("marked", routing_key="x.1", retry=True, retry_policy=RETRY)
    assert [channel._size(name) for name in ("a", "b", "c")] == [4, 4, 4]


def test_equal_publishes_are_two_messages(kit: Kit) -> None:
    """Of one task id, of one properties dict, of one headers dict: a publish is not its repeat."""
    channel = kit.channel()
    kit.queue(channel)
    producer = Producer(channel)
    same = {"correlation_id": "1", "headers": {"id": "1", "task": "t"}, "message_id": "1"}
    for _ in range(3):
        producer.publish("x", routing_key="q", **same)
    assert channel._size("q") == 3


def test_without_retry_the_error_comes(cut: tuple[Kit, Proxy, Kit]) -> None:
    """kombu without retry=True: it is told, not silently dropped."""
    kit, proxy, direct = cut
    direct.queue(direct.channel())
    connection = kit.connect(transport_options={"send_timeout": 0.3})
    producer = connection.Producer()
    producer.publish("before", routing_key="q")
    proxy.refuse()
    proxy.cut()
    began = time.monotonic()
    with pytest.raises((*connection.connection_errors, OperationalError)):
        producer.publish("x", routing_key="q")
    assert time.monotonic() - began < 5
    proxy.accept()
    producer.publish("after", routing_key="q", retry=True, retry_policy=RETRY)
    assert Inbox(direct.channel(), "q").drain_all() == ["before", "after"]


def test_nobody_answers(cut: tuple[Kit, Proxy, Kit]) -> None:
    """A half-open connection under a publish: an error within the socket's time, not an endless wait."""
    kit, proxy, direct = cut
    direct.queue(direct.channel())
    connection = kit.connect(transport_options={"socket_timeout": 0.5, "send_timeout": 0.3})
    producer = connection.Producer()
    producer.publish("before", routing_key="q")
    proxy.blackhole()
    began = time.monotonic()
    with pytest.raises((*connection.connection_errors, OperationalError)):
        producer.publish("x", routing_key="q")
    assert time.monotonic() - began < 5
    proxy.blackhole(on=False)
    producer.publish("after", routing_key="q", retry=True, retry_policy=RETRY)
    assert "after" in Inbox(direct.channel(), "q").drain_all()


@pytest.mark.parametrize(
    "kind",
    ["plain", "keyed", "priority"],
)
def test_stale_connections_are_mended(kit: Kit, kind: str) -> None:
    """Idle connections that the server has closed: the next publish works, also without kombu's retry."""
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, 1)
    kit.client().client_kill_filter(_type="normal", skipme=True)
    publish(channel, 2, **KINDS[kind])
    client = kit.client()
    assert sum(client.xlen(key) for key in kit.keys("{kombu.q.*}*:stream")) == 2


def test_a_size_is_asked_over_a_stale_connection(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, 1)
    kit.client().client_kill_filter(_type="normal", skipme=True)
    assert channel._size("q") == 1


def test_publishing_goes_on_after_a_restart(own_server: RedisServer, make_kit: Any) -> None:
    kit = make_kit(own_server)
    connection = kit.connect()
    kit.queue(connection.channel())
    producer = connection.Producer()
    producer.publish(1, routing_key="q")
    own_server.restart(kill=True)
    producer.publish(2, routing_key="q", retry=True, retry_policy=RETRY)
    assert Inbox(kit.channel(), "q").drain_all() == [1, 2]


def test_publishing_after_a_flush(kit: Kit) -> None:
    """All streams and records are gone, and the publishing process does not know it."""
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, 1)
    publish(channel, 1, headers={"shard_key": "a"})
    publish(channel, 1, priority=3)
    kit.client().flushall()
    publish(channel, "plain")
    publish(channel, "keyed", headers={"shard_key": "a"})
    publish(channel, "low", priority=3)
    inbox = Inbox(kit.channel(), "q")
    inbox.take(3)
    assert sorted(inbox.bodies) == ["keyed", "low", "plain"]


def test_from_many_threads(kit: Kit) -> None:
    """A ProducerPool, as Celery has it."""
    channel = kit.channel()
    kit.queue(channel)
    pool = kit.connect().Pool(3)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for n in range(20):
                with pool.acquire(block=True) as connection:
                    connection.Producer().publish([number, n], routing_key="q", retry=True)
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    bodies = Inbox(kit.channel(), "q").drain_all()
    assert len(bodies) == 160
    for number in range(8):
        assert [n for who, n in bodies if who == number] == list(range(20))
    pool.force_close_all()


def test_producer_pool(kit: Kit) -> None:
    from kombu import pools

    channel = kit.channel()
    kit.queue(channel)
    connection = kit.connect()
    try:
        for n in range(5):
            with pools.producers[connection].acquire(block=True) as producer:
                producer.publish(n, routing_key="q")
        assert Inbox(kit.channel(), "q").drain_all() == list(range(5))
    finally:
        pools.reset()


# --- full ----------------------------------------------------------------------------------------------------------------


def test_a_full_redis(own_server_all: RedisServer, make_kit: Any) -> None:
    """Publishing raises within its time; consuming and acknowledging go on and make room again."""
    kit = make_kit(own_server_all, send_timeout=0.3)
    connection = kit.connect()
    channel = connection.channel()
    kit.queue(channel)
    inbox = Inbox(kit.channel(), "q", prefetch=5)
    publish(channel, *["x" * 100_000] * 20)
    inbox.take(5)
    kit.client().config_set("maxmemory-policy", "noeviction")
    kit.client().config_set("maxmemory", kit.client().info("memory")["used_memory"] // 2)
    began = time.monotonic()
    with pytest.raises((*connection.connection_errors, *connection.channel_errors, OperationalError)):
        connection.Producer().publish("full", routing_key="q", retry=True, retry_policy=dict(RETRY, max_retries=2))
    assert time.monotonic() - began < 8
    for n in range(20):
        if n >= len(inbox.messages):
            inbox.take()
        inbox.messages[n].ack()
    wait_until(lambda: kit.pending() == 0)
    kit.client().config_set("maxmemory", 0)
    publish(channel, "room")
    inbox.take()
    assert inbox.bodies[-1] == "room"


@pytest.mark.parametrize("no_ack", [False, True], ids=["acks", "no_ack"])
@pytest.mark.parametrize(
    "options", [{"priority": 9}, {"headers": {"shard_key": "a"}}], ids=["first of its priority", "first with a key"]
)
def test_consumers_hear_of_a_stream_that_was_made_when_redis_was_full(
    kit: Kit, redis_server: RedisServer, options: dict[str, Any], no_ack: bool
) -> None:
    """The stream is there, and its first message is refused: who publishes again makes nothing."""
    channel = kit.channel()
    kit.queue(channel)
    inbox = Inbox(channel, "q", no_ack=no_ack)
    inbox.drain(0.2)
    redis_server.config_set(maxmemory_policy="noeviction", maxmemory=kit.client().info("memory")["used_memory"] // 2)
    other = kit.connect(transport_options={"send_timeout": 0.2})
    with pytest.raises((*other.connection_errors, *other.channel_errors, OperationalError)):
        publish(other.channel(), "refused", **options)
    inbox.drain(0.2)
    redis_server.config_set(maxmemory=0)
    publish(other.channel(), "stored", **options)
    inbox.take(timeout=4)
    assert inbox.bodies == ["stored"]


def test_backlog_limit(kit: Kit) -> None:
    connection = kit.connect(transport_options={"max_backlog": 5, "send_timeout": 0.2})
    channel = connection.channel()
    kit.queue(channel)
    publish(channel, *range(5))
    with pytest.raises(connection.connection_errors):
        publish(channel, 5)
    assert channel._size("q") == 5
    channel.basic_get("q", no_ack=True)
    publish(channel, 6)


# --- batches -------------------------------------------------------------------------------------------------------------


def test_batch(kit_all: Kit) -> None:
    channel = kit_all.channel()
    kit_all.queue(channel)
    kit_all.queue(channel, "other")
    producer = Producer(channel)
    with producer.batch(max_size=7):
        for n in range(50):
            producer.publish(n, routing_key="q")
        producer.publish("keyed", routing_key="q", headers={"shard_key": "u1"})
        producer.publish("elsewhere", routing_key="other")
        producer.publish("low", routing_key="q", priority=9)
        producer.publish("later", routing_key="q", headers={"eta": "2999-01-01T00:00:00+00:00"})
    assert channel._size("q") == 53
    assert Inbox(kit_all.channel(), "other").drain_all() == ["elsewhere"]
    inbox = Inbox(kit_all.channel(), "q")
    inbox.take(52)
    assert [body for body in inbox.bodies if isinstance(body, int)] == list(range(50))


def test_batch_that_fails_inside_its_block(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)

    def half() -> None:
        producer = Producer(channel)
        with producer.batch():
            producer.publish(1, routing_key="q")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert channel._size("q") == 0


def test_batch_by_an_exchange(kit: Kit) -> None:
    channel = kit.channel()
    exchange = Exchange("t", type="topic")
    for name in ("a", "b"):
        Queue(name, exchange, routing_key="x.*")(channel).declare()
    producer = Producer(channel, exchange=exchange)
    with producer.batch():
        for n in range(3):
            producer.publish(n, routing_key=f"x.{n}")
        producer.publish("nobody", routing_key="y")
    assert Inbox(kit.channel(), "a").drain_all() == [0, 1, 2]
    assert Inbox(kit.channel(), "b").drain_all() == [0, 1, 2]


def test_lost_reply_of_a_batch(cut: tuple[Kit, Proxy, Kit]) -> None:
    kit, proxy, direct = cut
    channel = direct.channel()
    direct.queue(channel)
    connection = kit.connect()
    producer = connection.Producer()
    producer.publish("before", routing_key="q")
    proxy.cut_after_request(b"marked")
    with producer.batch():
        for n in range(20):
            producer.publish(f"marked {n}", routing_key="q")
    assert proxy.cuts == 1
    assert channel._size("q") == 21


def test_a_batch_that_can_not_be_sent(cut: tuple[Kit, Proxy, Kit]) -> None:
    kit, proxy, direct = cut
    direct.queue(direct.channel())
    producer = kit.connect().Producer()
    producer.publish("before", routing_key="q")

    def send() -> None:
        with producer.batch():
            producer.publish("x", routing_key="q")
            proxy.refuse()
            proxy.cut()

    with pytest.raises(BatchPublishError):
        send()
    proxy.accept()


def test_a_batch_into_a_full_redis(own_server: RedisServer, make_kit: Any) -> None:
    kit = make_kit(own_server, send_timeout=0.3)
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, 1)
    kit.client().config_set("maxmemory", 1_000_000)
    kit.client().config_set("maxmemory-policy", "noeviction")

    def send() -> None:
        producer = Producer(channel)
        with producer.batch():
            for n in range(10):
                producer.publish(n, routing_key="q")

    with pytest.raises(BatchPublishError):
        send()
    kit.client().config_set("maxmemory", 0)
    assert channel._size("q") == 1


# --- eta -----------------------------------------------------------------------------------------------------------------


def delayed(kit: Kit, queue: str = "q") -> int:
    return sum(kit.client().zcard(key) for key in kit.keys(f"{{kombu.{queue}.*:delayed"))


def test_eta_waits_in_the_broker(kit_all: Kit) -> None:
    """Delivered once, at its time; no consumer holds it before."""
    channel = kit_all.connect(transport_options={"eta_hold": 0.2}).channel()
    kit_all.queue(channel)
    inbox = Inbox(kit_all.channel(), "q", prefetch=1)
    sent = time.time()
    publish(channel, "later", headers={"eta": eta(1.5)})
    publish(channel, "sooner", headers={"eta": eta(0.8)})
    publish(channel, "now")
    assert delayed(kit_all) == 2
    for body, after in (("now", 0), ("sooner", 0.8), ("later", 1.5)):
        message = inbox.take()[0]
        assert message.payload == body
        assert after - 0.05 <= time.time() - sent < after + 1
        message.ack()
    assert delayed(kit_all) == 0
    assert not inbox.drain(0.3)


def test_a_short_eta_is_held_by_the_worker(kit: Kit) -> None:
    """Up to eta_hold (60 s by default) it comes at once, as with other brokers: the worker waits."""
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, 1, headers={"eta": eta(50)})
    publish(channel, 2, headers={"eta": eta(90)})
    assert delayed(kit) == 1
    assert Inbox(kit.channel(), "q").drain_all() == [1]


def test_a_keyed_eta_waits_in_the_broker_however_short(kit: Kit) -> None:
    """And holds up nobody: later messages of its key come before it."""
    channel = kit.channel()
    kit.queue(channel)
    sent = time.time()
    publish(channel, "later", headers={"eta": eta(1.2), "shard_key": "u1"})
    assert delayed(kit) == 1
    publish(channel, "now", headers={"shard_key": "u1"})
    inbox = Inbox(kit.channel(), "q", prefetch=1)
    for body in ("now", "later"):
        message = inbox.take()[0]
        assert message.payload == body
        message.ack()
    assert time.time() - sent >= 1.15


@pytest.mark.parametrize(
    "text",
    ["2999-01-01T00:00:00Z", "2999-01-01T00:00:00", "2999-01-01T00:00:00.123456+02:00", dt.datetime(2999, 1, 1)],  # noqa: DTZ001
    ids=["z", "naive", "offset", "datetime"],
)
def test_forms_of_eta(kit: Kit, text: Any) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, 1, headers={"eta": text})
    assert delayed(kit) == 1


@pytest.mark.parametrize("text", ["nonsense", "", None, "2001-01-01T00:00:00Z", 5])
def test_an_eta_that_is_none(kit: Kit, text: Any) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, 1, headers={"eta": text})
    assert Inbox(kit.channel(), "q").drain_all() == [1]


def test_eta_is_got_without_a_consumer(kit: Kit) -> None:
    """A due message comes out of the broker by basic_get, too, with and without acknowledging."""
    channel = kit.connect(transport_options={"eta_hold": 0}).channel()
    queue = kit.queue(channel)
    for options in ({}, {"no_ack": True}):
        publish(channel, 1, headers={"eta": eta(0.3)})
        assert queue.get() is None
        found: list[Any] = []
        wait_until(lambda options=options, found=found: found.append(queue.get(**options)) or found[-1])
        found[-1].ack() if not options else None
        assert queue.get() is None


def test_eta_survives_consumers(kit: Kit) -> None:
    """Consumers come and go meanwhile: it is delivered once."""
    channel = kit.connect(transport_options={"eta_hold": 0}).channel()
    kit.queue(channel)
    publish(channel, *range(20), headers={"eta": eta(1.5)})
    for _ in range(5):
        consuming = kit.channel()
        inbox = Inbox(consuming, "q", prefetch=5)
        inbox.drain(0.1)
        assert inbox.messages == []
        consuming.close()
    inbox = Inbox(kit.channel(), "q")
    inbox.take(20)
    assert sorted(inbox.bodies) == list(range(20))


def test_expiration_counts_from_when_it_is_due(kit: Kit) -> None:
    """A time to live that is shorter than the eta lies ahead: the message is not gone before it could be delivered."""
    channel = kit.connect(transport_options={"eta_hold": 0}).channel()
    kit.queue(channel)
    publish(channel, 1, headers={"eta": eta(0.6)}, expiration=5)
    assert Inbox(kit.channel(), "q").take()[0].payload == 1


# --- keys ----------------------------------------------------------------------------------------------------------------


def keyed(channel: Any, key: Any, *bodies: Any, **headers: Any) -> None:
    publish(channel, *bodies, headers={"shard_key": key, **headers})


def shard_count(kit: Kit, queue: str = "q") -> int:
    (meta,) = kit.keys(f"{{kombu.{queue}}}:meta")
    return int(kit.client().hget(meta, "shards") or 0)


def test_a_keys_next_message_waits_for_the_ack(kit_all: Kit) -> None:
    channel = kit_all.channel()
    kit_all.queue(channel)
    keyed(channel, "a", "a1", "a2", "a3")
    keyed(channel, "b", "b1", "b2")
    inbox = Inbox(kit_all.channel(), "q")
    inbox.take(2)
    assert not inbox.drain(0.3)
    assert sorted(inbox.bodies) == ["a1", "b1"]
    by_body = {message.payload: message for message in inbox.messages}
    by_body["a1"].ack()
    assert inbox.take()[0].payload == "a2"
    assert not inbox.drain(0.3)
    by_body["b1"].reject()
    assert inbox.take()[0].payload == "b2"
    assert kit_all.dead() == 1


def test_a_requeued_keyed_message_comes_before_its_followers(kit_all: Kit) -> None:
    channel = kit_all.channel()
    kit_all.queue(channel)
    keyed(channel, "a", 1, 2)
    inbox = Inbox(kit_all.channel(), "q")
    first = inbox.take()[0]
    assert not first.delivery_info.get("redelivered")
    first.requeue()
    again = inbox.take()[0]
    assert (again.payload, again.delivery_info["redelivered"]) == (1, True)
    again.ack()
    assert inbox.take()[0].payload == 2


def test_keyed_order_over_channels_that_close(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    keyed(channel, "a", *range(10))
    keyed(channel, "b", *range(10))
    done: list[Any] = []
    for _ in range(10):
        consuming = kit.channel()
        inbox = Inbox(consuming, "q", prefetch=2)
        first, second = inbox.take(2)
        assert first.headers["shard_key"] != second.headers["shard_key"]
        first.ack()
        done.append((first.headers["shard_key"], first.payload))
        consuming.close()
    inbox = Inbox(kit.channel(), "q")
    for _ in range(10):
        message = inbox.take()[0]
        done.append((message.headers["shard_key"], message.payload))
        message.ack()
    for key in "ab":
        assert [n for of, n in done if of == key] == list(range(10))


def test_unordered_keyed_messages(kit: Kit) -> None:
    """ordered=False: they go to the shard of their key, and don't wait for each other."""
    channel = kit.channel()
    kit.queue(channel)
    keyed(channel, "a", 1, 2, 3, shard_ordered=False)
    inbox = Inbox(kit.channel(), "q")
    inbox.take(3)
    assert inbox.bodies == [1, 2, 3]


@pytest.mark.parametrize("key", ["u1", "ä", b"u1", "x" * 1000, "a b:c{d}"])
def test_forms_of_keys(kit: Kit, key: Any) -> None:
    channel = kit.channel()
    kit.queue(channel)
    keyed(channel, key, 1, 2)
    inbox = Inbox(kit.channel(), "q")
    inbox.take(1)
    assert inbox.bodies == [1]
    inbox.messages[0].ack()
    inbox.take(1)
    assert inbox.bodies == [1, 2]


@pytest.mark.parametrize("key", [42, uuid.UUID(int=5), "", True, 1.5, ["a"], {"a": 1}])
def test_keys_that_are_no_text(kit: Kit, key: Any) -> None:
    """``42`` and ``"42"`` are one key; what is no key is refused, and not by a puzzling error."""
    channel = kit.channel()
    kit.queue(channel)
    if isinstance(key, int | uuid.UUID) and not isinstance(key, bool):
        keyed(channel, key, 1)
        keyed(channel, str(key), 2)
        inbox = Inbox(kit.channel(), "q")
        inbox.take(1)
        assert not inbox.drain(0.3)
        inbox.messages[0].ack()
        inbox.take(1)
        assert inbox.bodies == [1, 2]
    else:
        with pytest.raises(Exception, match="key") as info:
            keyed(channel, key, 1)
        assert type(info.value).__module__.startswith("streamtask")
        assert channel._size("q") == 0


def test_number_of_shards(kit: Kit) -> None:
    """8; by the option; by the queue's argument. What is recorded counts for all that come later."""
    channel = kit.channel()
    kit.queue(channel)
    keyed(channel, "a", 1)
    assert shard_count(kit) == 8
    three = kit.connect(transport_options={"shards": 3}).channel()
    kit.queue(three, "three")
    publish(three, 1, to="three", headers={"shard_key": "a"})
    assert shard_count(kit, "three") == 3
    kit.queue(channel, "five", queue_arguments={"x-shards": 5})
    publish(channel, 1, to="five", headers={"shard_key": "a"})
    assert shard_count(kit, "five") == 5
    for name in ("q", "five"):
        publish(three, "x", to=name, headers={"shard_key": "a"})
    inbox = Inbox(kit.channel(), "five", "q")
    got = inbox.take(2)
    for message in got:
        message.ack()
    inbox.take(2)
    assert inbox.bodies == [1, 1, "x", "x"]


@pytest.mark.parametrize(
    "name, value",
    [("x-shards", wrong) for wrong in ("x", 0, -1, 1.5, 100_000)]
    + [("x-message-ttl", wrong) for wrong in ("soon", -1)]
    + [("x-expires", wrong) for wrong in ("never", -1, True, float("inf"))],
)
def test_wrong_queue_arguments(kit: Kit, name: str, value: Any) -> None:
    channel = kit.channel()
    with pytest.raises(ConfigError, match=f"the queue argument {name} must be a whole number"):
        kit.queue(channel, queue_arguments={name: value})
    assert kit.keys("*") == []


def test_a_key_goes_to_its_shard(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    for n in range(20):
        keyed(channel, f"u{n}", n)
    client = kit.client()
    for n in range(8):
        expected = sum(shard_of(f"u{m}".encode(), 8) == n for m in range(20))
        (key,) = kit.keys(f"{{kombu.q.*.{n}}}:stream")
        assert client.xlen(key) == expected


def test_keyed_and_plain_share_the_prefetch(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    inbox = Inbox(kit.channel(), "q", prefetch=4)
    for n in range(20):
        keyed(channel, f"u{n}", -1)
    for _ in range(20):
        inbox.take()[0].ack()  # it owns all shards now
    inbox.messages.clear()
    publish(channel, *range(20))
    for n in range(20):
        keyed(channel, f"u{n}", 100 + n)
    taken: list[Any] = []
    while len(taken) < 40:
        message = inbox.take()[0]
        outstanding = len(inbox.messages) - len(taken)
        assert outstanding <= 4
        taken.append(message.payload)
        message.ack()
    assert sorted(taken) == [*range(20), *range(100, 120)]
    # Neither kind waits for the end of the other.
    assert max(taken.index(n) for n in range(5)) < 30
    assert min(taken.index(n) for n in range(100, 120)) < 20


def test_a_first_keyed_message_reaches_a_waiting_consumer(kit: Kit) -> None:
    """The queue had no shards when the consumer began."""
    channel = kit.channel()
    kit.queue(channel)
    inbox = Inbox(kit.channel(), "q")
    assert not inbox.drain(0.2)
    keyed(channel, "a", 1)
    began = Starved()
    inbox.take()
    assert began.spent < 2  # a wait that nothing ends takes 5 s


def test_kombus_retry_across_connections_is_one_message_per_key(cut: tuple[Kit, Proxy, Kit]) -> None:
    kit, proxy, direct = cut
    channel = direct.channel()
    direct.queue(channel)
    producer = kit.connect().Producer()
    for n in range(10):
        if n % 3 == 0:
            proxy.cut_after_request(b"marked")
        producer.publish(f"marked {n}", routing_key="q", headers={"shard_key": "a"}, retry=True, retry_policy=RETRY)
    inbox = Inbox(direct.channel(), "q", prefetch=1)
    for _ in range(10):
        inbox.take()[0].ack()
    assert inbox.bodies == [f"marked {n}" for n in range(10)]
    assert not inbox.drain(0.2)


def test_connection_is_shared_for_publishing(kit: Kit) -> None:
    """Many kombu connections of a process need few to Redis."""
    connections: list[Connection] = [kit.connect() for _ in range(20)]
    kit.queue(connections[0].channel())
    before = len(kit.client().client_list())
    for connection in connections:
        connection.Producer().publish(1, routing_key="q")
    assert len(kit.client().client_list()) - before <= 3


def test_a_stream_that_has_no_id_left_is_said_clearly(kit: Kit, redis_server: RedisServer) -> None:
    channel = kit.channel()
    kit.queue(channel)
    producer = kit.connect().Producer()
    producer.publish("first", routing_key="q")
    client = redis_server.client()
    (stream,) = [key for key in client.scan_iter("*:stream") if client.xlen(key)]
    client.xadd(stream, {"m": "x"}, id=f"{2**64 - 1}-{2**64 - 1}")
    for _ in range(2):
        with pytest.raises((ReplyError, OperationalError), match="one with the largest id that there is was appended"):
            producer.publish("second", routing_key="q")
