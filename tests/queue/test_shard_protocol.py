"""A property-based test of a shard's protocol: owners, crashes, lost replies and late calls in any order.

The machine drives ``ShardConsumer`` with real leases and scripts against a real server, and keeps a model beside it of what
was produced, started and finished. Whatever the order of steps, the guarantees of ``docs/guarantees.md`` must hold.
"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from streamtask.coordination.lease import Lease, Refused, acquire
from streamtask.errors import LeaseLost
from streamtask.queue.backlog import Batch
from streamtask.queue.calls import Call, ProducerSettings
from streamtask.queue.consumer import ShardConsumer
from streamtask.queue.delivery import Dead, Kind, Outcome
from streamtask.queue.producer import Producer, new_id
from streamtask.queue.queues import Queue
from streamtask.queue.rules import ConsumerSettings
from streamtask.redis import wire
from streamtask.redis.connection import Broker
from streamtask.redis.links import Pool
from tests.one_link import OneLink

KEYS = [b"a", b"b", b"c"]
GROUP = "workers"
MAX_ATTEMPTS = 2


class Owner:
    """One incarnation: its consumer, and the batches that it has taken and not ended."""

    def __init__(self, lease: Lease, consumer: ShardConsumer) -> None:
        self.lease = lease
        self.consumer = consumer
        self.batches: list[Batch] = []
        self.failed: set[bytes] = set()


class ShardMachine(RuleBasedStateMachine):
    server = None  # set by the test

    def __init__(self) -> None:
        super().__init__()
        self.server.client().flushall()
        self.broker = Broker(self.server.url)
        self.queue = Queue(Pool(self.broker), "streamtask", "app", "q", 1)
        self.queue.declare((GROUP,))
        self.keys = self.queue.shard_keys(0)
        self.link = self.broker.link()
        self.producer = Producer(ProducerSettings(), self.queue.pool)
        self.produced: dict[bytes, int] = dict.fromkeys(KEYS, 0)
        self.starts: dict[bytes, list[tuple[int, int]]] = {key: [] for key in KEYS}  # (number, token)
        self.acked: dict[bytes, set[int]] = {key: set() for key in KEYS}
        self.tokens: list[int] = []
        self.current: Owner | None = None
        self.late: list[Owner] = []
        self.names = 0

    def teardown(self) -> None:
        try:
            self.drain()
        finally:
            self.producer.close()
            self.link.close()
            self.broker.close()

    # Producing

    @rule(key=st.sampled_from(KEYS), repeat=st.booleans())
    def produce(self, key: bytes, repeat: bool) -> None:
        number = self.produced[key]
        envelope = wire.encode("t", key, new_id(), [number], {})
        call = Call(self.queue, 0, envelope)
        target = self.producer.target(self.queue, 0)
        packed = call.pack(target)
        assert isinstance(self.link.call(packed), bytes)
        if repeat:
            assert self.link.call(packed) == 0, "a repeated produce call is recognised"
        self.produced[key] += 1

    # Owners

    @rule()
    def take_over(self) -> None:
        """The owner's lease runs out and another process takes it; the old one does not know."""
        client = self.server.client()
        lease_key = self.keys.lease(GROUP)
        if client.exists(lease_key):
            client.hset(lease_key, "expires_at", 1)
        self.names += 1
        lease = acquire(self.link, self.keys, GROUP, f"inc{self.names}", 60_000)
        assert not isinstance(lease, Refused)
        assert all(token < lease.token for token in self.tokens), "tokens grow"
        again = acquire(self.link, self.keys, GROUP, f"inc{self.names}", 60_000)
        assert isinstance(again, Lease)
        assert again.token > lease.token, "a repeated acquire draws another"
        lease = again
        self.tokens.append(lease.token)
        if self.current is not None:
            self.late.append(self.current)
        consumer = ShardConsumer(
            lease, "q", 0, ConsumerSettings(group=GROUP, fetch_count=5, max_crashes=1000), OneLink(self.link)
        )
        consumer.claimer.recover(takeover=True)
        self.current = Owner(lease, consumer)

    @rule()
    def crash(self) -> None:
        """The owner's process dies with all that it knew."""
        if self.current is not None:
            self.current = None
            self.take_over()

    def fetch_raw(self, owner: Owner) -> list | None:
        try:
            return owner.consumer.arrivals.fetch(5)
        except LeaseLost:
            return None

    @rule()
    def fetch(self) -> None:
        owner = self.current
        if owner is not None and owner.consumer.arrivals.has_room():
            entries = self.fetch_raw(owner)
            assert entries is not None
            if entries:
                owner.consumer.arrivals.absorb(entries)

    @rule()
    def fetch_with_lost_reply(self) -> None:
        owner = self.current
        if owner is not None and owner.consumer.arrivals.has_room():
            self.fetch_raw(owner)
            owner.consumer.fence.needs_audit = True

    @rule()
    def audit(self) -> None:
        if self.current is not None:
            self.current.consumer.claimer.recover(takeover=False)

    # Running

    @rule(limit=st.integers(1, 4))
    def hand_out(self, limit: int) -> None:
        owner = self.current
        if owner is not None and not owner.consumer.fence.needs_audit and len(owner.batches) < 2:
            batch = owner.consumer.hand_out(limit)
            if batch is not None:
                owner.batches.append(batch)

    @rule(
        fates=st.lists(st.sampled_from(["ok", "ok", "ok", "retry", "later"]), min_size=4, max_size=4),
        stop=st.integers(0, 8),
    )
    def run(self, fates: list[str], stop: int) -> None:
        """Runs the first batch as the sequential executor does; from ``stop`` on nothing is started."""
        owner = self.current
        if owner is None or not owner.batches:
            return
        batch = owner.batches.pop(0)
        owner.failed.difference_update(batch.reopened)
        for index, delivery in enumerate(batch.deliveries):
            if owner.consumer.backlog.halted or index >= stop:
                owner.consumer.backlog.halted = True
                batch.outcomes.append((index, Outcome(Kind.UNSTARTED)))
                continue
            if delivery.lane in owner.failed:
                batch.outcomes.append((index, Outcome(Kind.SKIPPED)))
                continue
            self.start(delivery, owner.lease.token)
            fate = fates[index % len(fates)]
            attempt = delivery.note.attempt if delivery.note else 0
            if fate == "retry" and attempt >= MAX_ATTEMPTS:
                fate = "ok"
            if fate != "ok":
                batch.outcomes.append((index, Outcome(Kind(fate))))
                owner.failed.add(delivery.lane)
        owner.consumer.backlog.complete(batch)
        if not owner.consumer.backlog.handed:
            owner.consumer.backlog.halted = False

    def start(self, delivery, token: int) -> None:
        key, number = delivery.key, delivery.args[0]
        history = self.starts[key]
        assert number not in self.acked[key], f"{key} {number} runs again after its ack was applied"
        if history:
            last, last_token = history[-1]
            if token == last_token:
                assert number in (last, last + 1), f"{key}: {number} starts after {last} in one owner"
            else:
                assert number <= last + 1, f"{key}: {number} starts after {last}: one was left out"
                assert token > last_token
        else:
            assert number == 0
        unfinished = min(set(range(self.produced[key])) - self.acked[key])
        assert number >= unfinished
        history.append((number, token))

    @rule()
    def open_lanes(self) -> None:
        if self.current is not None:
            self.current.consumer.settler.flush()
            self.current.consumer.backlog.lanes.open_due(float("inf"))

    @rule(lost=st.booleans())
    def settle(self, lost: bool) -> None:
        owner = self.current
        if owner is None:
            return
        ids = list(owner.consumer.backlog.finished)
        if lost and ids:
            # The call is applied, its answer is not heard: it is sent again.
            self.link.call(owner.consumer.settler.pack_settle(ids))
            self.note_acked(ids)
        owner.consumer.settler.flush()
        owner.consumer.settler.settle()
        self.note_acked(ids)

    def note_acked(self, ids: list[bytes]) -> None:
        for entry_id in ids:
            if entry_id in self.places:
                key, number = self.places[entry_id]
                self.acked[key].add(number)

    @property
    def places(self) -> dict[bytes, tuple[bytes, int]]:
        if not hasattr(self, "_places"):
            self._places: dict[bytes, tuple[bytes, int]] = {}
        for entry_id, fields in self.server_entries():
            envelope = wire.decode([next(iter(fields)), next(iter(fields.values()))])
            self._places[entry_id] = (envelope[1], envelope[3][0])
        return self._places

    def server_entries(self) -> list:
        return self.client.xrange(self.keys.stream)

    @property
    def client(self):
        if not hasattr(self, "_client"):
            self._client = self.server.client()
        return self._client

    # Late calls

    def group_state(self) -> tuple:
        return (
            self.client.xpending_range(self.keys.stream, GROUP, "-", "+", 1000)
            and [row["message_id"] for row in self.client.xpending_range(self.keys.stream, GROUP, "-", "+", 1000)],
            self.client.xinfo_groups(self.keys.stream)[0]["last-delivered-id"],
            self.client.hgetall(self.keys.notes(GROUP)),
            self.client.xlen(self.keys.stream),
            self.client.hgetall(self.keys.lease(GROUP)),
            self.client.exists(self.keys.dlq),
        )

    @rule(which=st.integers(0, 5))
    def late_calls(self, which: int) -> None:
        """An owner that lost its lease tries everything: it is refused, and nothing changes."""
        if not self.late:
            return
        owner = self.late[which % len(self.late)]
        pending = [row["message_id"] for row in self.client.xpending_range(self.keys.stream, GROUP, "-", "+", 10)]
        before = self.group_state()
        assert self.fetch_raw(owner) is None
        consumer = owner.consumer
        for step in (
            lambda: consumer.fence.checked(self.link.call(consumer.settler.pack_settle(pending or [b"1-1"]))),
            lambda: consumer.settler.write([(e, _note()) for e in pending or [b"1-1"]]),
            lambda: consumer.settler.bury(Dead((pending or [b"1-1"])[0], Outcome(Kind.DEAD, reason="x"))),
            lambda: consumer.arrivals.fetch(0),
            lambda: owner.lease.renewed(self.link.call(owner.lease.pack_renew()), 0.0),
        ):
            with pytest.raises(LeaseLost):
                step()
        assert owner.lease.charge(self.link, dict.fromkeys([e.decode() for e in pending] or ["1-1"], True)) == -1
        assert not owner.lease.release(self.link)
        assert self.group_state() == before

    @invariant()
    def places_are_known(self) -> None:
        assert self.places is not None

    @invariant()
    def one_consumer(self) -> None:
        assert len(self.client.xinfo_consumers(self.keys.stream, GROUP)) <= 1

    # The end

    def drain(self) -> None:
        """A last owner runs all that is left: nothing is lost, and nothing remains."""
        self.take_over()
        for _ in range(1000):
            self.open_lanes()
            self.fetch()
            self.hand_out(4)
            if (
                not self.current.batches
                and not self.current.consumer.backlog.buffer
                and not len(self.current.consumer.backlog.lanes)
            ):
                if not self.fetch_raw(self.current):
                    break
                self.current.consumer.claimer.recover(takeover=False)
                continue
            while self.current.batches:
                self.run(["ok"] * 4, 8)
            self.settle(False)
        self.settle(False)
        for key in KEYS:
            started = {number for number, _ in self.starts[key]}
            assert started == set(range(self.produced[key])), f"lost: {set(range(self.produced[key])) - started}"
            assert self.acked[key] == set(range(self.produced[key]))
        assert self.client.xlen(self.keys.stream) == 0
        assert self.client.hlen(self.keys.notes(GROUP)) == 0


def _note():
    from streamtask.redis.wire import Note

    return Note(attempt=99)


def test_shard_protocol(redis_server_all, request) -> None:
    """Guarantees 1, 2, 3, 4 and 6, for one shard, in any interleaving."""

    class Machine(ShardMachine):
        server = redis_server_all

    examples = int(request.config.getoption("--protocol-examples"))
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
