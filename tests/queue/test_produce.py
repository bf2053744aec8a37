"""Produce calls against real servers: stored once, in order, refused loudly; whatever is cut, flushed or full."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import socketserver
import sys
import textwrap
import threading
import time
import uuid

import pytest

from streamtask import StreamTask
from streamtask.errors import (
    AccessRefused,
    BrokerOutOfMemory,
    BrokerUnavailable,
    BulkSendError,
    ConfigError,
    EncodeError,
    MessageTooLarge,
    QueueFull,
    ReplyError,
    ShardCountMismatch,
    UnsupportedServer,
)
from streamtask.queue.calls import Call, ProducerSettings, Target
from streamtask.redis import wire
from streamtask.redis.scripts import Code
from streamtask.sharding import canonical, shard_of
from tests.fix_redis import RedisServer, server_binaries
from tests.helpers import Starved, free_port, spawn, wait_until

SECRET = "hunter2"


def make_app(where, *, name="t", **options):
    """An app with two tasks: ``keyed`` by ``user``, and ``plain``; ``where`` is a server, a proxy or a URL."""
    app = StreamTask(name, broker=where if isinstance(where, str) else where.url, **options)

    @app.task(name="keyed", shard_key="user")
    def keyed(user, n=0):
        pass

    @app.task(name="plain")
    def plain(n=0):
        pass

    return app


@pytest.fixture
def make():
    apps = []

    def one(where, **options):
        apps.append(make_app(where, **options))
        return apps[-1]

    yield one
    for app in apps:
        app.close()


def messages(client, pattern="*:stream"):
    """Every stored message as {stream: [envelope, ...]}."""
    found = {}
    for key in sorted(client.scan_iter(match=pattern, count=1000)):
        found[key.decode()] = [
            wire.decode([part for pair in fields.items() for part in pair]) for _, fields in client.xrange(key)
        ]
    return found


def numbers(client):
    """The argument ``n`` of every stored message, stream by stream in order."""
    return [m[4]["n"] for envelopes in messages(client).values() for m in envelopes]


def delayed_count(client):
    return sum(client.zcard(key) for key in client.scan_iter(match="*:delayed", count=1000))


def evalsha_calls(client):
    return client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"]


# What an answer means


@pytest.mark.parametrize(
    "answer, ours, stored, refusal",
    [
        (b"1-0", False, 1, None),
        (1, False, 1, None),
        (250, False, 250, None),
        (0, False, 0, Code.STORED_ALREADY),
        (0, True, 1, None),
        ([0, 3], False, 0, Code.STORED_ALREADY),
        ([0, 3], True, 3, None),
        ([-5, b"8 1:7"], True, 0, Code.SEEN_LAYOUT),
        *(
            (int(code), ours, 0, code)
            for code in sorted(Code)[:-2]
            if code != Code.SEEN_LAYOUT
            for ours in (False, True)
        ),
    ],
)
def test_one_function_reads_what_any_produce_script_answers(redis_server, make, answer, ours, stored, refusal):
    app = make(redis_server)
    target = app.sender.producer.target(app.queue("default"), 0)

    assert target.read(answer, ours) == (stored, refusal)
    assert target.layout == ("8 1:7" if refusal is Code.SEEN_LAYOUT else "")


@pytest.mark.parametrize("answer", [Code.LEASE_LOST.value, -99, None, "1-0", [], [1, 2, 3], 1.0])
def test_what_no_produce_script_answers_is_said(redis_server, make, answer):
    app = make(redis_server)
    target = app.sender.producer.target(app.queue("default"), 0)

    with pytest.raises(ReplyError, match="unexpected answer of a produce script"):
        target.read(answer, False)
    with pytest.raises(BrokerOutOfMemory, match="full"):
        target.read(BrokerOutOfMemory("full"), True)


def test_of_calls_in_one_write_each_goes_on_by_its_own_answer(redis_server, make, monkeypatch):
    """One is stored; one was refused for want of memory; one's shard has no state, which is mended."""
    app = make(redis_server)
    queue, producer = app.queue("default"), app.sender.producer
    calls = [Call(queue, 0, wire.encode("keyed", b"1", b"%016d" % n, (1,), {"n": n})) for n in range(3)]
    answers = [b"1-0", BrokerOutOfMemory("full"), Code.NO_STATE.value]
    monkeypatch.setattr(producer, "exchange", lambda key, packed, until: answers)

    producer.send_together(calls)

    assert numbers(redis_server.client()) == [1, 2]
    assert [call.sent_at for call in calls] == [None] * 3, "none is in doubt"


def keys_of_shards(shards, count=1):
    """``count`` shard keys for each shard."""
    found = {shard: [] for shard in range(shards)}
    user = 0
    while any(len(keys) < count for keys in found.values()):
        keys = found[shard_of(canonical(user), shards)]
        if len(keys) < count:
            keys.append(user)
        user += 1
    return found


# --- stored and readable -----------------------------------------------------------------------------------------


def test_what_is_sent_is_stored_in_the_keys_shard_and_can_be_decoded(redis_server_all, make):
    app = make(redis_server_all)
    client = redis_server_all.client()

    result = app.tasks["keyed"].delay(user=42, n=1)

    found = messages(client)
    assert {stream: len(m) for stream, m in found.items() if m} == {"streamtask:{t.default.0.0}:stream": 1}
    task, key, message_id, args, kwargs, headers = found["streamtask:{t.default.0.0}:stream"][0]
    assert (task, key, args, kwargs, headers) == ("keyed", b"42", [], {"user": 42, "n": 1}, None)
    assert str(uuid.UUID(bytes=message_id)) == result.id
    assert result.stored is True


def test_a_message_without_a_shard_key_goes_to_the_shared_stream(redis_server_all, make):
    app = make(redis_server_all)
    client = redis_server_all.client()

    app.tasks["plain"].delay(7)

    found = messages(client, "*shared*:stream")
    assert [m[:2] + m[3:5] for m in found["streamtask:{t.default.0.shared}:stream"]] == [["plain", None, [7], {}]]


def test_calls_of_one_key_are_stored_in_the_order_in_which_they_returned(redis_server_all, make):
    app = make(redis_server_all)
    client = redis_server_all.client()

    for n in range(200):
        app.tasks["keyed"].delay(user=1, n=n)

    assert numbers(client) == list(range(200))


def test_a_delayed_message_is_not_in_the_stream_and_keeps_its_due_time(redis_server_all, make):
    app = make(redis_server_all)
    client = redis_server_all.client()
    seconds, micros = client.time()
    before = seconds * 1000 + micros // 1000

    app.tasks["keyed"].apply_async(kwargs={"user": 42, "n": 1}, countdown=60)

    assert numbers(client) == []
    ((member, due),) = client.zrange("streamtask:{t.default.0.0}:delayed", 0, -1, withscores=True)
    assert before + 60_000 <= due <= before + 65_000
    # members are SEQUENCE (16 digits), field, envelope
    assert member[:16].isdigit()
    assert wire.decode([member[16:17], member[17:]])[4] == {"user": 42, "n": 1}


