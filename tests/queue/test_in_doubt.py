"""Produce calls whose reply was lost: how long they are repeated, and what they say when they may be repeated no more."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import threading
import time

import pytest

from streamtask.errors import BrokerUnavailable, BulkSendError, InDoubt, QueueFull
from streamtask.redis.link import Link
from tests.helpers import wait_until
from tests.parts import sampled
from tests.queue.test_produce import (
    WAYS,
    delayed_count,
    evalsha_calls,
    exhaust_memory,
    keys_of_shards,
    make_app,
    numbers,
)

TTL_S = 1.0
SHORT = {"produce_ttl": TTL_S, "dedupe_ttl": 1.5 * TTL_S, "redis_timeout": 0.3}
every_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def make():
    apps = []

    def one(where, **options):
        apps.append(make_app(where, **options))
        return apps[-1]

    yield one
    for app in apps:
        app.close()
        if hasattr(app, "loop_of_test"):
            end(app.loop_of_test)


def end(loop):
    for task in asyncio.all_tasks(loop):
        task.cancel()
        loop.run_until_complete(asyncio.wait([task]))
    loop.close()


def send(app, way):
    """``WAYS``; asyncio's on one event loop for all of an app's calls, so that they share a connection."""
    if not way.startswith("async"):
        return WAYS[way](app)
    keyed = app.tasks["keyed"]
    dedupe_id = "a" if way == "async-deduped" else None
    return loop_of(app).run_until_complete(keyed.aapply_async(kwargs={"user": 42, "n": 1}, dedupe_id=dedupe_id))


def loop_of(app):
    if not hasattr(app, "loop_of_test"):
        app.loop_of_test = asyncio.new_event_loop()
    return app.loop_of_test


class Sent:
    """A produce call in a thread: what it returned or raised."""

    def __init__(self, call):
        self.result = self.error = None
        self._call = call
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        try:
            self.result = self._call()
        except BaseException as error:
            self.error = error

    @property
    def over(self):
        return not self._thread.is_alive()

    def join(self):
        wait_until(lambda: self.over, 20)
        self._thread.join()
        return self


def there(client):
    return len(numbers(client)) + delayed_count(client)


@pytest.mark.old_redis("many", "async")
@pytest.mark.parametrize("way", sampled(WAYS, "many", next(iter(WAYS))))
def test_a_call_is_not_repeated_when_redis_has_forgotten_its_id(redis_server_all, proxy, make, way):
    """The reply is lost; then Redis is out of reach until it has forgotten the call; then it is back."""
    through = proxy(redis_server_all)
    client = redis_server_all.client()
    WAYS[way](make(redis_server_all, name="other"))  # the script is loaded
    app = make(through, **SHORT)
    app.tasks["keyed"].delay(user=1, n=0)
    send(app, way)  # a connection is there
    wait_until(lambda: not list(client.scan_iter(match="*{t.*:seen:*")))
    if "deduped" in way:  # so that the lost reply is not the one that tells the layout of the ids
        app.tasks["keyed"].apply_async(kwargs={"user": 42, "n": 0}, dedupe_id="first")
    before = there(client)

    through.cut_after_request(b"EVALSHA")
    through.refuse()
    sent = Sent(lambda: send(app, way))
    wait_until(lambda: through.cuts == 1)
    wait_until(lambda: not list(client.scan_iter(match="*{t.*:seen:*")))
    through.accept()
    sent.join()

    assert there(client) == before + 1
    if way == "many":
        assert isinstance(sent.error, BulkSendError)
        assert (sent.error.stored, sent.error.failed, sent.error.unknown) == ([], [], [0])
        assert isinstance(sent.error.__cause__, InDoubt)
    else:
        assert isinstance(sent.error, InDoubt)
    assert ("dedupe_ttl (1.5 s)" if "deduped" in way else "produce_ttl (1 s)") in str(sent.error)


def test_what_it_takes_to_connect_counts(redis_server, proxy, make):
    """A connection that comes about at last, when Redis has forgotten the call, is not used for its repetition."""
    through = proxy(redis_server)
    client = redis_server.client()
    app = make(through, produce_ttl=TTL_S, redis_timeout=5.0)
    app.tasks["keyed"].delay(user=1, n=0)
    through.cut_after_request(b"EVALSHA")
    through.refuse()
    sent = Sent(lambda: app.tasks["keyed"].delay(user=1, n=1))
    wait_until(lambda: through.cuts == 1)
    through.blackhole(hold=True)  # connections are made, and their first words arrive when it ends
    through.accept()
    wait_until(lambda: not list(client.scan_iter(match="*:seen:*")))
    through.blackhole(False)
    sent.join()
    assert isinstance(sent.error, InDoubt)
    assert numbers(client) == [0, 1]


@pytest.mark.parametrize("way", ["single", "async", "many", "delayed"])
def test_a_call_that_was_never_sent_waits_as_long_as_it_may(redis_server, proxy, make, way):
    through = proxy(redis_server)
    app = make(through, **SHORT)
    app.queue("default").shape()
    app.sender.pool.close()
    connections = through.connections
    through.refuse()
    began = time.monotonic()
    sent = Sent(lambda: send(app, way))
    wait_until(lambda: time.monotonic() > began + 1.2 * TTL_S)
    assert not sent.over
    through.accept()
    sent.join()
    assert sent.error is None
    assert through.connections > connections
    assert there(redis_server.client()) == 1


@pytest.mark.parametrize("way", ["single", "async", "many", "delayed"])
def test_out_of_memory_after_a_lost_reply_is_still_in_doubt(redis_server_all, proxy, make, way):
    """Redis refuses the repetition before it looks whether the first try was stored."""
    through = proxy(redis_server_all)
    client = redis_server_all.client()
    app = make(through, send_timeout=20 if way == "many" else 3)
    send(app, way)
    before = there(client)

    through.cut_after_request(b"EVALSHA")
    through.refuse()
    sent = Sent(lambda: send(app, way))
    wait_until(lambda: through.cuts == 1)
    exhaust_memory(redis_server_all)
    at = evalsha_calls(client)
    through.accept()
    sent.join()
    if way == "many":
        assert sent.error is None, "what is stored is answered before anything is written"
    else:
        assert evalsha_calls(client) > at + 1
        assert isinstance(sent.error, BrokerUnavailable)
        assert not isinstance(sent.error, QueueFull), "which says that nothing is stored"
    assert there(client) == before + 1


@pytest.mark.parametrize("way", ["single", "many", "async", "deduped", "delayed"])
def test_a_call_to_a_sealed_shard_goes_on_in_the_next_epoch(redis_server_all, make, way):
    app = make(redis_server_all, send_timeout=5)
    client = redis_server_all.client()
    send(app, way)
    for key in client.scan_iter(match="*{t.default.0.*:state"):
        client.hset(key, "open", "sealed")
    client.hset("streamtask:{t.default}:meta", "epoch", 1)
    send(app, way) if way != "deduped" else app.tasks["keyed"].apply_async(
        kwargs={"user": 42, "n": 1}, dedupe_id="another"
    )
    assert [
        client.xlen(f"streamtask:{{t.default.{epoch}.0}}:stream")
        + client.zcard(f"streamtask:{{t.default.{epoch}.0}}:delayed")
        for epoch in (0, 1)
    ] == [1, 1]


def test_many_shards_of_which_one_is_refused_are_each_stored_once(redis_server, make, monkeypatch):
    """One reply of a write says that Redis does not serve now: the others' calls may have been done."""
    app = make(redis_server, shards=4)
    client = redis_server.client()
    users = keys_of_shards(4)
    calls = [{"user": users[shard][0], "n": shard} for shard in range(4)]
    app.tasks["keyed"].send_many(calls)
    from streamtask.redis import link

    refused = []
    answers = link.Link.answers

    def once(self, packed):
        found = answers(self, packed)
        if not refused:
            refused.append(packed)
            self.close()
            raise link.translate_reply("READONLY You can't write against a read only replica.", "here")
        return found

    monkeypatch.setattr(link.Link, "answers", once)
    app.tasks["keyed"].send_many(calls)
    assert refused
    assert sorted(numbers(client)) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_an_async_call_waits_for_its_connection_no_longer_than_it_may(redis_server, proxy, make):
    through = proxy(redis_server)
    client = redis_server.client()
    app = make(through, produce_ttl=TTL_S, redis_timeout=5.0)

    async def main():
        await app.tasks["keyed"].adelay(user=1, n=0)
        through.cut_after_request(b"EVALSHA")
        through.refuse()
        sent = asyncio.ensure_future(app.tasks["keyed"].adelay(user=1, n=1))
        await asyncio.to_thread(wait_until, lambda: through.cuts == 1)
        through.blackhole(hold=True)
        through.accept()
        await asyncio.to_thread(wait_until, lambda: not list(client.scan_iter(match="*:seen:*")))
        through.blackhole(False)
        with pytest.raises(InDoubt):
            await sent

    asyncio.run(main())
    assert numbers(client) == [0, 1]


