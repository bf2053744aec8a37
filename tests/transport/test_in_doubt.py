"""Publishes whose reply was lost: neither the transport nor kombu repeats them when Redis no longer recognises them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from kombu import Exchange, Queue
from kombu.exceptions import BatchPublishError, OperationalError

from tests.fix_proxy import Proxy
from tests.fix_redis import RedisServer
from tests.helpers import wait_until
from tests.parts import sampled
from tests.transport.kit import Kit
from tests.transport.test_publish import KINDS

POLICY = {"max_retries": 1000, "interval_start": 0.02, "interval_step": 0, "interval_max": 0.02}


class Lost:
    """A kit through a proxy. ``publish`` runs while one reply is lost, and Redis is out of reach until it has forgotten it."""

    def __init__(self, make_kit: Any, server: RedisServer, proxy: Callable[[RedisServer], Proxy]) -> None:
        self.direct: Kit = make_kit(server)
        self.channel = self.direct.channel()
        self.direct.queue(self.channel)
        self.proxy = proxy(server)
        kit = make_kit(self.proxy, namespace=self.direct.namespace, produce_ttl=1.0, socket_timeout=0.3)
        self.connect: Callable[..., Any] = kit.connect

    def publish(self, call: Callable[[], Any], match: bytes = b"marked") -> BaseException | None:
        errors: list[BaseException] = []

        def run() -> None:
            try:
                call()
            except BaseException as error:
                errors.append(error)

        self.proxy.cut_after_request(match)
        self.proxy.refuse()
        thread = threading.Thread(target=run)
        thread.start()
        wait_until(lambda: self.proxy.cuts == 1)
        wait_until(lambda: not self.direct.keys("*:seen:*"))
        self.proxy.accept()
        wait_until(lambda: not thread.is_alive(), 20)
        return errors[0] if errors else None


@pytest.fixture
def lost(make_kit: Any, redis_server_all: RedisServer, proxy: Callable[[RedisServer], Proxy]) -> Lost:
    return Lost(make_kit, redis_server_all, proxy)


@pytest.mark.old_redis(next(iter(KINDS)))
@pytest.mark.parametrize("kind", sampled(KINDS, next(iter(KINDS))))
@pytest.mark.parametrize("send_timeout", [0.1, 30], ids=["kombu", "transport"])
def test_it_is_given_up(lost: Lost, kind: str, send_timeout: float) -> None:
    """By whichever of the two that repeat it."""
    producer = lost.connect(transport_options={"send_timeout": send_timeout}).Producer()
    producer.publish("before", routing_key="q", **KINDS[kind])
    error = lost.publish(
        lambda: producer.publish("marked", routing_key="q", retry=True, retry_policy=POLICY, **KINDS[kind])
    )
    assert isinstance(error, OperationalError)
    assert "produce_ttl (1 s)" in str(error)
    assert lost.channel._size("q") == 2
    producer.publish("after", routing_key="q", retry=True, retry_policy=POLICY)
    assert lost.channel._size("q") == 3


def test_a_batch_is_given_up(lost: Lost) -> None:
    producer = lost.connect(transport_options={"send_timeout": 30}).Producer()
    producer.publish("before", routing_key="q")

    def send() -> None:
        with producer.batch():
            for n in range(3):
                producer.publish(f"marked {n}", routing_key="q")

    assert isinstance(lost.publish(send), BatchPublishError)
    assert lost.channel._size("q") == 4


def test_some_of_several_queues_had_it(lost: Lost) -> None:
    """The first queue's reply came, the second's was lost: a repetition would be a second message in both."""
    exchange = Exchange("t", type="topic")
    for name in ("a", "b"):
        Queue(name, exchange, routing_key="x.*")(lost.channel).declare()
    producer = lost.connect(transport_options={"send_timeout": 0.1}).Producer(exchange=exchange)
    producer.publish("before", routing_key="x.1", retry=True, retry_policy=POLICY)
    stored = lost.channel._size("a")
    error = lost.publish(
        lambda: producer.publish("x", routing_key="x.1", retry=True, retry_policy=POLICY), match=b"{kombu.b."
    )
    assert isinstance(error, OperationalError)
    assert [lost.channel._size(name) for name in ("a", "b")] == [stored + 1, stored + 1]


def test_what_was_never_sent_is_repeated_as_long_as_kombu_wants(lost: Lost) -> None:
    producer = lost.connect(transport_options={"send_timeout": 0.1}).Producer()
    lost.proxy.refuse()
    errors: list[BaseException] = []
    tries: list[Any] = []
    policy = {**POLICY, "errback": lambda error, interval: tries.append(error)}

    def run() -> None:
        try:
            producer.publish("marked", routing_key="q", retry=True, retry_policy=policy)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: len(tries) > 60)  # at least 1.2 s
    lost.proxy.accept()
    wait_until(lambda: not thread.is_alive(), 20)
    assert errors == []
    assert lost.channel._size("q") == 1