def test_messages_due_in_one_millisecond_keep_the_order_of_their_calls(redis_server_all, make):
    import datetime as dt

    app = make(redis_server_all)
    client = redis_server_all.client()
    eta = dt.datetime.now(dt.timezone.utc) + dt.timedelta(hours=1)

    for n in range(30):
        app.tasks["keyed"].apply_async(kwargs={"user": 42, "n": n}, eta=eta)

    members = client.zrange("streamtask:{t.default.0.0}:delayed", 0, -1)
    assert [wire.decode([m[16:17], m[17:]])[4]["n"] for m in members] == list(range(30))


# --- lost replies, lost requests ---------------------------------------------------------------------------------

WAYS = {
    "single": lambda app: app.tasks["keyed"].delay(user=42, n=1),
    "many": lambda app: app.tasks["keyed"].send_many([{"user": 42, "n": 1}]),
    "delayed": lambda app: app.tasks["keyed"].apply_async(kwargs={"user": 42, "n": 1}, countdown=60),
    "deduped": lambda app: app.tasks["keyed"].apply_async(kwargs={"user": 42, "n": 1}, dedupe_id="a"),
    "deduped-delayed": lambda app: app.tasks["keyed"].apply_async(
        kwargs={"user": 42, "n": 1}, dedupe_id="a", countdown=60
    ),
    "shared": lambda app: app.tasks["plain"].apply_async(kwargs={"n": 1}),
    "async": lambda app: asyncio.run(app.tasks["keyed"].adelay(user=42, n=1)),
    "async-deduped": lambda app: asyncio.run(
        app.tasks["keyed"].aapply_async(kwargs={"user": 42, "n": 1}, dedupe_id="a")
    ),
}
every_way = pytest.mark.parametrize("way", WAYS)


@every_way
def test_a_lost_reply_adds_one_message(redis_server_all, proxy, make, way):
    through = proxy(redis_server_all)
    app = make(through)
    client = redis_server_all.client()
    app.queue("default").shape()
    # so that the lost reply is the produce script's own, not NOSCRIPT
    other = make(redis_server_all, name="other")
    WAYS[way](other)
    # and, for dedupe ids, not the answer that tells the layout
    app.tasks["keyed"].apply_async(kwargs={"user": 42, "n": 0}, dedupe_id="first")
    before = len(numbers(client)) + delayed_count(client)

    through.cut_after_request(b"EVALSHA")
    sent = WAYS[way](app)

    assert through.cuts == 1
    assert len(numbers(client)) + delayed_count(client) == before + 1
    if way != "many":
        assert sent.stored is True, "the caller of a repeated call hears that it stored the message"


@every_way
def test_a_lost_request_adds_one_message(redis_server, proxy, make, way):
    through = proxy(redis_server)
    app = make(through)
    client = redis_server.client()
    app.queue("default").shape()

    through.cut_before_request(b"EVALSHA", times=3)
    WAYS[way](app)

    assert through.cuts == 3
    assert len(numbers(client)) + delayed_count(client) == 1


def test_many_lost_replies_in_a_row_keep_order_and_add_nothing(redis_server, proxy, make):
    through = proxy(redis_server)
    app = make(through)
    client = redis_server.client()

    for n in range(40):
        if n % 5 == 2:
            through.cut_after_request(b"EVALSHA", times=3)
        app.tasks["keyed"].delay(user=42, n=n)

    assert through.cuts == 24
    assert numbers(client) == list(range(40))


def test_a_call_whose_reply_never_comes_says_so_and_adds_at_most_one(redis_server, proxy, make):
    through = proxy(redis_server)
    app = make(through)
    client = redis_server.client()
    app.tasks["keyed"].delay(user=42, n=0)

    through.cut_after_request(b"EVALSHA", times=1000)
    watch = Starved()
    with pytest.raises(BrokerUnavailable):
        app.tasks["keyed"].apply_async(kwargs={"user": 42, "n": 1}, timeout=0.3)

    assert watch.spent < 2
    assert through.cuts > 1
    assert numbers(client) == [0, 1]


def test_a_broker_that_swallows_everything_is_given_up_in_time(redis_server, proxy, make):
    through = proxy(redis_server)
    app = make(through, redis_timeout=0.8)
    app.tasks["keyed"].delay(user=42, n=0)

    through.blackhole()
    watch = Starved()
    with pytest.raises(BrokerUnavailable):
        app.tasks["keyed"].apply_async(kwargs={"user": 42, "n": 1}, timeout=0.5)

    assert watch.spent < 1.4, "the first try's wait for a reply counts"
    through.blackhole(False)
    app.tasks["keyed"].delay(user=42, n=2)


# --- restarts, flushes -------------------------------------------------------------------------------------------


def test_a_restart_of_redis_in_mid_run_loses_and_doubles_nothing(own_server_all, make):
    app = make(own_server_all)
    done = []

    def run():
        for n in range(300):
            app.tasks["keyed"].delay(user=42, n=n)
            done.append(n)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: len(done) > 50)
    own_server_all.restart(kill=True)
    wait_until(lambda: len(done) > 150 or not thread.is_alive())
    if thread.is_alive():
        own_server_all.restart(kill=True)
    thread.join(20)

    assert len(done) == 300
    assert numbers(own_server_all.client()) == list(range(300))


def test_script_flush_in_mid_run_harms_nothing(redis_server_all, make):
    app = make(redis_server_all)
    client = redis_server_all.client()
    keyed = app.tasks["keyed"]
    by_shard = keys_of_shards(8)

    for way in WAYS.values():
        way(app)
        client.script_flush()
        way(app)
    for _ in range(3):
        client.script_flush()
        keyed.send_many([{"user": users[0], "n": n} for users in by_shard.values() for n in (10, 11)])

    async def many():
        for _ in range(3):
            await asyncio.gather(*(keyed.adelay(user=42, n=n) for n in range(20, 25)))
            client.script_flush()

    asyncio.run(many())
    found = sorted(numbers(client))
    # single, many, shared, async twice each, deduped once
    assert found.count(1) == 2 * 4 + 1
    # and of the deduped ones the delayed call has the same id
    assert delayed_count(client) == 2
    assert (found.count(10), found.count(11)) == (24, 24)
    assert [found.count(n) for n in range(20, 25)] == [3] * 5


