"""What is declared: queues, sizes, purge, delete, expiry, bindings of each exchange type."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from kombu import Connection, Exchange, Producer, Queue
from kombu.common import Broadcast

from streamtask.redis.link import Link
from streamtask.sharding import shard_of
from tests.fix_redis import RedisServer
from tests.helpers import wait_until
from tests.transport.kit import Inbox, Kit, publish


def passive(channel: Any, name: str) -> Any:
    return channel.queue_declare(name, passive=True)


def code_of(connection: Connection, name: str) -> str | None:
    """The code of a passive declaration's error, None where the queue is there."""
    channel = connection.channel()
    try:
        passive(channel, name)
    except connection.channel_errors as exc:
        return str(exc.reply_code)
    finally:
        channel.close()
    return None


def test_a_declared_empty_queue_is_found(kit_all: Kit) -> None:
    """A passive declaration finds a queue that was declared, though it never had a message; and misses any other."""
    channel = kit_all.channel()
    kit_all.queue(channel)
    assert passive(kit_all.channel(), "q")[:2] == ("q", 0)
    assert code_of(kit_all.connect(), "other") == "404"


def test_declare_says_messages_and_consumers(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, 1, 2, 3)
    assert passive(channel, "q") == ("q", 3, 0)
    inbox = Inbox(kit.channel(), "q", prefetch=1)
    inbox.take()
    declared = passive(channel, "q")
    assert (declared.message_count, declared.consumer_count) == (2, 1)


def test_a_nameless_queue_gets_a_name(kit: Kit) -> None:
    channel = kit.channel()
    name = channel.queue_declare().queue
    assert name.startswith("amq.gen-")
    assert passive(kit.channel(), name).queue == name


def test_size_counts_what_waits(kit: Kit) -> None:
    """All streams of the queue: priorities, shards, delayed; not what is being worked on."""
    channel = kit.channel()
    queue = kit.queue(channel)
    publish(channel, 1, 2)
    publish(channel, 3, priority=5)
    publish(channel, 4, 5, headers={"shard_key": "u1"})
    publish(channel, 6, headers={"eta": "2999-01-01T00:00:00+00:00"})
    assert channel._size("q") == 6
    message = queue.get()
    assert message is not None
    assert channel._size("q") == 5
    message.ack()
    assert channel._size("q") == 5


def test_purge(kit_all: Kit) -> None:
    """Removes what waits, of all kinds, and leaves what is being worked on."""
    channel = kit_all.channel()
    kit_all.queue(channel)
    other = kit_all.channel()
    publish(channel, *range(5))
    inbox = Inbox(other, "q", prefetch=2)
    taken = inbox.take(2)
    publish(channel, 10, 11, priority=9)
    publish(channel, 12, 13, headers={"shard_key": "u1"})
    publish(channel, 14, headers={"eta": "2999-01-01T00:00:00+00:00"})
    inbox.cancel()
    assert Queue("q", channel=channel).purge() == 8
    assert channel._size("q") == 0
    for message in taken:
        message.ack()
    publish(channel, "after")
    assert kit_all.channel().basic_get("q").payload == "after"


def test_purge_of_a_missing_queue(kit: Kit) -> None:
    assert kit.channel().queue_purge("missing") == 0


def test_delete_removes_messages_and_queue(kit_all: Kit) -> None:
    channel = kit_all.channel()
    queue = kit_all.queue(channel)
    publish(channel, 1)
    publish(channel, 2, headers={"shard_key": "u1"})
    publish(channel, 3, priority=3)
    queue.delete()
    assert code_of(kit_all.connect(), "q") == "404"
    # The ids of the last publishes go by themselves: a repeat must find them.
    assert [key for key in kit_all.keys("{kombu.q[.}]*") if not key.endswith(":wake") and ":seen:" not in key] == []


