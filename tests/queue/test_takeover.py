"""A takeover of more pending entries than may wait in one process: nothing new is read before all of them are known."""

from __future__ import annotations

import itertools

import pytest

from streamtask.coordination.lease import Lease, acquire, join_shared
from streamtask.errors import BrokerUnavailable
from streamtask.queue.calls import ProducerSettings
from streamtask.queue.consumer import ShardConsumer
from streamtask.queue.delivery import Kind, Outcome
from streamtask.queue.producer import Producer, new_id
from streamtask.queue.queues import Queue
from streamtask.queue.rules import ConsumerSettings
from streamtask.redis import wire
from streamtask.redis.connection import Broker
from streamtask.redis.keys import SHARED
from streamtask.redis.links import Pool
from tests.helpers import end_batch
from tests.one_link import OneLink

GROUP = "workers"
KEYS = [b"a", b"b", b"c", b"d", b"e"]


class Rig:
    def __init__(self, server, shard=0):
        self.client = server.client()
        self.client.flushall()
        self.broker = Broker(server.url)
        self.queue = Queue(Pool(self.broker), "streamtask", "app", "q", 1)
        self.queue.declare((GROUP,))
        self.shard = shard
        self.keys = self.queue.shard_keys(shard)
        self.link = self.broker.link()
        self.links = OneLink(self.link)
        self.producer = Producer(ProducerSettings(), self.queue.pool)
        self.sent = dict.fromkeys(KEYS, 0)
        self.started = {key: [] for key in KEYS}
        self.names = itertools.count()

    def send(self, count, keys=KEYS):
        for key in itertools.islice(itertools.cycle(keys), count):
            self.producer.append(self.queue, self.shard, wire.encode("t", key, new_id(), [self.sent[key]], {}))
            self.sent[key] += 1

    def owner(self, **more):
        name = f"inc{next(self.names)}"
        if self.shard == SHARED:
            lease = join_shared(self.link, self.keys, GROUP, name, 60_000)
        else:
            self.client.delete(self.keys.lease(GROUP))
            lease = acquire(self.link, self.keys, GROUP, name, 60_000)
        assert isinstance(lease, Lease)
        return ShardConsumer(lease, "q", self.shard, ConsumerSettings(group=GROUP, fetch_count=50, **more), self.links)

    def fetch(self, consumer):
        entries = consumer.arrivals.fetch(50)
        if entries:
            consumer.arrivals.absorb(entries)
        return len(entries)

    def pending(self):
        return self.client.xpending(self.keys.stream, GROUP)["pending"]

    def run(self, consumer, limit, parallel, fail=()):
        """Hands out once, runs it, and settles."""
        batch = (consumer.hand_out_free if parallel else consumer.hand_out)(limit)
        odd, closed = [], set()
        for index, delivery in enumerate(batch.deliveries if batch else ()):
            number = delivery.args[0]
            if delivery.key in closed:
                odd.append((index, Outcome(Kind.SKIPPED)))
            elif (delivery.key, number) in fail and not delivery.note:
                odd.append((index, Outcome(Kind.RETRY)))
                closed.add(delivery.key)
            else:
                self.started[delivery.key].append(number)
        if batch:
            end_batch(batch, odd)
        consumer.settler.flush()
        consumer.settler.settle()
        return len(batch.ids) if batch else 0

    def close(self):
        self.producer.close()
        self.link.close()
        self.broker.close()


@pytest.fixture
def rig(redis_server_all):
    rig = Rig(redis_server_all)
    yield rig
    rig.close()


def drain(rig, consumer, limit, parallel, fail=()):
    """As the control loop: what is pending first, then what is new."""
    most = 0
    for turn in range(3000):
        if consumer.claimer.has_to_recover():
            consumer.claimer.recover_more()
        most = max(most, consumer.backlog.lanes.waiting + len(consumer.backlog.buffer))
        if turn % 7 == 3:
            consumer.claimer.recover(takeover=False)  # a connection broke: an audit
        if turn % 4 == 1:
            rig.send(1)
        consumer.backlog.lanes.open_due(float("inf"))
        ran = rig.run(consumer, limit, parallel, fail)
        read = rig.fetch(consumer) if consumer.arrivals.has_room() else 0
        if turn > 200 and not ran and not read and not rig.pending():
            return most
        if turn > 200:
            consumer.backlog.lanes.open_due(float("inf"))
            if not rig.client.xlen(rig.keys.stream):
                return most
    raise AssertionError("does not end")


@pytest.mark.parametrize("limit,parallel", [(7, False), (4, True)], ids=["in-sequence", "side-by-side"])
def test_what_is_pending_runs_before_what_is_new_however_much_it_is(rig, limit, parallel):
    rig.send(230)
    former = rig.owner()
    while rig.fetch(former):
        pass
    assert rig.pending() == 230
    rig.send(40)

    consumer = rig.owner(max_waiting=20)
    consumer.claimer.recover(takeover=True)
    assert consumer.backlog.lanes.waiting + len(consumer.backlog.buffer) == 20
    assert not consumer.arrivals.has_room()
    most = drain(rig, consumer, limit, parallel, fail={(b"a", 2), (b"b", 30), (b"c", 45)})

    assert rig.started == {key: list(range(rig.sent[key])) for key in KEYS}
    assert rig.client.xlen(rig.keys.stream) == 0
    assert most <= 20 + 50, "a fetch more than may wait"


def test_it_goes_on_with_bare_ids_and_with_what_a_former_owner_wrote_down(rig):
    """Retries that wait, and dead letters that hold their lanes, lie anywhere among the pending entries."""
    rig.send(100)
    former = rig.owner()
    while rig.fetch(former):
        pass
    failing = {(key, 10) for key in KEYS}
    for _ in range(9):
        rig.run(former, 10, False, failing)
    assert len(former.backlog.lanes) == 5
    consumer = rig.owner(max_waiting=10)
    consumer.claimer.recover(takeover=True)

    drain(rig, consumer, 4, False, failing)

    assert rig.started == {key: list(range(rig.sent[key])) for key in KEYS}


def test_a_lost_connection_in_the_middle_leaves_nothing_out(rig):
    rig.send(120)
    former = rig.owner()
    while rig.fetch(former):
        pass
    consumer = rig.owner(max_waiting=30)
    consumer.claimer.recover(takeover=True)
    rig.run(consumer, 30, False)
    assert consumer.claimer.has_to_recover()

    class Cut:
        """Breaks after the ids of a page have been told."""

        def call(self, packed):
            return rig.link.call(packed)

        def pipeline(self, packed):
            raise BrokerUnavailable("cut")

    rig.links.link = Cut()
    with pytest.raises(BrokerUnavailable):
        consumer.claimer.recover_more()
    rig.links.link = rig.link
    consumer.claimer.connection_lost()
    consumer.claimer.recover(takeover=False)

    drain(rig, consumer, 30, False)

    assert rig.started == {key: list(range(rig.sent[key])) for key in KEYS}


def test_a_shared_stream_goes_on_as_well(redis_server_all):
    rig = Rig(redis_server_all, SHARED)
    rig.send(120)
    consumer = rig.owner(max_waiting=20)
    for _ in range(3):
        rig.client.xreadgroup(GROUP, consumer.fence.consumer_name, {rig.keys.stream: ">"}, count=40)
    consumer.claimer.recover(takeover=True)
    assert not consumer.arrivals.has_room()

    drain(rig, consumer, 10, True)

    assert {key: sorted(set(numbers)) for key, numbers in rig.started.items()} == {
        key: list(range(rig.sent[key])) for key in KEYS
    }
    rig.close()