def test_flushall_in_mid_run_then_sending_works_again(redis_server_all, make):
    app = make(redis_server_all)
    client = redis_server_all.client()
    for way in WAYS.values():
        way(app)
    for name, way in WAYS.items():
        client.flushall()
        way(app)
        assert len(numbers(client)) + delayed_count(client) == 1, name
        # also opened, as at first: a shard without its state takes nothing
        assert client.hget("streamtask:{t.default}:meta", "shards") == b"8"


def test_after_a_flush_messages_are_for_all_groups_that_were_there(redis_server_all, make):
    """Whoever opens the shards first does so for the groups that he knows: a producer, or the worker of one of them."""
    client = redis_server_all.client()
    sender, worker, late = (make(redis_server_all).queue("default") for _ in range(3))
    late.declare(("a",))
    worker.declare(("a", "b"))
    sender.declare()
    link = late.broker.link()
    assert late.see_groups(link) == ["a", "b"]  # as a worker does once in a while
    link.close()
    for queue, own in ((sender, ()), (worker, ("b",)), (late, ("a",))):
        client.flushall()
        queue.forget()
        queue.declare(own)
        for shard in queue.all_shards():
            state = client.hgetall(queue.shard_keys(shard).state)
            assert {field for field in state if field.startswith(b"group:")} == {b"group:a", b"group:b"}
            assert {info["name"] for info in client.xinfo_groups(queue.shard_keys(shard).stream)} == {b"a", b"b"}


# --- dedupe ids --------------------------------------------------------------------------------------------------


def dedupe(app, dedupe_id, user=42, task="keyed", **options):
    kwargs = {"n": 1} if user is None else {"user": user, "n": 1}
    return app.tasks["plain" if user is None else task].apply_async(kwargs=kwargs, dedupe_id=dedupe_id, **options)


def test_a_dedupe_id_stores_once_within_its_time_and_again_after_it(redis_server_all, make):
    app = make(redis_server_all, dedupe_ttl=0.4)
    client = redis_server_all.client()

    first, second = dedupe(app, "order-1"), dedupe(app, "order-1")
    assert (first.stored, second.stored) == (True, False)
    assert first.id == second.id
    assert len(numbers(client)) == 1
    started, watch = time.monotonic(), Starved()
    wait_until(lambda: dedupe(app, "order-1").stored, timeout=3, poll=0.02)

    assert time.monotonic() - started > 0.2
    assert watch.spent < 1.5
    assert len(numbers(client)) == 2


@pytest.mark.parametrize("user", [42, None], ids=["keyed", "shared"])
def test_a_dedupe_id_is_known_to_every_producer(redis_server_all, make, user):
    one, other = make(redis_server_all), make(redis_server_all)

    assert dedupe(one, "a", user).stored
    assert not dedupe(other, "a", user).stored
    assert dedupe(other, "b", user).stored
    assert not dedupe(one, "b", user).stored
    assert not dedupe(one, "b", user, countdown=60).stored
    assert len(numbers(redis_server_all.client())) == 2


def test_a_dedupe_id_is_unique_per_queue_and_shard_key(redis_server, make):
    app = make(redis_server)

    @app.task(name="elsewhere", queue="other", shard_key="user")
    def elsewhere(user, n):
        pass

    a, b = keys_of_shards(8, 2)[3]
    assert dedupe(app, "x", a).stored
    assert dedupe(app, "x", b).stored, "another key of the same shard"
    assert dedupe(app, "x", a, task="elsewhere").stored, "another queue"
    assert dedupe(app, "x", None).stored, "no shard key"
    assert not dedupe(app, "x", str(a)).stored, "42 and '42' are one key"
    assert not dedupe(app, "x", b).stored
    # Neighbours that a careless concatenation would confuse.
    assert dedupe(app, "1x", 1).stored
    assert dedupe(app, "x", 11).stored
    with pytest.raises(ConfigError, match="dedupe_id must be text that is not empty"):
        dedupe(app, "", a)


def test_dedupe_ids_of_any_length_and_script(redis_server, make):
    app = make(redis_server)
    ids = ["ü", "u\u0308", "\x00", "a" * 100_000, "a" * 99_999 + "b", "\ud800", "-", "5:"]

    assert [dedupe(app, one).stored for one in ids] == [True] * len(ids)
    assert [dedupe(app, one).stored for one in ids] == [False] * len(ids)


@pytest.mark.parametrize("due_ms", [None, 60_000], ids=["now", "delayed"])
@pytest.mark.parametrize("how", ["blocking", "asyncio"])
def test_two_calls_with_one_dedupe_id_and_by_chance_one_number_store_once_and_are_told_so(
    redis_server, make, how, due_ms
):
    """The number that stands for a call has 15 bits: of many duplicates, some meet their own."""
    from streamtask.queue.aproducer import AsyncProducer
    from streamtask.queue.calls import Call
    from streamtask.queue.seen import dedupe_hash

    app = make(redis_server)
    app.queue("default").shape()
    queue = app.queue("default")
    id16 = dedupe_hash("default", b"42", "order-1")

    def send():
        call = Call(queue, 0, b"x", due_ms, due_ms is not None, dedupe=id16, call_id=b"ab")
        if how == "asyncio":
            return asyncio.run(AsyncProducer(app.sender.producer, app.broker).send(call))
        return app.sender.producer.send(call)

    assert [send(), send(), send()] == [True, False, False]


def test_every_id_is_recognised_through_the_growth_of_the_set(redis_server_all, make):
    app = make(redis_server_all, shards=1)
    other = make(redis_server_all, shards=1)
    client = redis_server_all.client()

    fill_ids(app, 5000)

    assert len(app.sender.producer.target(app.queue("default"), 0).layout.split(";")) > 1, "the set has never grown"
    client.delete("streamtask:{t.default.0.0}:stream")
    for n in range(0, 5000, 7):
        assert not dedupe(other, f"id{n}").stored, n
    assert client.xlen("streamtask:{t.default.0.0}:stream") == 0


def test_the_number_of_remembered_ids_is_bounded(redis_server_all, make):
    app = make(redis_server_all, max_dedupe_ids=400)
    for n in range(400):
        assert dedupe(app, f"id{n}").stored

    with pytest.raises(QueueFull, match="max_dedupe_ids") as caught:
        dedupe(app, "one more", timeout=0.05)
    assert not isinstance(caught.value, BrokerOutOfMemory)

    assert not dedupe(app, "id0").stored, "those that are held are still recognised"
    assert dedupe(app, "other", user=keys_of_shards(8)[5][0]).stored, "the bound is each shard's"
    app.tasks["keyed"].delay(user=42), "and calls without a dedupe_id pass"


def test_room_for_ids_comes_back_when_they_expire(redis_server, make):
    app = make(redis_server, max_dedupe_ids=50, dedupe_ttl=0.3)
    for n in range(50):
        dedupe(app, f"id{n}")
    with pytest.raises(QueueFull):
        dedupe(app, "x", timeout=0)

    assert dedupe(app, "x", timeout=5).stored