@pytest.mark.parametrize("way", ["single", "many"])
def test_a_try_that_comes_late_is_stored_no_second_time(redis_server, make, monkeypatch, way):
    """Redis gets the first try, which had no answer, behind one that it answered without storing it."""
    app = make(redis_server)
    client = redis_server.client()
    send(app, way)
    began = time.monotonic()
    for n in range(20):
        app.tasks["keyed"].apply_async(kwargs={"user": 42, "n": n}, countdown=60)
    # Time to send so many that a call is told to come again; the first of them must not be moved by the last.
    wait = 0.3 + (time.monotonic() - began) / 20 * 500 * 3
    due = time.time() + wait
    for n in range(500):
        app.tasks["keyed"].apply_async(kwargs={"user": 42, "n": n}, eta=dt.datetime.fromtimestamp(due, dt.timezone.utc))
    time.sleep(max(0, due - time.time()) + 0.1)
    tries = []
    for name in ("send", "call"):
        real = getattr(Link, name)
        monkeypatch.setattr(Link, name, lambda link, packed, real=real: tries.append(packed) or real(link, packed))
    send(app, way)
    monkeypatch.undo()
    assert len(tries) > 1
    before = there(client)
    with contextlib.closing(app.queue("default").broker.link()) as late:
        late.pipeline(tries)
    assert there(client) == before
