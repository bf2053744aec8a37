"""In kombu's event loop, as a Celery worker runs it."""

from __future__ import annotations

import datetime as dt
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from kombu import Exchange, Producer, Queue
from kombu.asynchronous import Hub, set_event_loop

from tests.fix_proxy import Proxy
from tests.fix_redis import RedisServer
from tests.helpers import Starved, wait_until
from tests.transport.kit import Inbox, Kit, publish


class Loop:
    """An event loop that a test turns. It wakes at least 20 times a second if ``ticking``."""

    def __init__(self, *connections: Any, ticking: bool = True) -> None:
        self.hub = Hub()
        set_event_loop(self.hub)
        for connection in connections:
            connection.register_with_event_loop(self.hub)
        if ticking:
            self.hub.call_repeatedly(0.05, int)
        self._turns = self.hub.create_loop()

    def turn(self) -> None:
        try:
            next(self._turns)
        except BaseException:
            self._turns = self.hub.create_loop()  # as a worker does that goes on
            raise

    def until(self, condition: Callable[[], Any], timeout: float = 10) -> None:
        def turned() -> Any:
            self.turn()
            return condition()

        wait_until(turned, timeout, poll=0)

    def run(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            self.turn()

    def close(self) -> None:
        self.hub.close()
        set_event_loop(None)


@pytest.fixture
def make_loop() -> Any:
    made: list[Loop] = []

    def make(*connections: Any, **options: Any) -> Loop:
        made.append(Loop(*connections, **options))
        return made[-1]

    yield make
    for loop in made:
        loop.close()


def consuming(kit: Kit, *names: str, **options: Any) -> tuple[Any, Inbox]:
    connection = kit.connect()
    return connection, Inbox(connection.channel(), *(names or ("q",)), **options)


def calls(kit: Kit) -> int:
    """How many commands the server has run (those in a script not counted)."""
    stats: dict[str, Any] = kit.client().info("commandstats")
    return sum(stats[name]["calls"] for name in stats if name in ("cmdstat_evalsha", "cmdstat_xread"))


def test_delivers(kit_all: Kit, make_loop: Any) -> None:
    channel = kit_all.channel()
    kit_all.queue(channel)
    connection, inbox = consuming(kit_all)
    loop = make_loop(connection)
    publish(channel, "a")
    loop.until(lambda: inbox.bodies == ["a"])
    publish(channel, "b", headers={"shard_key": "u1"})
    publish(channel, "c", priority=9)
    loop.until(lambda: sorted(inbox.bodies) == ["a", "b", "c"])
    for message in inbox.messages:
        message.ack()
    loop.until(lambda: kit_all.pending() == 0)


def test_many_and_acks_in_bulk(kit: Kit, make_loop: Any) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, *range(2000))
    connection, inbox = consuming(kit, prefetch=100)
    loop = make_loop(connection)
    before, acked = calls(kit), 0

    def work() -> bool:
        nonlocal acked
        while acked < len(inbox.messages):
            inbox.messages[acked].ack()
            acked += 1
        return acked == 2000

    loop.until(work)
    assert calls(kit) - before < 200
    assert inbox.bodies == list(range(2000))
    loop.until(lambda: kit.pending() == 0)


def test_without_a_prefetch_limit_others_have_their_turn(kit: Kit, make_loop: Any) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, *range(1200))
    connection, inbox = consuming(kit)
    loop = make_loop(connection)
    turns = [0]

    def turned() -> bool:
        turns.append(len(inbox.messages))
        return turns[-1] == 1200

    loop.until(turned)
    assert max(after - before for before, after in pairwise(turns)) <= 600


def test_prefetch(kit: Kit, make_loop: Any) -> None:
    channel = kit.channel()
    kit.queue(channel)
    kit.queue(channel, "other")
    publish(channel, *range(20))
    publish(channel, *range(20), to="other")
    connection, inbox = consuming(kit, "q", "other", prefetch=5)
    loop = make_loop(connection)
    loop.run(0.5)
    assert len(inbox.messages) == 5
    inbox.messages[0].ack()
    loop.run(0.5)
    assert len(inbox.messages) == 6
    inbox.consumer.qos(prefetch_count=8)
    loop.until(lambda: len(inbox.messages) == 9)
    loop.run(0.3)
    assert len(inbox.messages) == 9


def test_an_ack_of_another_thread_wakes_the_loop(kit: Kit, make_loop: Any) -> None:
    """Pools acknowledge from threads: the next message comes at once, not with the loop's next timer."""
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, 1, 2)
    connection, inbox = consuming(kit, prefetch=1)
    loop = make_loop(connection, ticking=False)
    loop.until(lambda: inbox.messages)
    timer = threading.Timer(0.2, inbox.messages[0].ack)
    timer.start()
    began, starved = time.monotonic(), Starved()
    loop.until(lambda: len(inbox.messages) == 2)
    assert inbox.times[-1] - began < 0.8 + starved.seconds
    timer.join()