def test_threads_that_turn_a_page_at_once_draw_no_id_twice(redis_server, make):
    app = make(redis_server)
    target = app.sender.producer.target(app.queue("default"), 0)
    ready, calls = threading.Barrier(4), []

    def draw():
        ready.wait()
        calls.extend([target.pack_append(b"x") for _ in range(2_000)])

    threads = [threading.Thread(target=draw) for _ in range(4)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)

    assert len(calls) == len(set(calls)) == 8_000


def fill_ids(app, count):
    """Stores ``count`` messages with dedupe ids id0, id1, ... in one shard over one link, 200 a round trip."""
    from streamtask.queue.seen import dedupe_hash

    queue = app.queue("default")
    target = app.sender.producer.target(queue, 0)
    link = app.broker.link()
    # 20,000 round trips of the whole API are too slow for a test; these are the same calls, prepared by the same code.
    left = [dedupe_hash("default", b"42", f"id{n}") for n in range(count)]
    while left:
        batch, left = left[:200], left[200:]
        answers = link.pipeline([target.pack_deduped(one, b"x", None, False, one) for one in batch])
        for one, answer in zip(batch, answers, strict=True):
            stored, refusal = target.read(answer, False)
            if not stored:
                assert refusal is Code.SEEN_LAYOUT, answer
                left.append(one)
    link.close()


def seen_bytes(client, pattern="*:seen:*"):
    """Bytes, ids and keys of the seen sets; asserts that every one of them expires."""
    size = ids = keys = 0
    for key in client.scan_iter(match=pattern, count=1000):
        keys += 1
        size += client.memory_usage(key, samples=0)
        ids += client.bitcount(key) if client.type(key) == b"string" else client.hlen(key)
        assert client.pttl(key) > 0, f"{key} has no time to live"
    return size, ids, keys


def test_dedupe_ids_take_at_most_30_bytes_each(redis_server_all, make):
    app = make(redis_server_all, shards=1, dedupe_ttl=3600)

    fill_ids(app, 20_000)

    size, ids, keys = seen_bytes(redis_server_all.client())
    assert ids == 20_000
    assert size / ids <= 30, f"{size / ids:.1f} bytes an id in {keys} hashes"


def test_produce_ids_take_less_than_a_byte_each(redis_server_all, make):
    app = make(redis_server_all, shards=1)
    target = app.sender.producer.target(app.queue("default"), 0)
    link = app.broker.link()
    for _ in range(50):
        answers = link.pipeline([target.pack_append(b"x") for _ in range(400)])
        assert all(type(answer) is bytes for answer in answers)
    link.close()

    size, ids, keys = seen_bytes(redis_server_all.client())
    assert ids == 20_000
    assert size / ids < 1, f"{size / ids:.1f} bytes an id in {keys} pages"


@every_way
def test_remembered_ids_expire(redis_server, make, way):
    app = make(redis_server, produce_ttl=0.2, dedupe_ttl=0.2)
    client = redis_server.client()

    WAYS[way](app)

    assert seen_bytes(client)[1] == 1
    wait_until(lambda: not list(client.scan_iter(match="*:seen:*", count=1000)), timeout=3)


# --- the backlog limit -------------------------------------------------------------------------------------------

FULL_WAYS = {name: way for name, way in WAYS.items() if name != "many"}


@pytest.mark.parametrize("way", FULL_WAYS)
def test_a_full_shard_refuses_and_stores_nothing(redis_server_all, make, way):
    app = make(redis_server_all, max_backlog=3, send_timeout=0.15)
    client = redis_server_all.client()
    task, kwargs = ("plain", {"n": 0}) if way == "shared" else ("keyed", {"user": 42, "n": 0})
    for countdown in (None, None, 60):
        app.tasks[task].apply_async(kwargs=kwargs, countdown=countdown)

    started = time.monotonic()
    with pytest.raises(QueueFull, match="max_backlog"):
        WAYS[way](app)

    assert time.monotonic() - started >= 0.15, "it did not wait for room"
    assert len(numbers(client)) + delayed_count(client) == 3


def test_a_call_that_waits_for_room_passes_when_there_is_some(redis_server, make):
    app = make(redis_server, max_backlog=2)
    client = redis_server.client()
    keyed = app.tasks["keyed"]
    keyed.delay(user=42, n=0)
    keyed.delay(user=42, n=1)
    sent = threading.Thread(target=keyed.delay, kwargs={"user": 42, "n": 2})

    sent.start()
    at = evalsha_calls(client)
    wait_until(lambda: evalsha_calls(client) > at + 2)  # refused more than once
    assert sent.is_alive()
    stream = "streamtask:{t.default.0.0}:stream"
    client.xdel(stream, client.xrange(stream, count=1)[0][0])
    sent.join(5)

    assert not sent.is_alive()
    assert numbers(client) == [1, 2]


def test_a_known_dedupe_id_needs_no_room(redis_server, make):
    app = make(redis_server, max_backlog=1)
    dedupe(app, "a")

    assert not dedupe(app, "a", timeout=0).stored


def test_a_repeated_call_that_was_stored_is_answered_though_the_shard_is_full_now(redis_server, proxy, make):
    through = proxy(redis_server)
    app = make(through, max_backlog=1)
    app.queue("default").shape()
    make(redis_server, name="other").tasks["keyed"].delay(user=42)  # loads the script

    through.cut_after_request(b"EVALSHA")
    app.tasks["keyed"].apply_async(kwargs={"user": 42, "n": 1}, timeout=2)

    assert through.cuts == 1
    assert len(messages(redis_server.client(), "*{t.*:stream")["streamtask:{t.default.0.0}:stream"]) == 1


def test_send_many_into_little_room_says_exactly_what_is_stored(redis_server_all, make):
    app = make(redis_server_all, max_backlog=10, shards=2)
    client = redis_server_all.client()
    users = keys_of_shards(2)
    calls = [{"user": users[n % 3 == 0][0], "n": n} for n in range(20)]
    room_for = {0: 10, 1: 10}
    expected = []
    for n, call in enumerate(calls):
        shard = shard_of(canonical(call["user"]), 2)
        if room_for[shard]:
            room_for[shard] -= 1
            expected.append(n)
    assert len(expected) < 20

    with pytest.raises(BulkSendError, match="max_backlog") as caught:
        app.tasks["keyed"].send_many(calls, timeout=0.1)

    assert caught.value.stored == expected
    assert caught.value.failed == [n for n in range(20) if n not in expected]
    assert caught.value.unknown == []
    assert isinstance(caught.value.__cause__, QueueFull)
    assert sorted(numbers(client)) == expected