def test_a_deleted_queue_can_be_used_again(kit: Kit) -> None:
    channel, elsewhere = kit.channel(), kit.channel()
    queue = kit.queue(channel)
    publish(elsewhere, "old")
    queue.delete()
    kit.queue(channel)
    publish(elsewhere, "new")
    assert queue.get(no_ack=True).payload == "new"
    assert queue.get() is None


def test_delete_if_empty(kit: Kit) -> None:
    channel = kit.channel()
    queue = kit.queue(channel)
    publish(channel, 1)
    queue.delete(if_empty=True)
    assert passive(channel, "q").message_count == 1
    queue.purge()
    queue.delete(if_empty=True)
    assert code_of(kit.connect(), "q") == "404"


def test_delete_if_unused(kit: Kit) -> None:
    channel = kit.channel()
    queue = kit.queue(channel)
    inbox = Inbox(kit.channel(), "q")
    queue.delete(if_unused=True)
    assert passive(channel, "q").queue == "q"
    inbox.cancel()
    queue.delete(if_unused=True)
    assert code_of(kit.connect(), "q") == "404"


def test_delete_under_a_consumer(kit: Kit) -> None:
    """Another connection of the process deletes the queue: the consumer neither dies nor gets stuck."""
    channel = kit.channel()
    queue = kit.queue(channel)
    inbox = Inbox(kit.channel(), "q")
    publish(channel, 1)
    held = inbox.take()
    queue.delete()
    held[0].ack()
    assert not inbox.drain(0.2)
    kit.queue(channel)
    publish(channel, "new")
    inbox.take()
    assert inbox.bodies[-1] == "new"


def test_an_expired_queue_is_gone(kit: Kit, make_kit: Any, redis_server: RedisServer) -> None:
    channel = kit.channel()
    kit.queue(channel, "short", expires=0.2)
    kit.queue(channel, "long", expires=600)
    publish(channel, 1, to="short")
    time.sleep(0.3)  # on purpose: it expires by the clock
    # Whoever declares one after its time removes it, and all that it had: a process that has just begun here.
    later = make_kit(redis_server, namespace=kit.namespace, eta_hold=59)
    later.queue(later.channel(), "other")
    assert [key for key in kit.keys("{kombu.short*") if not key.endswith(":wake") and ":seen:" not in key] == []
    assert code_of(kit.connect(), "short") == "404"
    assert code_of(kit.connect(), "long") is None
    publish(channel, 2, to="long")
    assert passive(channel, "long").message_count == 1


@contextlib.contextmanager
def step_in(number: int, what: Callable[[], None], armed: list[bool]) -> Iterator[list[bool]]:
    """Does something before one of the calls of Redis that follow, counted from when it is armed. Says whether it did."""
    real, count, done = Link.call, 0, []

    def call(link: Link, packed: bytes) -> Any:
        nonlocal count
        if armed and not done:
            count += 1
            if count == number:
                done.append(True)
                what()
        return real(link, packed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, "call", call)
        yield done


def test_a_queue_is_made_anew_with_fewer_shards(kit: Kit, make_kit: Any) -> None:
    """Who has published to the old one finds that out with its next message, which goes to a shard that somebody reads."""
    channel, other = (make_kit(kit.server, namespace=kit.namespace, eta_hold=59 - n).channel() for n in range(2))
    key = next(f"u{n}" for n in range(99) if shard_of(f"u{n}".encode(), 8) > 3)
    headers = {"headers": {"shard_key": key}}
    kit.queue(channel)
    publish(channel, "old", **headers)
    other.queue_delete("q")
    kit.queue(other, queue_arguments={"x-shards": 4})
    publish(other, "first", **headers)
    publish(channel, "new", **headers)
    publish(channel, "newer", **headers)
    inbox = Inbox(other, "q")
    for _ in range(3):
        inbox.take()[0].ack()
    assert inbox.bodies == ["first", "new", "newer"]
    assert not kit.keys("{kombu.q.1.[4-7]}:*")


