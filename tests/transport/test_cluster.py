"""Redis Cluster: all of a queue on one node or on several, slots that move, masters that die."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from kombu import Connection

from streamtask import StreamTask
from streamtask.errors import BrokerUnavailable, BulkSendError, ConfigError
from streamtask.redis import commands
from streamtask.redis.cluster import SLOTS_S
from tests.helpers import free_port, wait_until
from tests.transport.fix_servers import RedisCluster
from tests.transport.kit import Inbox, Kit, publish
from tests.transport.test_plugging import works

three_nodes = pytest.mark.parametrize("redis_cluster", [3], ids=["three nodes"], indirect=True)


def url_of(cluster: RedisCluster) -> str:
    return f"streamtask+cluster://127.0.0.1:{cluster.port}"


@pytest.mark.parametrize("redis_cluster", [1, 3], ids=["one node", "three nodes"], indirect=True)
def test_cluster(redis_cluster: RedisCluster, make_kit: Any) -> None:
    kit = make_kit(redis_cluster)
    url = url_of(redis_cluster)
    connection = kit.connect(url)
    for n in range(4):
        works(connection, f"q{n}")
    channel = kit.connect(url).channel()
    for n in range(30):
        publish(channel, n, to="q0", headers={"shard_key": f"u{n}"})
    inbox = Inbox(kit.connect(url).channel(), "q0", prefetch=10)
    for _ in range(30):
        inbox.take()[0].ack()
    assert sorted(inbox.bodies) == list(range(30))
    producer = connection.Producer()
    with producer.batch():
        for n in range(10):
            producer.publish(n, routing_key="q1")
    assert channel.queue_purge("q1") == 10
    channel.queue_delete("q1")
    assert sum(len(list(node.client().scan_iter("*kombu.q1*:stream"))) for node in redis_cluster.nodes) == 0


def test_fanout_on_a_cluster(redis_cluster: RedisCluster, make_kit: Any) -> None:
    from kombu import Exchange, Producer, Queue

    kit = make_kit(redis_cluster)
    url = url_of(redis_cluster)
    exchange = Exchange("f", type="fanout")
    channel = kit.connect(url).channel()
    queue = Queue("one", exchange)(channel)
    queue.declare()
    inbox = Inbox(channel, queue, no_ack=True)
    Producer(kit.connect(url).channel(), exchange).publish("x")
    assert inbox.take()[0].payload == "x"


def test_a_subscription_on_a_cluster_ends_each_time(redis_cluster: RedisCluster, make_kit: Any) -> None:
    from kombu import Consumer, Exchange, Queue

    channel = make_kit(redis_cluster).connect(url_of(redis_cluster)).channel()
    queue = Queue("one", Exchange("f", type="fanout"))(channel)
    queue.declare()
    heard = lambda: sum(node.client().pubsub_numpat() for node in redis_cluster.nodes)  # noqa: E731
    for _ in range(2):
        consumer = Consumer(channel, queue, no_ack=True, on_message=print)
        consumer.consume()
        assert heard() > 0
        consumer.cancel()
        wait_until(lambda: heard() == 0, 5, "somebody listens still")


@pytest.fixture
def app(redis_cluster: RedisCluster) -> Iterator[StreamTask]:
    """An app of streamtask's own with a task ``keyed``."""
    made = StreamTask("t", broker=f"redis+cluster://127.0.0.1:{redis_cluster.port}")

    @made.task(name="keyed", shard_key="user")
    def keyed(user: int) -> None: ...

    yield made
    made.close()


class Reader:
    """Takes and acknowledges what a queue has; after an error anew with a copy of its connection, as kombu's mixin does."""

    def __init__(self, kit: Kit, connection: Connection, queue: str = "q") -> None:
        self.kit = kit
        self.connection = connection
        self.queue = queue
        self.bodies: list[Any] = []
        self._inbox: Inbox | None = None

    def read_until(self, body: Any, timeout: float = 20) -> None:
        wait_until(lambda: self._read(body), timeout, lambda: f"{body!r}; came: {self.bodies}", poll=0)

    def _read(self, body: Any) -> bool:
        try:
            if self._inbox is None:
                self._inbox = Inbox(self.connection.channel(), self.queue)
            self._inbox.drain(0.1)
            while self._inbox.messages:
                message = self._inbox.messages.pop(0)
                self.bodies.append(message.payload)
                message.ack()
        except (*self.connection.connection_errors, *self.connection.channel_errors):
            self._inbox = None
            with contextlib.suppress(Exception):
                self.connection.release()
            self.connection = self.kit.clone(self.connection)
        return body in self.bodies