def test_a_message_wakes_the_loop(kit_all: Kit, make_loop: Any) -> None:
    channel = kit_all.channel()
    kit_all.queue(channel)
    connection, inbox = consuming(kit_all)
    loop = make_loop(connection, ticking=False)
    loop.run(1.5)
    took = []
    for n, options in enumerate([{}, {"priority": 9}, {}, {"priority": 9}]):
        timer = threading.Timer(0.3, publish, (kit_all.channel(), n), options)
        began, starved = time.monotonic(), Starved()
        timer.start()
        loop.until(lambda n=n: len(inbox.messages) == n + 1)
        took.append(inbox.times[-1] - began - 0.3 - starved.seconds)
        timer.join()
    assert max(took) < 0.5


def test_idle_costs_little(kit: Kit, make_loop: Any) -> None:
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, 1, headers={"shard_key": "a"})
    connection, inbox = consuming(kit)
    loop = make_loop(connection)
    loop.until(lambda: inbox.messages)
    inbox.messages[0].ack()
    loop.run(3)
    before = calls(kit)
    loop.run(3)
    assert calls(kit) - before < 60


def test_an_eta_that_falls_due_wakes_the_loop(kit: Kit, make_loop: Any) -> None:
    channel = kit.connect(transport_options={"eta_hold": 0}).channel()
    kit.queue(channel)
    connection, inbox = consuming(kit)
    loop = make_loop(connection, ticking=False)
    loop.run(0.1)
    for n, key in enumerate((None, "u1")):
        due = time.time() + 1.5
        eta = dt.datetime.fromtimestamp(due, dt.timezone.utc).isoformat()
        starved = Starved()
        publish(channel, 1, headers={"eta": eta, **({"shard_key": key} if key else {})})
        loop.until(lambda n=n: len(inbox.messages) == n + 1)
        assert -0.05 < time.time() - (time.monotonic() - inbox.times[-1]) - due < 0.5 + starved.seconds