def test_a_consumer_publishes_to_the_queue_that_was_deleted(kit: Kit, make_kit: Any) -> None:
    """It has read of the shards that others have made, which are none now."""
    headers = {"headers": {"shard_key": "u1"}}
    other = make_kit(kit.server, namespace=kit.namespace, eta_hold=59).channel()
    kit.queue(other)
    publish(other, "old", **headers)
    channel = kit.channel()
    inbox = Inbox(channel, "q")
    inbox.take()[0].ack()
    other.queue_delete("q")
    with pytest.raises(channel.connection.client.connection_errors):
        inbox.drain_all(10)
    publish(channel, "new", **headers)
    assert passive(channel, "q").message_count == 1


@pytest.mark.parametrize("how", ["delete", "expire"])
@pytest.mark.parametrize("key", [None, pytest.param("u1", marks=pytest.mark.slow)], ids=["plain", "keyed"])
def test_what_is_published_to_a_new_queue_outlives_the_removal_of_the_old(
    kit: Kit, make_kit: Any, how: str, key: str | None
) -> None:
    """Whoever removes it has to do several things, and between any two of them others may declare a queue of its name, publish
    to it, and have published to the old one all the time."""
    others = [make_kit(kit.server, namespace=kit.namespace, eta_hold=59 - n).channel() for n in range(2)]
    declarer, knows_it = others
    headers = {"headers": {"shard_key": key}} if key else {}
    number, went_on = 1, [True]
    while went_on:
        name = f"q{number}"
        remover = kit.channel()
        kit.queue(remover, name, **({"expires": 0.05} if how == "expire" else {}))
        knows_it.session.vhost.queue(name)
        for channel in (remover, knows_it):
            publish(channel, "old", to=name, **headers)
        if how == "expire":
            wait_until(lambda name=name: code_of(kit.connect(), name) == "404")
        connections, armed = remover.session.pool, []

        def run_and_arm(script: str, *args: Any, run: Any = connections.run, armed: list[bool] = armed) -> Any:
            answer = run(script, *args)
            if script == "unbind_queue" and answer:
                armed.append(True)
            return answer

        def meanwhile(name: str = name) -> None:
            kit.queue(declarer, name)
            for channel in (knows_it, declarer, knows_it):
                publish(channel, "new", to=name, **headers)

        with pytest.MonkeyPatch.context() as patch, step_in(number, meanwhile, armed) as went_on:
            patch.setattr(connections, "run", run_and_arm)
            if how == "delete":
                remover.queue_delete(name)
            else:
                remover.session.drop_expired(name)
        if went_on:
            inbox = Inbox(declarer, name)
            for _ in range(3):
                inbox.take()[0].ack()
            assert inbox.bodies == ["new"] * 3
            assert passive(declarer, name).message_count == 0
            number += 1
    assert number > 3


@pytest.mark.slow
@pytest.mark.parametrize("key", [None, "u1"], ids=["plain", "keyed"])
def test_a_queue_is_deleted_while_its_streams_are_made(kit: Kit, make_kit: Any, key: str | None) -> None:
    """Between any two steps of a first publish: whatever is published after the new declaration is in the new queue."""
    declarer = make_kit(kit.server, namespace=kit.namespace, eta_hold=59).channel()
    headers = {"headers": {"shard_key": key}} if key else {}
    number, went_on = 1, [True]
    while went_on:
        name = f"q{number}"
        kit.queue(declarer, name)
        publish(declarer, "old", to=name, **headers)
        publisher = kit.channel()

        def meanwhile(name: str = name) -> None:
            declarer.queue_delete(name)
            kit.queue(declarer, name)
            publish(declarer, "new", to=name, **headers)

        with step_in(number, meanwhile, [True]) as went_on:
            publish(publisher, "between", to=name, **headers)
        if went_on:
            publish(publisher, "after", to=name, **headers)
            inbox = Inbox(declarer, name)
            for _ in range(3):
                inbox.take()[0].ack()
            assert sorted(inbox.bodies) == ["after", "between", "new"]
            number += 1
    assert number > 3