def test_send_many_waits_for_room_and_goes_on_in_order(redis_server, make):
    app = make(redis_server, max_backlog=10, shards=1)
    client = redis_server.client()
    stream = "streamtask:{t.default.0.0}:stream"
    seen = []
    sender = threading.Thread(target=app.tasks["keyed"].send_many, args=([{"user": 1, "n": n} for n in range(35)],))

    sender.start()
    for room_taken in (10, 10, 10, 5):
        wait_until(lambda full=room_taken: client.xlen(stream) == full)
        taken = client.xrange(stream)
        seen += [wire.decode([b"m", fields[b"m"]])[4]["n"] for _, fields in taken]
        client.xdel(stream, *(entry_id for entry_id, _ in taken))
    sender.join(5)

    assert seen == list(range(35))


# --- Redis' memory limit -----------------------------------------------------------------------------------------


def exhaust_memory(server):
    """Sets maxmemory so far below what is used that no buffer that Redis frees makes room."""
    client = server.client()
    for n in range(200):
        client.set(f"filler{n}", b"x" * 10_000)
    server.config_set(maxmemory=int(client.info("memory")["used_memory"]) - 1_000_000)


@every_way
def test_out_of_memory_stores_nothing_and_passes_when_there_is_memory(redis_server_all, make, way):
    app = make(redis_server_all, send_timeout=0.1)
    patient = make(redis_server_all)
    client = redis_server_all.client()
    WAYS[way](make(redis_server_all, name="other"))  # the script is loaded
    app.queue("default").shape()
    patient.queue("default").shape()
    before = len(numbers(client)) + delayed_count(client)
    exhaust_memory(redis_server_all)
    keys = client.dbsize()

    for _ in range(3):  # no write of an earlier call may let a later one through
        with pytest.raises((BrokerOutOfMemory, BulkSendError)) as caught:
            WAYS[way](app)
        error = caught.value if way != "many" else caught.value.__cause__
        assert isinstance(error, BrokerOutOfMemory)
        assert isinstance(error, QueueFull)
        if way == "many":
            assert (caught.value.stored, caught.value.failed, caught.value.unknown) == ([], [0], [])
    assert len(numbers(client)) + delayed_count(client) == before
    assert client.dbsize() == keys, "a refused call left something behind"

    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(WAYS[way](patient)))
    at = evalsha_calls(client)
    thread.start()
    wait_until(lambda: evalsha_calls(client) > at + 2)
    assert thread.is_alive()
    redis_server_all.config_set(maxmemory=0)
    thread.join(5)

    assert outcome
    assert len(numbers(client)) + delayed_count(client) == before + 1


def test_up_to_the_limit_every_call_is_either_stored_or_refused(redis_server_all, make):
    app = make(redis_server_all)
    client = redis_server_all.client()
    app.queue("default").shape()
    app.tasks["keyed"].delay(user=42, n=0)
    redis_server_all.config_set(maxmemory=int(client.info("memory")["used_memory"]) + 200_000)
    stored = [0]

    for n in range(1, 2000):
        try:
            app.tasks["keyed"].apply_async(kwargs={"user": 42, "n": n}, headers={"pad": "x" * 500}, timeout=0)
            stored.append(n)
        except BrokerOutOfMemory:
            break
    else:
        pytest.fail("the memory limit was never reached")

    assert numbers(client) == stored


# --- what is refused before anything is sent ---------------------------------------------------------------------


def test_another_number_of_shards_is_refused_at_the_first_use(redis_server, make):
    make(redis_server, shards=8).tasks["keyed"].delay(user=1)
    app = make(redis_server, shards=4)
    client = redis_server.client()

    for call in (
        lambda: app.tasks["keyed"].delay(user=1),
        lambda: app.tasks["plain"].delay(),
        lambda: app.tasks["keyed"].send_many([{"user": 1}]),
        lambda: asyncio.run(app.tasks["keyed"].adelay(user=1)),
    ):
        with pytest.raises(ShardCountMismatch, match=r"has 8 shards.*configured with 4.*shards=8") as caught:
            call()
        assert isinstance(caught.value, ConfigError)
    assert sum(map(len, messages(client).values())) == 1


def test_a_message_that_is_too_large_is_refused(redis_server, make):
    app = make(redis_server, max_message_bytes=1000)
    client = redis_server.client()

    for call in (
        lambda: app.tasks["keyed"].delay(user="x" * 1000),
        lambda: app.tasks["keyed"].send_many([{"user": "a"}, {"user": "x" * 1000}]),
        lambda: app.tasks["keyed"].apply_async(kwargs={"user": 1}, headers={"h": "x" * 1000}),
        lambda: asyncio.run(app.tasks["keyed"].adelay(user="x" * 1000)),
    ):
        with pytest.raises(MessageTooLarge, match="max_message_bytes is 1000"):
            call()
    assert sum(map(len, messages(client).values())) == 0
    app.tasks["keyed"].delay(user="x" * 450)  # it is in the envelope as key and as argument


UNSERIALISABLE = [object(), [lambda: None], {1: {2: object()}}]


@pytest.mark.parametrize(
    "serializer,value",
    [("msgpack", one) for one in (*UNSERIALISABLE, 2**70, "\ud800")] + [("json", one) for one in UNSERIALISABLE],
)
def test_arguments_that_cant_be_serialised_are_refused_with_the_tasks_name(redis_server, make, value, serializer):
    app = make(redis_server, serializer=serializer)
    client = redis_server.client()

    with pytest.raises(EncodeError, match="keyed"):
        app.tasks["keyed"].delay(user=1, n=value)
    with pytest.raises(EncodeError, match="keyed"):
        app.tasks["keyed"].send_many([{"user": 1}, {"user": 1, "n": value}])

    assert sum(map(len, messages(client).values())) == 0


@pytest.mark.parametrize("call", [{}, {"user": 1, "wrong": 2}, {"n": 1}])
def test_arguments_that_dont_fit_are_refused(redis_server, make, call):
    app = make(redis_server)
    client = redis_server.client()

    for send in (
        lambda: app.tasks["keyed"].delay(**call),
        lambda: app.tasks["keyed"].send_many([call]),
        lambda: app.tasks["keyed"].apply_async(kwargs=call, shard_key="given"),
        lambda: asyncio.run(app.tasks["keyed"].adelay(**call)),
    ):
        with pytest.raises(TypeError):
            send()
    assert sum(map(len, messages(client).values())) == 0