@pytest.mark.parametrize("how", ["loop", "drain"])
def test_a_keeper_that_starts_for_longer_than_a_lease_costs_none(
    make_kit: Any, redis_server: RedisServer, make_loop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """As on a machine that is busy: each loss would begin with another keeper, for ever."""
    gate = tmp_path / "gate"
    waits = f"while 'STREAMTASK_KEEPER' in os.environ and not os.path.exists({str(gate)!r}): time.sleep(0.01)"
    (tmp_path / "sitecustomize.py").write_text(f"import os, time\n{waits}")
    monkeypatch.syspath_prepend(tmp_path)
    kit: Kit = make_kit(redis_server, lease=1.0)
    channel = kit.channel()
    kit.queue(channel)
    connection, inbox = consuming(kit)
    publish(channel, "a")
    publish(channel, "b", headers={"shard_key": "u1"})
    turn = make_loop(connection).turn if how == "loop" else inbox.drain
    (alive,) = kit.keys("{kombu}:alive:workers")
    client, renewals = kit.client(), set()

    def renewed() -> bool:
        turn()
        renewals.add(client.zrange(alive, 0, -1, withscores=True)[0][1])
        return len(renewals) > 3

    wait_until(renewed, 20, poll=0)
    assert inbox.bodies == ["a"]
    gate.touch()
    wait_until(lambda: turn() or sorted(inbox.bodies) == ["a", "b"], 20, poll=0)  # shards come from the keeper


def test_cancel_and_consume(kit: Kit, make_loop: Any) -> None:
    """As ``add_consumer`` and ``cancel_consumer`` do in a running worker."""
    channel = kit.channel()
    kit.queue(channel)
    kit.queue(channel, "other")
    connection, inbox = consuming(kit, "q", "other", prefetch=5)
    loop = make_loop(connection)
    publish(channel, "a")
    loop.until(lambda: inbox.bodies == ["a"])
    inbox.consumer.cancel_by_queue("q")
    publish(channel, "b")
    publish(channel, "c", to="other")
    loop.run(0.5)
    assert inbox.bodies == ["a", "c"]
    assert channel._size("q") == 1
    inbox.consumer.add_queue(Queue("q", no_declare=True))
    inbox.consumer.consume()
    loop.until(lambda: inbox.bodies == ["a", "c", "b"])


def test_cancel_inside_a_callback(kit: Kit, make_loop: Any) -> None:
    channel = kit.channel()
    kit.queue(channel)
    connection, inbox = consuming(kit, prefetch=10)
    loop = make_loop(connection)
    kept = inbox.messages

    def receive(message: Any) -> None:
        kept.append(message)
        inbox.consumer.cancel()

    inbox.consumer.on_message = receive
    publish(channel, *range(5))
    loop.run(0.5)
    assert len(kept) >= 1
    other = Inbox(kit.channel(), "q")
    assert sorted(other.drain_all() + [message.payload for message in kept]) == list(range(5))


def test_an_error_in_a_callback_loses_nothing(kit: Kit, make_loop: Any) -> None:
    channel = kit.channel()
    kit.queue(channel)
    connection, inbox = consuming(kit, prefetch=10)
    loop = make_loop(connection)
    good = inbox.consumer.on_message

    def bad(message: Any) -> None:
        raise ZeroDivisionError

    inbox.consumer.on_message = bad
    publish(channel, *range(5))
    with pytest.raises(ZeroDivisionError):
        loop.run(2)
    inbox.consumer.on_message = good
    loop.run(0.5)
    connection.release()
    assert sorted(Inbox(kit.channel(), "q").drain_all()) == list(range(5))


def go_on(
    kit: Kit, make_loop: Any, loop: Loop | None, connection: Any, inbox: Inbox, condition: Callable[[Inbox], Any]
) -> Inbox:
    """Turns the loop until the condition holds of its consumer. When it raises a connection error, makes a new connection
    and consumer, as a worker does: the consumer that is in use in the end is returned."""
    ends = time.monotonic() + 15
    while not condition(inbox):
        assert time.monotonic() < ends, inbox.bodies
        try:
            if loop is None:
                connection, inbox = consuming(kit, prefetch=10)
                loop = make_loop(connection)
            loop.run(0.1)
        except connection.connection_errors:
            if loop is not None:
                loop.close()
            loop = None
            connection.collect()
    return inbox


@pytest.mark.parametrize("who", ["normal", "pubsub"])
def test_connections_are_killed(kit: Kit, make_loop: Any, who: str) -> None:
    """CLIENT KILL: the consumer goes on, by itself or with a new connection. Nothing is lost; where the connection is new,
    what was delivered before comes first and is marked."""
    channel = kit.channel()
    kit.queue(channel)
    connection, inbox = consuming(kit, prefetch=2)
    exchange = Exchange("f", type="fanout")
    events = Queue("events", exchange)(inbox.channel)
    events.declare()
    Inbox(inbox.channel, events, no_ack=True)
    loop = make_loop(connection)
    publish(channel, *range(5))
    loop.until(lambda: len(inbox.messages) == 2)
    loop.run(0.2)
    kit.client().client_kill_filter(_type=who, skipme=True)
    before = inbox
    if who == "normal":
        publish(channel, "new", headers={"shard_key": "u1"}, retry=True)
    else:
        Producer(kit.channel(), exchange).publish("x")
    kept = 5 + (who == "normal")
    inbox.consumer.qos(prefetch_count=10)
    inbox = go_on(kit, make_loop, loop, connection, inbox, lambda inbox: len(inbox.messages) == kept)
    bodies = [body for body in inbox.bodies if body != "new"]
    assert bodies == list(range(5))
    if inbox is not before:
        for message in inbox.messages:
            assert bool(message.delivery_info.get("redelivered")) == (message.payload in before.bodies)


def test_a_new_connection_after_a_kill_works(kit: Kit) -> None:
    """All connections of the process were killed: after one error and one new connection all is well."""
    channel = kit.channel()
    kit.queue(channel)
    connection, inbox = consuming(kit, prefetch=2)
    publish(channel, 1)
    inbox.take()
    inbox.drain(0.1)  # it waits for the next
    kit.client().client_kill_filter(_type="normal", skipme=True)
    with pytest.raises(connection.connection_errors):
        inbox.drain(3)
    connection.collect()
    connection.ensure_connection(max_retries=1)
    assert [m.payload for m in Inbox(connection.channel(), "q", prefetch=1).take()] == [1]


def test_nobody_answers(make_kit: Any, redis_server: RedisServer, proxy: Any, make_loop: Any) -> None:
    """A half-open connection: found out, and a new one goes on."""
    between: Proxy = proxy(redis_server)
    direct = make_kit(redis_server)
    kit = make_kit(between, namespace=direct.namespace, socket_timeout=0.5)
    channel = direct.channel()
    direct.queue(channel)
    connection, inbox = consuming(kit, prefetch=2)
    loop = make_loop(connection)
    publish(channel, 1)
    loop.until(lambda: inbox.bodies == [1])
    inbox.messages[0].ack()
    loop.run(0.2)
    between.blackhole()
    publish(channel, 2)
    began = time.monotonic()
    with pytest.raises(connection.connection_errors):
        loop.run(15)
    assert time.monotonic() - began < 8
    between.blackhole(on=False)
    loop.close()
    connection.collect()
    connection, inbox = consuming(kit, prefetch=2)
    loop = make_loop(connection)
    loop.until(lambda: inbox.bodies == [2])


def test_the_server_restarts(own_server: RedisServer, make_kit: Any, make_loop: Any) -> None:
    kit = make_kit(own_server)
    channel = kit.channel()
    kit.queue(channel)
    connection, inbox = consuming(kit, prefetch=2)
    loop = make_loop(connection)
    publish(channel, *range(4))
    loop.until(lambda: len(inbox.messages) == 2)
    own_server.restart(kill=True)
    inbox.consumer.qos(prefetch_count=10)
    inbox = go_on(kit, make_loop, loop, connection, inbox, lambda inbox: len(inbox.messages) == 4)
    assert inbox.bodies == list(range(4))


def test_two_connections_of_a_process(kit: Kit, make_loop: Any) -> None:
    """Both in one loop, on one queue: each message once, both are served."""
    channel = kit.channel()
    kit.queue(channel)
    (one, first), (two, second) = consuming(kit, prefetch=3), consuming(kit, prefetch=3)
    loop = make_loop(one, two)
    publish(channel, *range(20))
    for n in range(5):
        publish(channel, 100 + n, headers={"shard_key": f"u{n}"})
    loop.run(0.5)
    assert (len(first.messages), len(second.messages)) == (3, 3)
    done: list[Any] = []

    def work() -> bool:
        for inbox in (first, second):
            while inbox.messages:
                message = inbox.messages.pop(0)
                done.append(message.payload)
                message.ack()
        return len(done) == 25

    loop.until(work)
    assert sorted(done) == [*range(20), *range(100, 105)]


def test_a_draining_thread_beside_the_loop(kit: Kit, make_loop: Any) -> None:
    """Another connection drains in a thread, on the same queue."""
    channel = kit.channel()
    kit.queue(channel)
    connection, inbox = consuming(kit, prefetch=1)
    loop = make_loop(connection)
    other, stop = Inbox(kit.channel(), "q", prefetch=1), threading.Event()
    errors: list[BaseException] = []
    drained: list[Any] = []

    def drain() -> None:
        try:
            while not stop.is_set():
                other.drain(0.1)
                while other.messages:
                    message = other.messages.pop()
                    drained.append(message.payload)
                    message.ack()
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=drain)
    thread.start()
    looped: list[Any] = []

    def work() -> bool:
        while inbox.messages:
            message = inbox.messages.pop()
            looped.append(message.payload)
            message.ack()
        return len(looped) + len(drained) == 300

    try:
        publish(channel, *range(300))
        loop.until(work)
    finally:
        stop.set()
        thread.join()
    assert errors == []
    assert sorted(looped + drained) == list(range(300))


