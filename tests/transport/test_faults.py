"""Junk, lost replies, flushes, restarts: what must not lose a message or stop a consumer."""

from __future__ import annotations

import bz2
import contextlib
import functools
import importlib
import lzma
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from kombu.compression import _decoders as known_here

from streamtask.errors import ReplyError, StreamTaskError
from streamtask.queue.producer import new_id
from streamtask.redis import wire
from streamtask.redis.scripts import script
from tests.fix_proxy import Proxy
from tests.fix_redis import RedisServer
from tests.helpers import wait_until
from tests.transport.kit import Inbox, Kit, publish

SCRIPTS = ["fetch", "settle", "settle_kept", "join_shared", "requeue"]


@pytest.fixture
def cut(make_kit: Any, redis_server: RedisServer, proxy: Callable[[RedisServer], Proxy]) -> tuple[Kit, Proxy, Kit]:
    """A kit through a proxy, the proxy, and a kit that looks at the same without it."""
    between = proxy(redis_server)
    direct: Kit = make_kit(redis_server)
    client = direct.client()
    for name in SCRIPTS:
        client.script_load(
            script(name).source
        )  # a call that the server does not know has done nothing when its reply is lost
    return make_kit(between, namespace=direct.namespace), between, direct


def consume(kit: Kit, count: int, *, prefetch: int = 3, timeout: float = 20) -> list[Any]:
    """Consumes and acknowledges so many; begins again with a new channel after an error, as a worker does."""
    connection = kit.connect()
    done: list[Any] = []
    ends = time.monotonic() + timeout
    while len(done) < count and time.monotonic() < ends:
        try:
            inbox = Inbox(connection.channel(), "q", prefetch=prefetch)
            while len(done) < count and time.monotonic() < ends:
                inbox.drain(0.2)
                while inbox.messages:
                    message = inbox.messages.pop(0)
                    done.append(message.payload)
                    message.ack()
        except connection.connection_errors:
            connection.collect()
            connection.ensure_connection(interval_start=0.05, interval_max=0.1)
    connection.release()
    return done


# --- junk ----------------------------------------------------------------------------------------------------------------


def of_kombu(body: Any, compression: Any = None, *more: Any) -> dict[bytes, bytes]:
    """A message of kombu's with such a body."""
    parts = [body, "text/plain", "utf-8", {"compression": compression}, {}, *more]
    return {wire.MSGPACK: msgpack.packb(["task", None, new_id(), parts, {}, None])}


ZEROS = bytes(200 << 20)
COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "application/x-gzip": zlib.compress,
    "bzip2": bz2.compress,
    "application/x-lzma": functools.partial(lzma.compress, preset=0),
}
if (
    "application/x-brotli" in known_here
):  # these two kombu has where their packages are installed, as the extra "test" does
    COMPRESSED["brotli"] = functools.partial(importlib.import_module("brotli").compress, quality=1)