def test_a_url_may_name_several_nodes(redis_cluster: RedisCluster, make_kit: Any) -> None:
    """Those that are down are passed over."""
    kit = make_kit(redis_cluster)
    down, *up = free_port(), *(node.port for node in redis_cluster.nodes)
    for name, ports in (("first", [down, *up]), ("last", [*up, down])):
        works(kit.connect("streamtask+cluster://" + ",".join(f"127.0.0.1:{port}" for port in ports)), name)
    with pytest.raises(ConfigError, match="port"):
        works(kit.connect(f"streamtask+cluster://127.0.0.1:{up[0]},127.0.0.1:nonsense"))


# --- slots that move -----------------------------------------------------------------------------------------------------


def stream(kit: Kit, shard: int | str, queue: str = "q") -> str:
    """The key of a queue's stream."""
    return f"{kit.namespace}:{{kombu.{queue}.0.{shard}}}:stream"


def length(cluster: RedisCluster, key: str) -> int:
    return int(cluster.owner(key).client().xlen(key))


@three_nodes
def test_publishing_goes_on_when_slots_have_moved(redis_cluster: RedisCluster, make_kit: Any) -> None:
    """By a process that does nothing else: one call at a time, and in batches."""
    kit = make_kit(redis_cluster)
    connection = kit.connect(url_of(redis_cluster))
    channel = connection.channel()
    kit.queue(channel)
    producer = connection.Producer(channel)
    shared = stream(kit, "shared")
    publish(channel, 0, to="q")
    publish(channel, 0, to="q", headers={"shard_key": "u1"})
    keyed = next(stream(kit, n) for n in range(8) if length(redis_cluster, stream(kit, n)))
    for n in range(1, 4):
        for key in (shared, keyed):
            redis_cluster.move(key)
        publish(channel, n, to="q")
        publish(channel, n, to="q", headers={"shard_key": "u1"})
        redis_cluster.move(shared)
        with producer.batch():
            for _ in range(5):
                producer.publish(n, routing_key="q")
    assert length(redis_cluster, shared) == 4 + 15
    assert length(redis_cluster, keyed) == 4


@three_nodes
def test_consuming_goes_on_when_slots_move(redis_cluster: RedisCluster, make_kit: Any) -> None:
    kit = make_kit(redis_cluster)
    connection = kit.connect(url_of(redis_cluster))
    channel = connection.channel()
    kit.queue(channel)
    reader = Reader(kit, kit.connect(url_of(redis_cluster)))
    expected: list[str] = []
    for n in range(4):
        expected += [f"plain {n}", f"keyed {n}"]
        publish(channel, f"plain {n}", to="q")
        publish(channel, f"keyed {n}", to="q", headers={"shard_key": "u1"})
        for body in expected[-2:]:
            reader.read_until(body)
        keyed = [stream(kit, n) for n in range(8)]
        for key in (stream(kit, "shared"), *keyed):
            redis_cluster.move(key)
    assert sorted(set(reader.bodies)) == sorted(expected)


@three_nodes
def test_streamtask_producers_go_on_when_slots_have_moved(redis_cluster: RedisCluster, app: StreamTask) -> None:
    keyed = app.tasks["keyed"]
    keyed.delay(user=1)
    streams = [f"streamtask:{{t.default.0.{n}}}:stream" for n in range(8)]
    key = next(one for one in streams if length(redis_cluster, one))
    redis_cluster.move(key)
    keyed.delay(user=1)
    redis_cluster.move(key)
    keyed.send_many([{"user": n} for n in (1, 2, 3, 1)])
    redis_cluster.move(key)
    assert keyed.apply_async(kwargs={"user": 1}, dedupe_id="a").stored
    redis_cluster.move(key)
    assert not keyed.apply_async(kwargs={"user": 1}, dedupe_id="a").stored
    redis_cluster.move(key)
    keyed.apply_async(kwargs={"user": 1}, countdown=60)
    assert length(redis_cluster, key) == 5