WRONG_URLS = [
    "",
    "localhost:6379",
    f":{SECRET}@localhost:6379",
    f"redis:/:{SECRET}@localhost",
    f"http://:{SECRET}@localhost",
    f"redis://:{SECRET}@",
    "redis://",
    f"redis://:{SECRET}@:6379/0",
    f"redis://:{SECRET}@localhost:port/0",
    f"redis://:{SECRET}@localhost:99999/0",
    f"redis://:{SECRET}@localhost:-1/0",
    f"redis://:{SECRET}@localhost:6379/zero",
    f"redis://:{SECRET}@localhost:6379/0/1",
    f"redis://:{SECRET}@localhost:6379/-1",
    f"redis://:{SECRET}@[::1:6379/0",
    f"rediss://u:{SECRET}@localhost/x",
    # a password that is not percent-encoded ends the host's part early
    f"redis://:{SECRET}/{SECRET}@localhost:6379/0",
    f"redis://u:{SECRET}#{SECRET}@localhost:6379/0",
    f"redis://u:{SECRET}?{SECRET}@localhost:6379/0",
    f"redis://u:12/{SECRET}@localhost:6379/0",
    f"redis://u:a@b/{SECRET}@localhost:6379/0",
    "unix://",
    f"redis+sentinel://:{SECRET}@a,b:26379",
    f"redis+sentinel://:{SECRET}@a,b:26379/?sentinel_password={SECRET}",
    f"redis+sentinel://:{SECRET}@a:x,b:26379/mymaster",
    f"redis+cluster://:{SECRET}@",
    f"redis://localhost:x/0?password={SECRET}",
    # unknown and wrong options
    f"redis://:{SECRET}@localhost/0?colour=red",
    f"redis://localhost/0?my_password={SECRET}",
    f"redis://:{SECRET}@localhost/0?socket_timeout=soon",
    f"redis://:{SECRET}@localhost/0?health_check_interval=often",
    f"unix://:{SECRET}@/tmp/s?colour=red",
]


def test_a_unix_socket_can_be_used(make):
    binary = list(server_binaries().values())[-1]
    with RedisServer(binary, unix=True) as server:
        app = make(server.url)
        app.tasks["keyed"].delay(user=1, n=1)
        app.tasks["keyed"].send_many([{"user": 1, "n": 2}])
        asyncio.run(app.tasks["keyed"].adelay(user=1, n=3))
        assert numbers(server.client()) == [1, 2, 3]


@pytest.mark.parametrize("url", WRONG_URLS)
def test_a_wrong_url_is_a_config_error_that_tells_no_password(url):
    with pytest.raises(ConfigError) as caught:
        StreamTask("t", broker=url or "nothing").broker.link()

    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)
    assert caught.value.__cause__ is None or SECRET not in str(caught.value.__cause__)


@pytest.mark.parametrize(
    "url", ["redis://u:{}@127.0.0.1:{}/0", "redis://127.0.0.1:{1}/0?password={0}", "redis+cluster://u:{}@127.0.0.1:{}"]
)
def test_an_unreachable_broker_is_said_in_time_without_its_password(make, url):
    app = make(url.format(SECRET, free_port()), send_timeout=0.3)
    keyed, plain = app.tasks["keyed"], app.tasks["plain"]
    calls = [lambda: keyed.delay(user=1), plain.delay, lambda: keyed.send_many([{"user": 1}])]
    if "cluster" not in url:
        calls.append(lambda: asyncio.run(keyed.adelay(user=1)))

    for call in calls:
        watch = Starved()
        with pytest.raises(BrokerUnavailable, match="can't be reached") as caught:
            call()
        assert watch.spent < 2
        assert isinstance(caught.value, ConnectionError)
        assert SECRET not in str(caught.value)
    assert SECRET not in repr(app)


def test_a_wrong_password_is_said_at_once(redis_server, make):
    redis_server.config_set(requirepass="right")
    app = make(f"redis://:{SECRET}@127.0.0.1:{redis_server.port}/0")

    watch = Starved()
    with pytest.raises(AccessRefused, match="refused the user or password") as caught:
        app.tasks["keyed"].delay(user=1)
    assert watch.spent < 2
    assert SECRET not in str(caught.value)


class OldServer(socketserver.StreamRequestHandler):
    """Speaks as much RESP as it takes to say that it is Redis 5."""

    def handle(self):
        with contextlib.suppress(OSError, ValueError):
            while line := self.rfile.readline():
                parts = []
                for _ in range(int(line[1:])):
                    size = int(self.rfile.readline()[1:])
                    parts.append(self.rfile.read(size + 2)[:-2])
                text = b"# Server\r\nredis_version:5.0.14\r\n"
                self.wfile.write(b"$%d\r\n%b\r\n" % (len(text), text) if parts[0].upper() == b"INFO" else b"+OK\r\n")


def test_a_server_that_is_too_old_is_refused(make):
    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), OldServer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            app = make(f"redis://127.0.0.1:{server.server_address[1]}/0")
            with pytest.raises(UnsupportedServer, match=r"5\.0\.14.*6\.2"):
                app.tasks["keyed"].delay(user=1)
            app.close()
        finally:
            server.shutdown()
            thread.join()


# --- send_many ---------------------------------------------------------------------------------------------------


def test_send_many_stores_all_in_order_within_each_shard(redis_server_all, make):
    app = make(redis_server_all)
    client = redis_server_all.client()

    results = app.tasks["keyed"].send_many({"user": n % 37, "n": n} for n in range(3000))

    found = messages(client, "*[0-9]}:stream")
    assert sum(map(len, found.values())) == 3000
    for envelopes in found.values():
        order = [m[4]["n"] for m in envelopes]
        assert order == sorted(order)
    for stream, envelopes in found.items():
        assert all(stream.endswith(f".{shard_of(m[1], 8)}}}:stream") for m in envelopes)
    ids = {m[4]["n"]: str(uuid.UUID(bytes=m[2])) for envelopes in found.values() for m in envelopes}
    assert [r.id for r in results] == [ids[n] for n in range(3000)]


def test_send_many_takes_few_calls(redis_server, make):
    app = make(redis_server)
    client = redis_server.client()
    app.tasks["keyed"].send_many([{"user": 1}])
    before = evalsha_calls(client)

    app.tasks["keyed"].send_many([{"user": n} for n in range(4000)])

    assert evalsha_calls(client) - before <= 24


def test_send_many_takes_pairs_and_mappings_keyed_and_not(redis_server, make):
    app = make(redis_server)
    client = redis_server.client()

    assert app.tasks["keyed"].send_many([]) == []
    app.tasks["keyed"].send_many([((42,), {"n": 1}), {"user": 42, "n": 2}, ((42, 3), {})])
    app.tasks["plain"].send_many([{"n": 1}, ((2,), {})])

    found = messages(client)
    assert [(m[3], m[4]) for m in found["streamtask:{t.default.0.0}:stream"]] == [
        ([42], {"n": 1}),
        ([], {"user": 42, "n": 2}),
        ([42, 3], {}),
    ]
    assert [(m[3], m[4]) for m in found["streamtask:{t.default.0.shared}:stream"]] == [([], {"n": 1}), ([2], {})]