if "application/zstd" in known_here:
    COMPRESSED["application/zstd"] = importlib.import_module(
        "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    ).compress
JUNK: dict[str, dict[bytes, bytes]] = {
    **{f"a bomb of {name}": of_kombu(compress(ZEROS), name) for name, compress in COMPRESSED.items()},
    "the second is a bomb": of_kombu(bz2.compress(b"x") + bz2.compress(ZEROS), "bzip2"),
    "cut off": of_kombu(zlib.compress(b"x" * 1000)[:-5], "zlib"),
    "no bytes to decompress": of_kombu([1], "zlib"),
    "sets in sets": of_kombu(
        functools.reduce(lambda inner, _: [msgpack.ExtType(7, msgpack.packb(inner))], range(250), [])
    ),
    "a lone surrogate": {
        wire.MSGPACK: wire.encode("t", None, new_id(), ['["b", "text/plain", "utf-8", {"id": "\\ud800"}, {}]'], {})
    },
    "fields": {b"some": b"junk"},
    "no msgpack": {wire.MSGPACK: b"\xc1\xff"},
    "empty": {wire.MSGPACK: b""},
    "no message": {wire.MSGPACK: wire.encode("task", None, new_id(), [1, 2], {})},
    "a task of ours": {wire.MSGPACK: wire.encode("task", None, new_id(), [], {"a": 1})},
    "one argument": {wire.MSGPACK: wire.encode("task", None, new_id(), ["no json"], {})},
    "no headers": {wire.MSGPACK: wire.encode("task", None, new_id(), [1, 2, 3, 4, 5], {})},
    "empty properties": {wire.MSGPACK: wire.encode("task", None, new_id(), ["b", "text/plain", "utf-8", {}, {}], {})},
}


def stream_of(kit: Kit, key: str | None) -> str:
    if key is None:
        (stream,) = kit.keys("{kombu.q.*.shared}:stream")
        return stream
    filled = [name for name in kit.keys("{kombu.q.*.[0-9]}:stream") if kit.client().xlen(name)]
    return filled[0]


@pytest.mark.parametrize("kind", list(JUNK))
@pytest.mark.parametrize("key", [None, "u1"], ids=["plain", "keyed"])
def test_junk_in_a_stream(kit: Kit, kind: str, key: str | None) -> None:
    """It goes to the dead letters, whole, and the others are delivered."""
    channel = kit.channel()
    kit.queue(channel)
    headers = {"headers": {"shard_key": key}} if key else {}
    publish(channel, "before", **headers)
    entry: Any = JUNK[kind]
    kit.client().xadd(stream_of(kit, key), entry)
    publish(channel, "after", **headers)
    inbox = Inbox(kit.channel(), "q", prefetch=1)
    inbox.take()[0].ack()
    inbox.take()
    if kind == "empty properties":  # a message, if an odd one
        inbox.messages[-1].ack()
        inbox.take()
    inbox.messages[-1].ack()
    assert [inbox.bodies[0], inbox.bodies[-1]] == ["before", "after"]
    wait_until(lambda: kit.pending() == 0 or inbox.drain(0.05))
    assert kit.dead() == (kind != "empty properties")


ODD: dict[str, Any] = {
    "no delivery_info": ["b", "text/plain", "utf-8", {}, {"delivery_info": None}],
    "expiration": ['["b", "text/plain", "utf-8", {}, {"expiration": 1' + "0" * 400 + "}]"],
}


@pytest.mark.parametrize("kind", list(ODD))
@pytest.mark.parametrize("key", [None, "u1"], ids=["plain", "keyed"])
def test_an_odd_message_of_a_foreign_producer_may_come_again(kit: Kit, kind: str, key: str | None) -> None:
    """What no producer of ours writes stops nobody: it is delivered, also again, and so is what lies behind it."""
    channel = kit.channel()
    kit.queue(channel)
    headers = {"headers": {"shard_key": key}} if key else {}
    publish(channel, "before", **headers)
    envelope = wire.encode("task", key and b"s" + key.encode(), new_id(), ODD[kind], {})
    kit.client().xadd(stream_of(kit, key), {wire.MSGPACK: envelope})
    publish(channel, "after", **headers)
    first = Inbox(kit.channel(), "q", prefetch=1)
    first.take()[0].ack()
    first.take()
    first.channel.close()
    inbox = Inbox(kit.channel(), "q", prefetch=1)
    for _ in range(2):
        inbox.take()[0].ack()
    assert sorted(inbox.bodies) == ["after", "b"]


@pytest.mark.parametrize("compression", ["zlib", *COMPRESSED])
def test_compressed_messages_are_delivered(kit: Kit, compression: str) -> None:
    """Small ones, and such as many pieces are made of."""
    channel = kit.channel()
    kit.queue(channel)
    bodies = ["x", "x" * 5_000_000, "".join(map(str, range(300_000)))]
    for body in bodies:
        publish(channel, body, compression=compression)
    inbox = Inbox(kit.channel(), "q")
    inbox.take(len(bodies))
    assert inbox.bodies == bodies


@pytest.mark.parametrize("full", [False, True], ids=["", "full"])
@pytest.mark.parametrize("how", ["get", "no_ack get", "no_ack", "consume"])
def test_junk_in_other_ways_of_taking(kit: Kit, redis_server: RedisServer, how: str, full: bool) -> None:
    """Also where Redis is full."""
    channel = kit.channel()
    queue = kit.queue(channel)
    publish(channel, "before")
    for kind in ("fields", "no message", "no headers"):
        entry: Any = JUNK[kind]
        kit.client().xadd(stream_of(kit, None), entry)
    publish(channel, "after")
    if full:
        used = kit.client().info("memory")["used_memory"]
        redis_server.config_set(maxmemory_policy="noeviction", maxmemory=used // 2)
    got: list[Any] = []
    if how in ("no_ack", "consume"):
        inbox = Inbox(kit.channel(), "q", no_ack=how == "no_ack")
        inbox.take(2)
        for message in inbox.messages:
            how == "consume" and message.ack()
        got = inbox.bodies
    else:

        def take() -> bool:
            message = queue.get(no_ack=how == "no_ack get")
            if message is not None:
                got.append(message.payload)
                how == "get" and message.ack()
            return len(got) == 2

        wait_until(take)
    assert got == ["before", "after"]
    assert kit.dead() == 3


def test_junk_on_a_fanout_exchange(kit: Kit) -> None:
    from kombu import Exchange, Producer, Queue

    exchange = Exchange("f", type="fanout")
    channel = kit.channel()
    queue = Queue("one", exchange)(channel)
    queue.declare()
    inbox = Inbox(channel, queue, no_ack=True)
    assert kit.client().execute_command("PUBSUB", "NUMPAT") == 2
    name = f"{kit.namespace}:{{kombu}}:fanout:0:f"
    for junk in (b"junk", b"", wire.encode("task", None, new_id(), [1, 2], {}), JUNK["no headers"][wire.MSGPACK]):
        kit.client().publish(name, junk)
    Producer(kit.channel(), exchange).publish("x")
    inbox.take()
    assert inbox.bodies == ["x"]


# --- lost replies --------------------------------------------------------------------------------------------------------


def of(name: str) -> bytes:
    sha = script(name).sha
    return sha if isinstance(sha, bytes) else sha.encode()


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("when", ["reply", "request"])
def test_lost(cut: tuple[Kit, Proxy, Kit], name: str, when: str) -> None:
    """A reply or a request of each script is lost several times: all messages come, those acknowledged once."""
    kit, proxy, direct = cut
    channel = direct.channel()
    direct.queue(channel)
    publish(channel, *range(20))
    for n in range(10):
        for m in range(3):
            publish(channel, 100 + 10 * n + m, headers={"shard_key": f"u{n}"})
    connection = kit.connect()
    lose = proxy.cut_after_request if when == "reply" else proxy.cut_before_request
    lose(of(name), times=1)
    done: list[Any] = []
    ends, lost = time.monotonic() + 25, 1
    while len(set(done)) < 50 and time.monotonic() < ends:
        try:
            inbox = Inbox(connection.channel(), "q", prefetch=4)
            while len(set(done)) < 50 and time.monotonic() < ends:
                inbox.drain(0.2)
                while inbox.messages:
                    message = inbox.messages.pop(0)
                    if name == "requeue" and not message.delivery_info.get("redelivered") and message.payload % 7 == 0:
                        message.requeue()
                        continue
                    done.append(message.payload)
                    message.ack()
                if proxy.cuts == lost and lost < 4:
                    lose(of(name), times=1)
                    lost += 1
        except connection.connection_errors:
            connection.collect()
            connection.ensure_connection(interval_start=0.05, interval_max=0.1)
    assert sorted(set(done)) == sorted({*range(20), *(100 + 10 * n + m for n in range(10) for m in range(3))})
    proxy.clear_rules()
    connection.release()
    wait_until(lambda: direct.pending() == 0)
    for n in range(10):
        first = list(dict.fromkeys(d for d in done if d // 10 == 10 + n))
        assert first == [100 + 10 * n + m for m in range(3)]
    if name not in ("join_shared", "requeue") or when == "reply":
        assert proxy.cuts or name in ("settle", "requeue", "settle_kept")


def test_lost_reply_of_a_get(cut: tuple[Kit, Proxy, Kit]) -> None:
    kit, proxy, direct = cut
    channel = direct.channel()
    direct.queue(channel)
    publish(channel, 1)
    connection = kit.connect()
    getting = connection.channel()
    assert getting.basic_get("q").payload == 1
    publish(channel, 2)
    proxy.cut_after_request(of("fetch"))
    try:
        message = getting.basic_get("q")
    except connection.connection_errors:
        message = None
    message = message or getting.basic_get("q") or connection.channel().basic_get("q")
    assert proxy.cuts == 1
    assert message.payload == 2


def test_the_reply_of_a_giving_back_is_lost_each_time(cut: tuple[Kit, Proxy, Kit]) -> None:
    """The messages were on offer already, and may be here again before it is repeated: each comes once more, not twice."""
    kit, proxy, direct = cut
    channel = direct.channel()
    direct.queue(channel)
    publish(channel, *range(3))
    connection = kit.connect()
    inbox = Inbox(connection.channel(), "q")
    while len(inbox.messages) < 3:
        inbox.drain(1)
    proxy.cut_after_request(of("requeue"), times=4)
    messages, inbox.messages = inbox.messages, []
    for message in messages[:2]:
        message.requeue()  # what is lost is written later
    ends = time.monotonic() + 10
    while len(inbox.messages) < 2 and time.monotonic() < ends:
        with contextlib.suppress(*connection.connection_errors):
            inbox.drain(0.1)
    for _ in range(3):
        inbox.drain(0.1)
    assert [message.payload for message in inbox.messages] == [0, 1]
    while inbox.messages:
        inbox.messages.pop().ack()
    for _ in range(3):
        inbox.drain(0.1)
    assert inbox.messages == []
    assert proxy.cuts == 4


def test_a_crash_is_counted_before_its_message_is_on_offer(cut: tuple[Kit, Proxy, Kit]) -> None:
    """Whoever takes it next has to know how often it has taken its process down."""
    kit, proxy, direct = cut
    channel = direct.channel()
    direct.queue(channel)
    publish(channel, 1)
    connection = kit.connect()
    inbox = Inbox(connection.channel(), "q")
    message = inbox.take()[0]
    assert not message.channel.charge(message.delivery_tag)
    direct.client().script_load(script("note").source)
    proxy.cut_before_request(of("note"), times=2)
    message.requeue()
    assert proxy.cuts == 2
    assert direct.keys("*:requeued:*") == []
    inbox.messages.clear()
    ends = time.monotonic() + 10
    while not inbox.messages and time.monotonic() < ends:
        with contextlib.suppress(*connection.connection_errors):
            inbox.drain(0.1)
    assert inbox.messages[0].payload == 1
    (notes,) = direct.keys("*:notes:*")
    assert [text.split()[2] for text in direct.client().hvals(notes)] == [b"1"]


# --- flushes and restarts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "keyed", "low"])
def test_flushed_under_a_consumer(kit_all: Kit, kind: str) -> None:
    """FLUSHALL: what was there is gone; new messages come, in the end also to who was waiting all the time."""
    options = {"keyed": {"headers": {"shard_key": "u1"}}, "low": {"priority": 9}}.get(kind, {})
    channel = kit_all.channel()
    kit_all.queue(channel)
    connection = kit_all.connect()
    publish(channel, "before", **options)
    inbox = Inbox(connection.channel(), "q", prefetch=5)
    inbox.take()
    kit_all.client().flushall()
    kit_all.client().script_flush()
    publish(channel, "after", "more", **options)
    ends = time.monotonic() + 20
    bodies: list[Any] = []
    while "more" not in bodies and time.monotonic() < ends:
        try:
            inbox.drain(0.2)
        except connection.connection_errors:
            connection.collect()
            inbox = Inbox(connection.channel(), "q", prefetch=5)
        bodies += [message.payload for message in inbox.messages]
        while inbox.messages:
            inbox.messages.pop().ack()
    assert bodies[-2:] == ["after", "more"]


@pytest.mark.parametrize("refused", ["shared", "shard"])
def test_what_is_read_beside_a_refusal_is_delivered(kit: Kit, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    """One call reads all streams of a queue. Whatever the answer for one of them is, what was read of another is its owner's,
    before anything later of its keys."""
    channel = kit.channel()
    kit.queue(channel)
    keys = [f"u{n}" for n in range(8)]
    inbox = Inbox(kit.channel(), "q", prefetch=0)
    for key in keys:
        publish(channel, f"{key} 0", headers={"shard_key": key})
    for message in inbox.take(len(keys)):
        message.ack()
    session = inbox.channel.session
    consumed = session.consumed["q"]
    (shared,) = consumed.streams.values()
    # The messages and the refusal come between two calls: the next one meets both.
    with session.lock:
        for number in (1, 2):
            for key in keys:
                publish(channel, f"{key} {number}", headers={"shard_key": key})
        if refused == "shared":
            kit.client().delete(shared.lease.key)
        else:
            pipeline = session.links.pipeline

            def refuses_one(calls: list[tuple[str, bytes]]) -> list[Any]:
                replies: list[Any] = pipeline(calls)
                if any(isinstance(reply, list) and len(reply) == 2 and reply[1][5] for reply in replies[1:]):
                    monkeypatch.undo()
                    replies[-1] = ReplyError("ERR something that has no name")
                return replies

            monkeypatch.setattr(session.links, "pipeline", refuses_one)
        for consumer in consumed.shards.values():
            consumer.read_at = 0.0
        consumed.notified, consumed.look_at = True, 0.0

    def drained() -> bool:
        with contextlib.suppress(StreamTaskError):
            inbox.drain(0.1)
        for message in inbox.messages:
            if not message.acknowledged:
                message.ack()
        return len(inbox.bodies) >= 3 * len(keys)

    wait_until(drained, 20, lambda: str(inbox.bodies), poll=0)
    for key in keys:
        assert [body for body in inbox.bodies if body.startswith(f"{key} ")] == [f"{key} {n}" for n in range(3)]


def test_scripts_are_flushed(kit_all: Kit) -> None:
    channel = kit_all.channel()
    kit_all.queue(channel)
    inbox = Inbox(kit_all.channel(), "q")
    for n in range(3):
        kit_all.client().script_flush()
        publish(channel, n)
        publish(channel, n, headers={"shard_key": "u1"})
        for _ in range(2):
            inbox.take()[0].ack()


def test_a_queue_is_deleted_by_another_process(kit: Kit) -> None:
    """As ``celery purge`` or an operator may: its consumer goes on when it is declared again."""
    channel = kit.channel()
    kit.queue(channel)
    inbox = Inbox(kit.channel(), "q")
    inbox.drain(0.1)
    other = kit.connect(transport_options={"eta_hold": 59}).channel()
    other.queue_delete("q")
    kit.queue(other)
    publish(other, 1)
    ends = time.monotonic() + 15
    while not inbox.messages and time.monotonic() < ends:
        try:
            inbox.drain(0.2)
        except inbox.connection.connection_errors:
            connection = inbox.connection
            connection.collect()
            inbox = Inbox(connection.channel(), "q")
    assert inbox.bodies == [1]


def test_a_lost_queue_costs_no_other_one_its_messages(kit: Kit) -> None:
    """One of two queues is deleted by another process: what was delivered from the other one stays, and its end counts."""
    channel = kit.channel()
    for name in ("q", "kept"):
        kit.queue(channel, name)
    publish(channel, 1, to="kept")
    inbox = Inbox(kit.channel(), "q", "kept", prefetch=5)
    message = inbox.take()[0]
    kit.connect(transport_options={"eta_hold": 59}).channel().queue_delete("q")
    errors = inbox.connection.connection_errors
    with pytest.raises(errors):
        inbox.drain_all(10)
    with contextlib.suppress(*errors):
        inbox.drain_all()
    message.ack()
    inbox.drain_all()
    assert inbox.bodies == [1]
    assert kit.pending("kept") == 0


def test_redis_comes_back_empty_while_a_keyed_body_runs(kit: Kit, make_kit: Any) -> None:
    """Its shard is gone, and nothing in it can be looked up: that stops nothing else of the worker."""
    other = make_kit(kit.server, namespace=kit.namespace, eta_hold=59).channel()
    kit.queue(other)
    publish(other, "before", headers={"shard_key": "u1"})
    connection = kit.connect()
    inbox = Inbox(connection.channel(), "q", prefetch=5)
    message = inbox.take()[0]
    session = inbox.channel.session
    session.deliveries.start(message.delivery_tag, True, False)
    (shard,) = (shard for shard in session.consumed["q"].shards.values() if shard.backlog.handed)
    kit.client().flushall()
    wait_until(lambda: kit.client().exists(shard.lease.key))  # its keeper goes on
    session.look()  # a new connection
    publish(make_kit(kit.server, namespace=kit.namespace, eta_hold=58).channel(), "after")
    lost = 0
    while inbox.bodies != ["after"] and lost < 5:
        try:
            inbox.take()
        except connection.connection_errors:
            lost += 1
            connection.collect()
            inbox = Inbox(connection.channel(), "q", prefetch=5)
    assert lost < 5


@pytest.mark.parametrize("kill", [False, True], ids=["clean", "killed"])
def test_the_server_restarts_under_a_consumer(own_server: RedisServer, make_kit: Any, kill: bool) -> None:
    kit = make_kit(own_server)
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, *range(10))
    connection = kit.connect()
    inbox = Inbox(connection.channel(), "q", prefetch=4)
    held = inbox.take(4)
    held[0].ack()
    own_server.restart(kill=kill)
    with contextlib.suppress(*connection.connection_errors):
        for _ in range(10):
            inbox.drain(0.2)
    for message in held[1:]:
        message.ack()  # late or not: nothing may break
    connection.collect()
    rest = consume(kit, 6)
    assert set(rest) >= set(range(4, 10)) - set(inbox.bodies[4:])
    wait_until(lambda: kit.pending() == 0)


@pytest.mark.slow
def test_nobody_answers_a_waiting_drain(cut: tuple[Kit, Proxy, Kit]) -> None:
    kit, proxy, direct = cut
    channel = direct.channel()
    direct.queue(channel)
    connection = kit.connect(transport_options={"socket_timeout": 0.5})
    inbox = Inbox(connection.channel(), "q")
    inbox.drain(0.2)
    proxy.blackhole()
    began = time.monotonic()
    with pytest.raises(connection.connection_errors):
        connection.drain_events(timeout=30)
    assert time.monotonic() - began < 15
    proxy.blackhole(on=False)
    publish(channel, 1)
    connection.collect()
    assert consume(kit, 1) == [1]


def test_a_short_outage_costs_no_lease(cut: tuple[Kit, Proxy, Kit]) -> None:
    """Connections are cut and come back within the lease: what is held stays held, and its ack counts."""
    kit, proxy, direct = cut
    channel = direct.channel()
    direct.queue(channel)
    publish(channel, *range(3))
    connection = kit.connect()
    inbox = Inbox(connection.channel(), "q", prefetch=1)
    message = inbox.take()[0]
    proxy.cut()
    message.ack()
    rest = consume(kit, 2)
    assert rest == [1, 2]
    wait_until(lambda: direct.pending() == 0, 5)