def test_an_expired_queue_is_missing_at_once(kit: Kit) -> None:
    """Though nobody has declared anything since, which is when it is removed."""
    channel = kit.channel()
    kit.queue(channel, "short", expires=0.2)
    time.sleep(0.3)  # on purpose: it expires by the clock
    assert code_of(kit.connect(), "short") == "404"


@pytest.mark.parametrize("how", ["get", "consume", "declare", "consume without acknowledging"])
def test_an_expired_queue_hands_out_nothing(kit_all: Kit, how: str) -> None:
    """Also where nobody has looked for such queues since, and no process of its own lives."""
    channel = kit_all.channel()
    kit_all.queue(channel, "short", expires=0.3)
    publish(channel, 1, to="short")
    publish(channel, 2, to="short", headers={"shard_key": "u1"})
    time.sleep(0.5)  # on purpose: it expires by the clock
    taking = kit_all.channel()
    if how == "get":
        assert taking.basic_get("short") is None
        return
    if how == "declare":
        kit_all.queue(taking, "short", expires=60)
    inbox = Inbox(taking, "short", no_ack=how.endswith("acknowledging"))
    assert inbox.drain_all() == []
    kit_all.queue(taking, "short", expires=60)
    publish(channel, "new", to="short")
    assert inbox.take()[0].payload == "new"


def test_who_publishes_uses_a_queue(kit: Kit) -> None:
    """If it has declared it, as with kombu's redis transport."""
    channel = kit.channel()
    kit.queue(channel, "short", expires=1)
    until = time.monotonic() + 2
    count = 0
    while time.monotonic() < until:
        publish(channel, count, to="short")
        count += 1
        time.sleep(0.05)
    assert Inbox(kit.channel(), "short").drain_all() == list(range(count))


def test_a_consumed_queue_does_not_expire(kit: Kit) -> None:
    channel = kit.channel()
    kit.queue(channel, "short", expires=0.6)
    inbox = Inbox(channel, "short")
    ends = time.monotonic() + 2
    while time.monotonic() < ends:
        inbox.drain(0.1)
    assert code_of(kit.connect(), "short") is None
    publish(kit.channel(), 1, to="short")
    inbox.take()


def test_an_idle_consumers_queue_does_not_expire(kit: Kit) -> None:
    """The keeper sees to it, also while the consumer's process is busy with something else."""
    channel = kit.channel()
    kit.queue(channel, "short", expires=2)  # in less a keeper does not start on a busy machine
    Inbox(channel, "short")
    time.sleep(3.5)  # on purpose: nobody drains
    assert code_of(kit.connect(), "short") is None


@pytest.mark.parametrize("no_ack", [False, True])
def test_a_waiting_consumers_queue_does_not_expire(kit: Kit, no_ack: bool) -> None:
    channel = kit.channel()
    kit.queue(channel, "short", expires=1.5)
    inbox = Inbox(channel, "short", no_ack=no_ack)
    waiting = threading.Thread(target=inbox.drain, args=(3,))
    waiting.start()
    codes = set()
    while waiting.is_alive():
        codes.add(code_of(kit.connect(), "short"))
        time.sleep(0.1)
    waiting.join()
    assert codes == {None}


def test_declaring_again_puts_the_expiry_off(kit: Kit) -> None:
    channel = kit.channel()
    ends = time.monotonic() + 1.5
    while time.monotonic() < ends:
        kit.queue(channel, "short", expires=0.7)
        time.sleep(0.1)
    assert code_of(kit.connect(), "short") is None


# --- bindings ------------------------------------------------------------------------------------------------------------


def bound(channel: Any, exchange: Exchange, **keys: list[str]) -> None:
    for name, routing_keys in keys.items():
        for key in routing_keys:
            Queue(name, exchange, routing_key=key)(channel).declare()