def test_large_messages_are_sent_in_several_calls(redis_server, make):
    app = make(redis_server)
    client = redis_server.client()

    app.tasks["keyed"].send_many([{"user": 42, "n": "x" * 300_000} for _ in range(10)])

    assert client.xlen("streamtask:{t.default.0.0}:stream") == 10


def test_send_many_through_lost_replies_stores_each_once_and_in_order(redis_server, proxy, make):
    through = proxy(redis_server)
    app = make(through)
    client = redis_server.client()
    app.queue("default").shape()

    through.cut_after_request(b"EVALSHA", times=4)
    app.tasks["keyed"].send_many([{"user": n % 5, "n": n} for n in range(2000)])

    assert through.cuts == 4
    for envelopes in messages(client).values():
        order = [m[4]["n"] for m in envelopes]
        assert order == sorted(set(order))
    assert sorted(numbers(client)) == list(range(2000))


def test_send_many_says_what_is_stored_when_redis_dies_in_the_middle(own_server, proxy, make):
    through = proxy(own_server)
    app = make(through, shards=1)
    app.tasks["keyed"].delay(user=1, n=-1)

    def calls():
        for n in range(1000):
            yield {"user": 1, "n": n}

    # four calls of 250: the second one's reply is lost, and Redis with it
    done = threading.Event()

    def kill_when_two_are_in():
        client = own_server.client()
        wait_until(lambda: client.xlen("streamtask:{t.default.0.0}:stream") >= 251, poll=0.0005)
        own_server.kill()
        done.set()

    through.delay(0.02)
    killer = threading.Thread(target=kill_when_two_are_in)
    killer.start()
    with pytest.raises(BulkSendError) as caught:
        app.tasks["keyed"].send_many(calls(), timeout=0.5)
    killer.join(10)
    assert done.is_set()
    own_server.restart()

    error = caught.value
    assert isinstance(error.__cause__, BrokerUnavailable)
    assert sorted(error.stored + error.failed + error.unknown) == list(range(1000))
    assert error.failed
    there = set(numbers(own_server.client())) - {-1}
    assert set(error.stored) <= there <= set(error.stored) | set(error.unknown)


def test_an_error_of_one_shard_does_not_hide_what_the_others_stored(redis_server, make):
    app = make(redis_server, shards=4)
    client = redis_server.client()
    users = keys_of_shards(4)
    app.queue("default").shape()
    broken = "streamtask:{t.default.0.1}:stream"
    client.delete(broken)
    client.set(broken, "not a stream")
    calls = [{"user": users[shard][0], "n": shard} for shard in (0, 1, 2, 3)]

    with pytest.raises(BulkSendError, match=r"WRONGTYPE|wrong kind") as caught:
        app.tasks["keyed"].send_many(calls, timeout=0.1)

    client.delete(broken)
    assert sorted(numbers(client)) == [0, 2, 3]
    assert caught.value.stored == [0, 2, 3]
    assert caught.value.failed == [1]
    assert caught.value.unknown == []


def test_a_call_that_is_interrupted_leaves_no_reply_for_the_next(redis_server, make):
    """Ctrl-C between request and reply, once for each kind of call."""
    import os
    import signal

    app = make(redis_server)
    client = redis_server.client()
    keyed = app.tasks["keyed"]
    keyed.delay(user=1, n=0)
    keyed.send_many([{"user": 1, "n": 0}])
    caller = threading.get_ident()

    def interrupt():
        """When the call has come to where it waits for Redis, however long that takes."""
        wait_until(lambda: sys._current_frames()[caller].f_code.co_filename.endswith("redis/link.py"), 30)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    for send in (lambda: keyed.delay(user=1, n=8), lambda: keyed.send_many([{"user": 1, "n": 8}])):
        redis_server.pause()
        pauser = threading.Thread(target=interrupt)
        pauser.start()
        with pytest.raises(KeyboardInterrupt):
            send()
        pauser.join()
        redis_server.resume()
        # The first call with a dedupe_id is answered with the set's layout, and repeated with that: with the
        # interrupted call's reply in its place it would be taken for stored.
        fresh = make(redis_server)
        fresh.sender.producer = app.sender.producer
        assert dedupe(fresh, f"after-{send}").stored
        keyed.send_many([{"user": 1, "n": 2}, {"user": 2, "n": 2}])
        client.delete("streamtask:{t.default.0.0}:state")
        app.sender.producer._targets.clear()

    found = numbers(client)
    assert found.count(1) == 2
    assert found.count(2) == 4


def test_a_produce_call_makes_at_most_four_inner_calls(redis_server_all, make):
    app = make(redis_server_all)
    client = redis_server_all.client()
    app.tasks["keyed"].send_many([{"user": n, "n": n} for n in range(50)])
    app.tasks["keyed"].delay(user=1, n=1)
    client.config_resetstat()
    for n in range(50):
        app.tasks["keyed"].delay(user=n, n=n)
    stats = {name: row["calls"] for name, row in client.info("commandstats").items()}
    assert stats.pop("cmdstat_evalsha") == 50
    inner = {name: calls for name, calls in stats.items() if not name.startswith(("cmdstat_config", "cmdstat_info"))}
    assert 0 < sum(inner.values()) <= 4 * 50, inner


class Interrupted(Exception):
    pass


# A socket that is interrupted while it is opened is closed by its collection.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_bulk_calls_that_are_interrupted_at_any_instant_leave_no_reply_for_the_next(redis_server, make):
    """As by a soft time limit: also while the next batches are packed and Redis' answers are on their way."""
    import random
    import signal

    def interrupt(signum, frame):
        raise Interrupted

    app = make(redis_server)
    keyed = app.tasks["keyed"]
    calls = [{"user": n % 50, "n": n} for n in range(4000)]
    keyed.send_many(calls)
    usual = 10.0
    before = signal.signal(signal.SIGALRM, interrupt)
    hits = 0
    try:
        for n in range(100):
            began = time.monotonic()
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(0.3, 1.0) * usual)
                keyed.send_many(calls)
                signal.setitimer(signal.ITIMER_REAL, 0)
                # What a call takes changes with what else the machine does: the next interruption goes by the last.
                usual = time.monotonic() - began
            except Interrupted:
                hits += 1
            # Each answer is its own call's.
            assert dedupe(app, f"order-{n}").stored
            assert not dedupe(app, f"order-{n}").stored
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits > 20


# --- asyncio -----------------------------------------------------------------------------------------------------


