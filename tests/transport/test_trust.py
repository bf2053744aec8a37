"""Keyed messages that wait in this process: beyond what its keeper vouches for they are shown to nobody, unless Redis says that
their shard is still this process'. Another may have run them meanwhile, and what follows them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from kombu.simple import SimpleQueue

from streamtask.clock import mono_s
from streamtask.errors import LeaseLost
from tests.fix_proxy import Proxy
from tests.fix_redis import RedisServer
from tests.helpers import wait_until
from tests.parts import sampled
from tests.transport.kit import Inbox, Kit, publish, quiet
from tests.transport.test_loop import Loop, make_loop  # noqa: F401


class Enough(Exception):
    """So many messages were shown."""


WAYS = ["drain", "drain without acknowledging", "simple queue", "loop", "get"]


class Rig:
    """One process' connection by a proxy, another's straight to the same server."""

    def __init__(self, kit: Kit, line: Proxy, direct: Kit) -> None:
        self.kit, self.line, self.direct = kit, line, direct
        self.channel = direct.channel()
        self.queue = direct.queue(self.channel)
        self.connection = kit.connect()
        self.seen: list[Any] = []
        self.others: list[Any] = []

    @property
    def session(self) -> Any:
        return self.connection.transport.session

    def publish(self, count: int, keys: int = 1 << 20) -> None:
        for n in range(count):
            publish(self.channel, n, headers={"shard_key": f"k{n % keys}"})

    def stop_keeper(self) -> None:
        os.kill(self.session.ownership.keeper().pid, signal.SIGSTOP)

    def take_over(self, *bodies: Any) -> None:
        """Another process runs these."""
        inbox = Inbox(self.direct.channel(), "q", prefetch=200)
        while not set(bodies) <= set(self.others):
            wait_until(lambda: inbox.drain(0.5), 30)
            while inbox.messages:
                message = inbox.messages.pop(0)
                self.others.append(message.payload)
                message.ack()
        inbox.channel.connection.client.release()

    def see(self, message: Any) -> None:
        self.seen.append(message.payload)


@pytest.fixture
def rig(make_kit: Any, redis_server: RedisServer, proxy: Callable[[RedisServer], Proxy]) -> Rig:
    options = {"lease": 1.0, "shards": 1, "handover_timeout": 60.0}
    direct = make_kit(redis_server, **options)
    line = proxy(redis_server)
    kit = make_kit(line, namespace=direct.namespace, socket_timeout=1, **options)
    return Rig(kit, line, direct)


def take_by(rig: Rig, way: str, make_loop: Any, most: int, meanwhile: Callable[[], None]) -> None:  # noqa: F811
    """Takes messages in one of the ways; when the first is shown, other things happen before it goes on to the next."""

    def see(message: Any) -> None:
        rig.see(message)
        if len(rig.seen) == 1:
            meanwhile()
        if len(rig.seen) == most:
            raise Enough

    channel = rig.connection.channel()
    if way == "get":
        while True:
            message = channel.basic_get("q")
            if message is not None:
                see(message)
    if way == "simple queue":
        simple = SimpleQueue(channel, "q", serializer="json")
        simple.consumer.qos(prefetch_count=200)
        while True:
            see(simple.get(timeout=10))
    inbox = Inbox(channel, "q", prefetch=200, no_ack=way == "drain without acknowledging")
    inbox.consumer.on_message = see
    if way == "loop":
        loop: Loop = make_loop(rig.connection)
        while True:
            loop.turn()
    while True:
        inbox.drain(1)


@pytest.mark.parametrize("how", ["cut off", "keeper stopped"])
@pytest.mark.parametrize("way", sampled(WAYS, "loop"))
def test_what_another_has_run_is_not_shown(rig: Rig, make_loop: Any, way: str, how: str) -> None:  # noqa: F811
    """A process that was cut off beyond its lease, or whose keeper was stopped with it, finds out before its consumer does."""
    many = 120  # more than are read at once, so that nothing need be asked to hand out the next
    rig.publish(many)

    def meanwhile() -> None:
        if how == "cut off":
            rig.line.blackhole()
        else:
            rig.stop_keeper()
        rig.take_over(*range(1, many))

    with pytest.raises(rig.connection.connection_errors):
        take_by(rig, way, make_loop, 2, meanwhile)
    assert len(rig.seen) == 1
    rig.line.blackhole(False)

    def goes_on() -> bool:
        rig.connection.collect()
        with quiet():
            inbox = Inbox(rig.connection.channel(), "q", prefetch=10)
            inbox.consumer.on_message = rig.see
            return inbox.drain_all() == []
        return False

    wait_until(goes_on, 10)
    assert len(rig.seen) == 1


@pytest.mark.parametrize("way", sampled(WAYS, "drain"))
def test_what_is_still_its_own_is_shown_though_its_keeper_is_stopped(
    rig: Rig,
    make_loop: Any,  # noqa: F811
    way: str,
) -> None:
    """Redis says so."""
    rig.publish(5)

    def meanwhile() -> None:
        keeper = rig.session.ownership.keeper()
        rig.stop_keeper()
        until = max(keeper.trusted)
        wait_until(lambda: mono_s() > until, 10)

    with pytest.raises(Enough):
        take_by(rig, way, make_loop, 5, meanwhile)
    assert rig.seen == list(range(5))


def test_who_only_gets_is_told_that_its_messages_are_anothers(rig: Rig) -> None:
    rig.publish(3)
    channel = rig.connection.channel()
    wait_until(lambda: channel.basic_get("q"))
    (consumer,) = rig.session.consumed["q"].shards.values()
    with rig.session.lock:
        rig.session.lost(consumer, "")
    with pytest.raises(LeaseLost):
        channel.basic_get("q")


def test_what_is_vouched_for_costs_no_question(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.publish(50)
    inbox = Inbox(rig.connection.channel(), "q", prefetch=100)
    inbox.take(1)
    asked: list[str] = []
    says_owned = rig.session.says_owned
    monkeypatch.setattr(rig.session, "says_owned", lambda lease, token: asked.append(lease) or says_owned(lease, token))
    inbox.take(20)
    assert asked == []
    monkeypatch.setattr(rig.session.ownership, "trusted_until", lambda consumer: 0.0)
    inbox.take(2)
    assert len(asked) == 2
    inbox.channel.close()


def test_what_waits_of_other_shards_comes_again(make_kit: Any, redis_server: RedisServer) -> None:
    """Where one shard was lost: what waited of the others goes back and comes again, with their lanes."""
    kit = make_kit(redis_server, lease=1.0, shards=4)
    channel = kit.channel()
    kit.queue(channel)
    for n in range(200):
        publish(channel, n, headers={"shard_key": f"k{n % 100}"})
    publish(channel, 200, 201)
    connection = kit.connect()
    inbox = Inbox(connection.channel(), "q", prefetch=300)
    session = connection.transport.session
    wait_until(lambda: inbox.drain(0.1) and len(connection.transport.poller._waiting) > 10)
    with session.lock:
        consumed = session.consumed["q"]
        session.lost(next(c for c in consumed.shards.values() if c.backlog.handed), "")
    with pytest.raises(connection.connection_errors):
        inbox.drain()
    connection.collect()
    seen: set[int] = set()
    inbox = Inbox(connection.channel(), "q", prefetch=300)

    def all_came() -> bool:
        with quiet():
            inbox.drain(0.1)
        while inbox.messages:
            message = inbox.messages.pop(0)
            seen.add(message.payload)
            message.ack()
        return len(seen) == 202

    wait_until(all_came, 20, lambda: str(sorted(seen)))


def test_what_waits_of_a_shard_that_is_handed_over_goes_with_it(rig: Rig) -> None:
    """It need not be run first."""
    rig.publish(30)
    inbox = Inbox(rig.connection.channel(), "q", prefetch=100)
    inbox.take(1)
    (consumer,) = rig.session.consumed["q"].shards.values()
    with rig.session.lock:
        consumer.backlog.closing = True
    assert not inbox.drain(0.3)
    assert len(inbox.messages) == 1
    assert len(consumer.backlog.handed) == 1
    with rig.session.lock:
        consumer.backlog.closing = False
        rig.session.consumed["q"].notified = True
    assert [message.payload for message in inbox.take(29)] == list(range(1, 30))