def send(channel: Any, exchange: Exchange, *routing_keys: str) -> None:
    producer = Producer(channel, exchange=exchange)
    for key in routing_keys:
        producer.publish(key, routing_key=key)


def held(channel: Any, name: str) -> list[Any]:
    found = []
    while message := channel.basic_get(name, no_ack=True):
        found.append(message.payload)
    return found


def test_direct(kit: Kit) -> None:
    """Bound in one process' connection, published by another that declares nothing."""
    exchange = Exchange("d", type="direct")
    channel = kit.channel()
    bound(channel, exchange, a=["x", "y"], b=["y"])
    send(kit.channel(), exchange, "x", "y", "z")
    assert held(channel, "a") == ["x", "y"]
    assert held(channel, "b") == ["y"]


def test_topic(kit: Kit) -> None:
    exchange = Exchange("t", type="topic")
    channel = kit.channel()
    bound(channel, exchange, stars=["a.*.c"], hash=["a.#"], both=["a.*.c", "a.#"], none=["b"])
    send(channel, exchange, "a.b.c", "a", "a.b", "b.a.b.c")
    assert held(channel, "stars") == ["a.b.c"]
    assert sorted(held(channel, "hash")) == ["a", "a.b", "a.b.c"] or "a" not in held(channel, "hash")
    assert held(channel, "none") == []


def test_a_queue_bound_twice_gets_one_copy(kit: Kit) -> None:
    exchange = Exchange("t", type="topic")
    channel = kit.channel()
    bound(channel, exchange, both=["a.*.c", "a.#"])
    send(channel, exchange, "a.b.c")
    assert held(channel, "both") == ["a.b.c"]


def test_fanout_reaches_those_who_listen(kit: Kit) -> None:
    exchange = Exchange("f", type="fanout")
    one, two = kit.channel(), kit.channel()
    inboxes = []
    for name, channel in (("one", one), ("two", two)):
        queue = Queue(name, exchange)(channel)
        queue.declare()
        inboxes.append(Inbox(channel, queue, no_ack=True))
    send(kit.channel(), exchange, "x")
    for inbox in inboxes:
        inbox.take()
        assert inbox.bodies == ["x"]


def test_fanout_by_routing_key(kit: Kit) -> None:
    """As events are: the routing key of a fanout binding is a pattern."""
    exchange = Exchange("f", type="fanout")
    channel = kit.channel()
    queue = Queue("one", exchange, routing_key="worker.#")(channel)
    queue.declare()
    everything = Queue("two", exchange)(channel)
    everything.declare()
    inbox, all_of_it = Inbox(channel, queue, no_ack=True), Inbox(channel, everything, no_ack=True)
    send(kit.channel(), exchange, "task.sent", "worker.online")
    all_of_it.take(2 - len(all_of_it.messages))
    wait_until(lambda: inbox.drain(0.05) or len(inbox.messages) == 1)
    assert inbox.bodies == ["worker.online"]
    Producer(kit.channel(), exchange).publish("for all", routing_key="")
    for each, before in ((inbox, 1), (all_of_it, 2)):
        each.take(1)
        assert each.bodies[before:] == ["for all"], "what has no routing key, each hears once"


def test_a_slash_in_the_name_of_a_fanout_exchange_is_no_routing_key(kit: Kit) -> None:
    sender = kit.channel()
    inboxes = {}
    for name in ("x", "x/y", "x/y/z"):
        channel = kit.channel()
        queue = Queue(f"of {name}", Exchange(name, type="fanout"))(channel)
        queue.declare()
        inboxes[name] = Inbox(channel, queue, no_ack=True)
    for name in inboxes:
        for key in ("", "y", "y/z", "z"):
            Producer(sender, Exchange(name, type="fanout")).publish([name, key], routing_key=key)
    for name, inbox in inboxes.items():
        inbox.take(4)
        assert inbox.bodies == [[name, key] for key in ("", "y", "y/z", "z")]


