"""Where in kombu's event loop messages are delivered: what others do before each wait must come after it."""

from __future__ import annotations

import threading

import kombu
from kombu.asynchronous.hub import Hub

import streamtask.transport  # noqa: F401  registers the scheme


class Waits:
    """Stands for Celery's pool: before each wait of the loop it sees whether there is something to write."""

    def __init__(self) -> None:
        self.delivered = 0
        self.seen = 0

    def before_wait(self) -> None:
        self.seen = self.delivered


def watch_waits(hub, what_if):
    """Records what ``what_if()`` says at the begin of each wait that ended by its time alone, with nothing to wake it."""
    found = []
    poll = hub.poller.poll

    def watched(timeout):
        said = what_if()
        events = poll(timeout)
        if timeout and not events:
            found.append(said)
        return events

    hub.poller.poll = watched
    return found


def turns(hub, until, most=200):
    loop = hub.create_loop()
    for _ in range(most):
        if until():
            return
        next(loop)
    raise AssertionError("the loop has turned often, and it did not come")


def test_whoever_looks_before_a_wait_has_seen_what_was_delivered(own_server):
    """Whatever the order of the callbacks of a tick: a pool that finds nothing to write does not look again before
    something happens."""
    for ours_first in (True, False):
        hub, pool = Hub(), Waits()
        connection = kombu.Connection(f"streamtask://127.0.0.1:{own_server.port}/0")
        queue = kombu.Queue("q", kombu.Exchange("q"), "q")

        class Ordered(list):
            """Callbacks in an order that the test chooses; the hub's own set has none."""

            def add(self, callback, place=ours_first):
                if callback not in self:
                    self.insert(0 if place else len(self), callback)

            def discard(self, callback):
                if callback in self:
                    self.remove(callback)

        hub.on_tick = Ordered([pool.before_wait])
        idle = watch_waits(hub, lambda pool=pool: pool.delivered - pool.seen)

        def receive(body, message, pool=pool):
            pool.delivered += 1
            message.ack()

        try:
            with connection, kombu.Consumer(connection, [queue], callbacks=[receive], prefetch_count=2):
                connection.register_with_event_loop(hub)
                producer = kombu.Connection(f"streamtask://127.0.0.1:{own_server.port}/0")
                sender = kombu.Producer(producer)
                for number in range(6):
                    sender.publish({"n": number}, routing_key="q", declare=[queue])
                    turns(hub, lambda number=number, pool=pool: pool.delivered == number + 1)
                    turns(hub, lambda pool=pool: pool.seen == pool.delivered)
                producer.release()
            assert not any(idle), "it waited although something was delivered that nobody had seen"
        finally:
            hub.close()


def test_an_ack_of_another_thread_wakes_the_loop(own_server):
    hub = Hub()
    connection = kombu.Connection(f"streamtask://127.0.0.1:{own_server.port}/0")
    queue = kombu.Queue("q", kombu.Exchange("q"), "q")
    messages = []
    try:
        with (
            connection,
            kombu.Consumer(
                connection, [queue], callbacks=[lambda body, message: messages.append(message)], prefetch_count=1
            ),
        ):
            connection.register_with_event_loop(hub)
            with kombu.Connection(f"streamtask://127.0.0.1:{own_server.port}/0") as other:
                for number in range(2):
                    kombu.Producer(other).publish({"n": number}, routing_key="q", declare=[queue])
            turns(hub, lambda: len(messages) == 1)
            waiting = threading.Event()

            def has_room():
                waiting.set()
                return not messages[0].channel.qos._delivered or messages[0].acknowledged

            idle = watch_waits(hub, has_room)
            acks = threading.Thread(target=lambda: waiting.wait() and messages[0].ack())
            acks.start()
            turns(hub, lambda: len(messages) == 2)
            assert not any(idle), "it waited although there was room again"
            acks.join()
            messages[1].ack()
    finally:
        hub.close()