@three_nodes
def test_many_threads_publish_while_slots_move(redis_cluster: RedisCluster, app: StreamTask) -> None:
    """They share the connections to each node: none may be kept under the name of another."""
    keyed = app.tasks["keyed"]
    streams = [f"streamtask:{{t.default.0.{n}}}:stream" for n in range(8)]
    sent = [0] * 6
    stop = threading.Event()

    def send(thread: int) -> None:
        while not stop.is_set():
            keyed.apply_async(kwargs={"user": sent[thread]}, timeout=3)
            sent[thread] += 1

    try:
        keyed.delay(user=0)
        with ThreadPoolExecutor(len(sent)) as pool:
            threads = [pool.submit(send, thread) for thread in range(len(sent))]
            for n in range(12):
                before = list(sent)
                wait_until(lambda before=before: all(now > was + 3 for now, was in zip(sent, before, strict=True)), 10)
                redis_cluster.move(streams[n % 8])
            before = list(sent)
            wait_until(lambda before=before: all(now > was + 20 for now, was in zip(sent, before, strict=True)), 10)
            stop.set()
            for thread in threads:
                thread.result(10)
        assert sum(length(redis_cluster, key) for key in streams) == sum(sent) + 1
    finally:
        stop.set()


@three_nodes
@pytest.mark.parametrize("how", ["one", "many"])
def test_a_connection_under_the_name_of_another_node_is_not_kept(
    redis_cluster: RedisCluster, app: StreamTask, how: str
) -> None:
    """As one comes there that is made while another thread learns where the slots are."""
    keyed = app.tasks["keyed"]
    queue = app.queue("default")
    mine = queue.shard_for(b"1")
    nodes = {shard: app.broker.node(queue.shard_keys(shard).stream) for shard in range(8)}
    elsewhere = next(shard for shard, node in nodes.items() if node != nodes[mine])  # type: ignore[index]
    keyed.delay(user=1)
    links = app.sender.producer.target(queue, mine).links
    for _ in range(3):
        links.append(app.broker.link(queue.shard_keys(elsewhere).stream))
    if how == "one":
        keyed.apply_async(kwargs={"user": 1}, timeout=2)
    else:
        keyed.send_many([{"user": 1}], timeout=2)
    assert length(redis_cluster, queue.shard_keys(mine).stream) == 2


# --- masters that die ----------------------------------------------------------------------------------------------------


@three_nodes
def test_a_replica_takes_the_place_of_the_node_that_the_url_names(redis_cluster: RedisCluster, make_kit: Any) -> None:
    kit = make_kit(redis_cluster)
    master = redis_cluster.nodes[0]
    queue = next(f"q{n}" for n in range(100) if redis_cluster.owner(stream(kit, "shared", f"q{n}")) is master)
    connection = kit.connect(url_of(redis_cluster))
    channel = connection.channel()
    kit.queue(channel, queue)
    reader = Reader(kit, kit.connect(url_of(redis_cluster)), queue)
    publish(channel, "before", to=queue)
    reader.read_until("before")
    redis_cluster.replicate(master)

    master.kill()

    def published() -> bool:
        try:
            publish(channel, "after", to=queue)
        except connection.recoverable_connection_errors:
            return False
        return True

    wait_until(published, 20)
    reader.read_until("after")


# --- the wrong kind of URL -----------------------------------------------------------------------------------------------


@three_nodes
def test_a_url_of_one_server_that_is_a_clusters_node(redis_cluster: RedisCluster, make_kit: Any) -> None:
    elsewhere = next(
        f"q{n}" for n in range(100) if redis_cluster.owner(f"{{kombu.q{n}}}:meta") not in redis_cluster.nodes[:1]
    )
    with pytest.raises(ConfigError, match="redis\\+cluster://"):
        make_kit(redis_cluster).channel().queue_declare(elsewhere)


def test_what_was_never_sent_is_not_in_doubt(redis_cluster: RedisCluster, app: StreamTask) -> None:
    """Where the Cluster can't even be asked which node has a shard."""
    task, pool = app.tasks["keyed"], app.sender.producer.pool
    task.send_many([{"user": n} for n in range(30)])
    for node in redis_cluster.nodes:
        node.kill()
    with pytest.raises(BrokerUnavailable):
        pool.call("k", commands.PING)  # from now on it is to be asked
    pool.close()
    time.sleep(2 * SLOTS_S)
    with pytest.raises(BulkSendError) as caught:
        task.send_many([{"user": n} for n in range(30)], timeout=2)
    assert (caught.value.stored, caught.value.unknown) == ([], [])