def test_a_broadcast_queue_of_celery_is_heard_by_all(kit: Kit) -> None:
    """``apply_async(queue="broadcast")`` publishes to an exchange that its process has not declared, with a routing key."""
    inboxes = []
    for _ in range(2):
        channel = kit.channel()
        queue = Broadcast("broadcast")(channel)
        queue.declare()
        inboxes.append(Inbox(channel, queue))
    for inbox in inboxes:
        inbox.drain_all(0.1)
    direct = Queue("of direct", Exchange("direct"), routing_key="k")(kit.channel())
    direct.declare()
    app = Celery(broker=kit.url, set_as_current=False)
    app.conf.update(broker_transport_options=kit.options, task_queues=[Queue("celery"), Broadcast("broadcast")])
    for n in range(3):
        app.send_task("some.task", (n,), queue="broadcast")
    Producer(kit.channel()).publish("else", exchange="direct", routing_key="k")
    for inbox in inboxes:
        inbox.take(3)
        assert [body[0] for body in inbox.bodies] == [[n] for n in range(3)]
    assert direct.get().payload == "else"
    assert [key for key in kit.keys("{kombu.bcast*") if key.endswith(":stream")] == []
    app.close()


def test_a_channel_has_no_client(kit: Kit) -> None:
    channel = kit.channel()
    with pytest.raises(AttributeError, match=r"queue_declare\(queue, passive=True\)"):
        channel.client.llen("celery")
    assert not hasattr(channel, "client")


@pytest.mark.parametrize("kind", ["direct", "topic", "fanout"])
def test_names_with_the_bytes_that_separate(kit: Kit, kind: str) -> None:
    channel, other = kit.channel(), kit.channel()
    name = "\x06\x16a\x06\x15\x06\x06\x16"
    queues = [Queue(f"{n}{name}", Exchange(name, type=kind), routing_key=f"{n}{name}")(channel) for n in range(2)]
    for queue in queues:
        queue.declare()
    assert sorted((row[0], row[2]) for row in other.get_table(name)) == [(f"{n}{name}",) * 2 for n in range(2)]
    if kind != "fanout":
        Producer(channel).publish("x", exchange=name, routing_key=f"1{name}")
        assert queues[1].get().payload == "x"
        assert queues[0].get() is None
    queues[0].unbind_from(Exchange(name, type=kind), routing_key=f"0{name}")
    assert [row[2] for row in other.get_table(name)] == [f"1{name}"]
    queues[1].delete()
    assert other.get_table(name) == []
    kit.client().sadd(f"{kit.namespace}:{{kombu}}:bindings:junk", "a", b"\xff\x06\x16b")
    assert other.get_table("junk") == []


def test_fanout_keeps_databases_apart(kit: Kit) -> None:
    exchange = Exchange("f", type="fanout")
    channel = kit.channel()
    queue = Queue("one", exchange)(channel)
    queue.declare()
    inbox = Inbox(channel, queue, no_ack=True)
    other = kit.connect(kit.url[:-1] + "3")
    send(other.channel(), exchange, "elsewhere")
    send(kit.channel(), exchange, "here")
    inbox.take()
    assert inbox.drain_all() == ["here"]


def test_fanout_acks_are_harmless(kit: Kit) -> None:
    exchange = Exchange("f", type="fanout")
    channel = kit.channel()
    queue = Queue("one", exchange)(channel)
    queue.declare()
    inbox = Inbox(channel, queue)
    send(kit.channel(), exchange, "x", "y")
    first, second = inbox.take(2)
    first.ack()
    second.reject(requeue=False)
    assert not inbox.drain(0.1)