def test_fanout(kit: Kit, make_loop: Any) -> None:
    exchange = Exchange("f", type="fanout")
    connection = kit.connect()
    channel = connection.channel()
    queue = Queue("events", exchange)(channel)
    queue.declare()
    inbox = Inbox(channel, queue, no_ack=True)
    loop = make_loop(connection, ticking=False)
    loop.run(0.2)
    timer = threading.Timer(0.2, Producer(kit.channel(), exchange).publish, ("x",))
    timer.start()
    began = time.monotonic()
    loop.until(lambda: inbox.bodies == ["x"])
    assert inbox.times[-1] - began < 0.8
    timer.join()


def test_a_released_connection_leaves_the_loop(kit: Kit, make_loop: Any) -> None:
    channel = kit.channel()
    kit.queue(channel)
    connection, inbox = consuming(kit)
    loop = make_loop(connection)
    publish(channel, 1)
    loop.until(lambda: inbox.messages)
    connection.release()
    assert not loop.hub.readers
    loop.run(0.3)
    publish(channel, 2)
    loop.run(0.3)
    assert len(inbox.messages) == 1


def test_acks_while_the_prefetch_is_full(kit: Kit, make_loop: Any) -> None:
    """With nothing to wait for, too, what was acknowledged is written."""
    channel = kit.channel()
    kit.queue(channel)
    publish(channel, 1, 2)
    connection, inbox = consuming(kit, prefetch=2)
    loop = make_loop(connection)
    loop.until(lambda: len(inbox.messages) == 2)
    inbox.messages[0].ack()
    loop.until(lambda: kit.pending() == 1)