def test_fifty_async_calls_at_once_with_a_cut_in_the_middle_are_each_stored_once(redis_server_all, proxy, make):
    through = proxy(redis_server_all)
    app = make(through)
    client = redis_server_all.client()
    keyed = app.tasks["keyed"]

    async def main():
        await keyed.adelay(user=1, n=-1)
        through.cut_after_request(b"EVALSHA", times=2)
        await asyncio.gather(*(keyed.adelay(user=n % 7, n=n) for n in range(50)))
        through.cut_before_request(b"EVALSHA", times=2)
        await asyncio.gather(*(keyed.adelay(user=n % 7, n=n) for n in range(50, 100)))

    asyncio.run(main())

    assert through.cuts == 4
    assert sorted(numbers(client)) == list(range(-1, 100))


def test_async_calls_go_out_together(redis_server, make):
    app = make(redis_server)
    client = redis_server.client()
    keyed = app.tasks["keyed"]

    async def main():
        await keyed.adelay(user=1)
        before = client.info("clients")["connected_clients"]
        await asyncio.gather(*(keyed.adelay(user=n) for n in range(200)))
        assert client.info("clients")["connected_clients"] == before

    asyncio.run(main())
    assert sum(map(len, messages(client).values())) == 201


def test_async_calls_of_one_key_that_follow_each_other_keep_their_order(redis_server, proxy, make):
    through = proxy(redis_server)
    app = make(through)
    client = redis_server.client()

    async def main():
        for n in range(60):
            if n % 20 == 5:
                through.cut_after_request(b"EVALSHA")
            await app.tasks["keyed"].adelay(user=1, n=n)

    asyncio.run(main())
    assert numbers(client) == list(range(60))


def test_a_cancelled_async_call_does_not_disturb_the_others(redis_server, make):
    app = make(redis_server)
    client = redis_server.client()
    keyed = app.tasks["keyed"]

    async def main():
        await keyed.adelay(user=1, n=0)
        redis_server.pause()
        tasks = [asyncio.create_task(keyed.adelay(user=1, n=n)) for n in range(1, 20)]
        await asyncio.sleep(0.05)
        tasks[7].cancel()
        redis_server.resume()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(done[7], asyncio.CancelledError)
        texts = [result.id for n, result in enumerate(done) if n != 7]
        assert len(set(texts)) == 18

    asyncio.run(main())
    assert [n for n in numbers(client) if n != 8] == [n for n in range(20) if n != 8]


def test_an_app_serves_one_event_loop_after_the_other(redis_server, make):
    app = make(redis_server)
    client = redis_server.client()

    for n in range(3):
        asyncio.run(app.tasks["keyed"].adelay(user=1, n=n))

    assert numbers(client) == [0, 1, 2]
    wait_until(lambda: sum(c["name"] == "streamtask" for c in client.client_list()) <= 2, timeout=2)


# --- threads, forks ----------------------------------------------------------------------------------------------


def test_threads_store_all_and_each_keeps_its_order(redis_server_all, make):
    app = make(redis_server_all)
    client = redis_server_all.client()
    errors = []

    def run(number):
        try:
            for n in range(200):
                app.tasks["keyed"].delay(user=number, n=n)
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    found = {}
    for envelopes in messages(client).values():
        for m in envelopes:
            found.setdefault(m[1], []).append(m[4]["n"])
    assert found == {str(number).encode(): list(range(200)) for number in range(8)}


def test_threads_that_share_a_shards_first_page_make_whole_commands(redis_server, make):
    """A thread may be stopped anywhere while it prepares a call: no other may see a half-made beginning."""
    app = make(redis_server)
    queue = app.queue("default")
    queue.shape()
    settings = ProducerSettings()
    broken = []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(150):
            target = Target(queue, 0, settings)
            barrier = threading.Barrier(4)

            def run(target=target, barrier=barrier):
                barrier.wait()
                for _ in range(3):
                    for packed in (
                        target.pack_append(b"x"),
                        target.pack_delayed(b"x", 1, False),
                    ):
                        broken.extend([packed] * (not packed.startswith(b"*") or b":seen:p" not in packed))

            threads = [threading.Thread(target=run) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert broken == []


FORK = """
    import os, sys
    from streamtask import StreamTask

    app = StreamTask("t", broker=sys.argv[1])

    @app.task(name="keyed", shard_key="user")
    def keyed(user, n):
        pass

    def send(who):
        with open(f"{sys.argv[2]}/{who}", "w") as file:
            for n in range(300):
                file.write(keyed.delay(user=who, n=n).id + "\\n")
                # On a connection that two processes write on, one reads the other's answers.
                for stored in (True, False):
                    again = keyed.apply_async(kwargs={"user": "any", "n": n}, dedupe_id=f"{who}{n}")
                    assert again.stored is stored

    keyed.delay(user="before", n=0)
    children = []
    for who in ("child1", "child2"):
        pid = os.fork()
        if pid == 0:
            send(who)
            os._exit(0)
        children.append(pid)
    send("parent")
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
    send("after")
    print("done")
"""


def test_a_forked_child_and_its_parent_both_send(redis_server, tmp_path):
    script = tmp_path / "forks.py"
    script.write_text(textwrap.dedent(FORK))
    with spawn(script, redis_server.url, tmp_path) as process:
        assert process.wait() == 0, process
        assert "done" in process.lines

    ids = []
    for who in ("parent", "child1", "child2", "after"):
        ids += (tmp_path / who).read_text().split()
    assert len(ids) == len(set(ids)) == 1200
    found = {}
    for envelopes in messages(redis_server.client()).values():
        for m in envelopes:
            found.setdefault(m[1], []).append(m[4]["n"])
    assert found.pop(b"before") == [0]
    assert len(found.pop(b"any")) == 1200
    assert found == {who: list(range(300)) for who in (b"parent", b"child1", b"child2", b"after")}


def test_no_port_is_left_bound():
    """The rig's own promise, on which the unreachable brokers above stand."""
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", free_port())) != 0


def test_a_stream_that_has_no_id_left_is_said_clearly(redis_server_all, make):
    """Whoever may append may give an entry the largest id that there is."""
    app = make(redis_server_all)
    plain = app.tasks["plain"]
    plain.delay()
    stream = app.queue("default").shard_keys("shared").stream
    redis_server_all.client().xadd(stream, {"m": "x"}, id=f"{2**64 - 1}-{2**64 - 1}")
    clear = "takes no more messages: one with the largest id .* 'doctor' names it; when it is empty .* DEL it"
    with pytest.raises(ReplyError, match=clear):
        plain.delay()
    with pytest.raises(ReplyError, match=clear):
        plain.apply_async(dedupe_id="d")
    with pytest.raises(BulkSendError, match=clear):
        plain.send_many([{"n": 1}])
    with pytest.raises(ReplyError, match=clear):
        asyncio.run(plain.adelay())
    redis_server_all.client().delete(stream)
    plain.delay()