@pytest.mark.parametrize("restart", [False, True], ids=["flushed", "restarted"])
def test_bindings_survive(own_server: RedisServer, make_kit: Any, restart: bool) -> None:
    """After FLUSHALL the process that has declared the bindings still routes; a restart loses none."""
    kit = make_kit(own_server)
    exchange = Exchange("d", type="direct")
    connection = kit.connect()
    channel = connection.channel()
    bound(channel, exchange, a=["x"])
    send(channel, exchange, "x")
    if restart:
        own_server.restart()
    else:
        kit.client().flushall()
    producer = connection.Producer(exchange=exchange)
    producer.publish("again", routing_key="x", retry=True, retry_policy={"max_retries": 5, "interval_start": 0.1})
    found = held(kit.channel(), "a")
    assert found == (["x", "again"] if restart else ["again"])


def test_unbind(kit: Kit) -> None:
    exchange = Exchange("d", type="direct")
    channel = kit.channel()
    bound(channel, exchange, a=["x", "y"])
    Queue("a", channel=channel).unbind_from(exchange, routing_key="x")
    elsewhere = kit.channel()
    send(elsewhere, exchange, "x", "y")
    send(channel, exchange, "x", "y")
    assert held(channel, "a") == ["y", "y"]


def test_unbind_topic_by_another(kit: Kit) -> None:
    exchange = Exchange("t", type="topic")
    channel, elsewhere = kit.channel(), kit.channel()
    bound(channel, exchange, a=["x.*", "y.#"])
    exchange(elsewhere).declare()
    Queue("a", channel=elsewhere).unbind_from(exchange, routing_key="x.*")
    send(elsewhere, exchange, "x.1", "y.1")
    assert held(channel, "a") == ["y.1"]


def test_deleting_an_exchange_removes_its_bindings(kit: Kit) -> None:
    exchange = Exchange("d", type="direct")
    channel = kit.channel()
    bound(channel, exchange, a=["x"], b=["x"])
    exchange(channel).delete()
    elsewhere = kit.channel()
    exchange(elsewhere).declare()
    send(elsewhere, exchange, "x")
    assert held(channel, "a") == []
    assert held(channel, "b") == []


def test_deleting_a_queue_removes_its_bindings(kit: Kit) -> None:
    """Also for those who have bound it themselves: a message to it by its exchange is dropped, and makes no queue."""
    exchange = Exchange("d", type="direct")
    channel, elsewhere = kit.channel(), kit.channel()
    bound(channel, exchange, a=["x"], b=["x"])
    bound(elsewhere, exchange, a=["x"], b=["x"])
    Queue("a", channel=channel).delete()
    send(channel, exchange, "x")
    send(elsewhere, exchange, "x")
    assert code_of(kit.connect(), "a") == "404"
    assert held(channel, "b") == ["x", "x"]
    assert kit.keys("{kombu.a*") == []


def test_the_last_queue_of_an_exchange_deleted_by_another(kit: Kit) -> None:
    """A reply queue that its client has deleted: who still knows the binding from before does not bring it back."""
    exchange = Exchange("reply", type="direct")
    channel, elsewhere = kit.channel(), kit.channel()
    bound(channel, exchange, a=["x"])
    bound(elsewhere, exchange, a=["x"])
    Queue("a", channel=elsewhere).delete()
    send(channel, exchange, "x")
    assert code_of(kit.connect(), "a") == "404"
    assert kit.keys("{kombu.a*") == []


def test_a_message_for_nobody_is_dropped(kit: Kit) -> None:
    exchange = Exchange("d", type="direct")
    channel = kit.channel()
    exchange(channel).declare()
    send(channel, exchange, "nobody")
    assert kit.keys("{kombu.nobody*") == []


def test_special_names(kit: Kit) -> None:
    """Names with whatever characters stay apart."""
    names = ["a.b", "a:b", "a b", "{a}", "ä", "a/b", "a*", "a?", "celery@host.celery.pidbox"]
    channel = kit.channel()
    for name in names:
        exchange = Exchange(f"x{name}", type="direct")
        bound(channel, exchange, **{name: [name]})
        send(channel, exchange, name)
    for name in names:
        assert held(channel, name) == [name]
