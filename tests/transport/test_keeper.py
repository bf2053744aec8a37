"""The keeper: leases of a foreign process that is alive, dead, stopped or busy, and shards spread over several of them."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from streamtask.clock import mono_s
from streamtask.coordination.orders import Lost, LostShared, Order, Own, Resume, from_line
from streamtask.errors import ConfigError, StreamTaskError
from streamtask.redis.connection import Broker
from streamtask.redis.keys import SHARED, expiring
from tests.fix_redis import RedisServer, chosen_binaries
from tests.helpers import Spawned, Starved, is_alive, spawn, wait_until
from tests.transport.client import APP, GROUP, Client, make_keyed, queue_keys
from tests.transport.fix_servers import RedisCluster


class Rig:
    """Clients on one server, in this process, and what Redis says of them."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        self.redis: Any = server.client(decode_responses=True)
        self.broker = Broker(server.url)
        self.clients: list[Client] = []
        self._stack = contextlib.ExitStack()

    def client(self, name: str, *, broker: Broker | None = None, **options: Any) -> Client:
        client = Client(broker or self.broker, name, **options)
        self.clients.append(client)
        return client

    def other(self, name: str, lease_ms: int, *words: str) -> Spawned:
        """A client in a process of its own, which owns all 8 shards and the shared stream when this returns."""
        spawned = self._stack.enter_context(
            spawn("-m", "tests.transport.client", self.server.url, name, str(lease_ms), *words)
        )
        spawned.wait_line("keeper")
        return spawned

    def close(self) -> None:
        for client in self.clients:
            client.keeper.close()
        self._stack.close()
        self.broker.close()

    def until(self, condition: Callable[[], Any], timeout: float = 10) -> None:
        """Waits for a condition while the clients of this process do what they are told."""

        def pumped() -> Any:
            for client in self.clients:
                client.pump()
            return condition()

        wait_until(
            pumped, timeout, lambda: str({client.name: (client.shards, client.said()) for client in self.clients})
        )

    def pass_time(self, seconds: float) -> None:
        """For what must not happen: the clients go on for so long."""
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() > end, seconds + 10)

    def until_ready(self) -> None:
        """Waits until all keepers work, which takes a lease time or more where the machine is busy."""
        self.until(lambda: all(_ignores(client.keeper.pid, signal.SIGTERM) for client in self.clients), timeout=30)

    # What Redis says

    def now_ms(self) -> int:
        seconds, micros = self.redis.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def lease(self, shard: int, epoch: int = 0) -> dict[str, str]:
        found: dict[str, str] = self.redis.hgetall(queue_keys().shard(epoch, shard).lease(GROUP))
        return found

    def owners(self, shards: int = 8) -> list[str]:
        """The owner of each shard, '' where the lease is free or has run out."""
        now = self.now_ms()
        found = [self.lease(shard) for shard in range(shards)]
        return [lease["owner"] if lease.get("owner") and int(lease["expires_at"]) > now else "" for lease in found]

    def members(self) -> list[str]:
        found: list[str] = self.redis.zrange(queue_keys().members(GROUP), 0, -1)
        return found

    def consumers(self) -> list[str]:
        """The consumers of the shared stream whose leases hold, which must be all that the stream has."""
        keys = queue_keys().shard(0, SHARED)
        alive = queue_keys().alive(GROUP, keys, cluster=False)
        living: list[str] = self.redis.zrangebyscore(alive, self.now_ms(), "+inf")
        return sorted(set(living) & set(self.redis.zrange(keys.consumers(GROUP), 0, -1)))

    def stream_consumers(self) -> list[str]:
        keys = queue_keys().shard(0, SHARED)
        return sorted(row["name"] for row in self.redis.xinfo_consumers(keys.stream, GROUP))


@pytest.fixture
def rig(redis_server: RedisServer) -> Iterator[Rig]:
    with contextlib.closing(Rig(redis_server)) as rig:
        yield rig


@pytest.fixture
def rig_all(redis_server_all: RedisServer) -> Iterator[Rig]:
    with contextlib.closing(Rig(redis_server_all)) as rig:
        yield rig


@pytest.fixture
def own_rig(own_server: RedisServer) -> Iterator[Rig]:
    with contextlib.closing(Rig(own_server)) as rig:
        yield rig


LOST = (Lost, LostShared)


def orders_of(spawned: Spawned) -> list[Order]:
    """Behind the keeper's pid."""
    return [from_line(line.encode()) for line in list(spawned.lines)[1:]]


def keeper_of(spawned: Spawned) -> int:
    return int(next(iter(spawned.lines)).split()[1])


# A client that dies, stops, or goes away


def test_a_killed_client_leaves_nothing_though_its_child_holds_the_socket(rig_all):
    make_keyed(rig_all.broker)
    heir = rig_all.client("heir", lease_ms=5000)
    heir.join()
    victim = rig_all.other("victim", 5000, "fork")
    wait_until(lambda: rig_all.owners() == ["victim"] * 8)
    keys = queue_keys().shard(0, SHARED)
    entry = rig_all.redis.xadd(keys.stream, {"m": "1"})
    rig_all.redis.xreadgroup(GROUP, "victim", {keys.stream: ">"})
    keeper = keeper_of(victim)
    victim.kill()
    died, watch = time.monotonic(), Starved()
    wait_until(lambda: rig_all.members() == [] and rig_all.stream_consumers() == ["heir"], timeout=3)
    took = time.monotonic() - died
    print(f"given back {took:.3f} s after the kill")
    assert watch.spent < 0.5
    assert all(lease["owner"] == "" for lease in map(rig_all.lease, range(8)))
    assert rig_all.consumers() == ["heir"]
    assert rig_all.redis.zrange(keys.requeued(GROUP), 0, -1) == [entry]
    wait_until(lambda: not is_alive(keeper), timeout=3)


def test_a_client_that_ends_by_itself_is_followed(rig):
    make_keyed(rig.broker)
    client = rig.other("client", 5000)
    wait_until(lambda: rig.owners() == ["client"] * 8)
    client.signal(signal.SIGTERM)
    client.wait()
    wait_until(lambda: rig.members() == [] and not is_alive(keeper_of(client)), timeout=3)
    assert all(lease["owner"] == "" for lease in map(rig.lease, range(8)))


def test_who_is_stopped_beyond_the_lease_loses_it(rig_all):
    make_keyed(rig_all.broker)
    stopped = rig_all.other("stopped", 1000)
    wait_until(lambda: rig_all.owners() == ["stopped"] * 8)
    stopped.signal(signal.SIGSTOP)
    other = rig_all.client("other").consume()
    other.join()
    rig_all.until(lambda: other.shards == list(range(8)))
    assert all(order.by_expiry for order in other.owned.values())
    rig_all.until(lambda: rig_all.stream_consumers() == ["other"])
    other.busy = True
    stopped.signal(signal.SIGCONT)
    rig_all.until(lambda: sum(isinstance(order, Lost | LostShared) for order in orders_of(stopped)) == 9)
    owned = {order.number: order for order in orders_of(stopped) if isinstance(order, Own)}
    lost = [order for order in orders_of(stopped) if isinstance(order, Lost)]
    assert sorted(int(order.shard) for order in lost) == list(range(8))
    assert all(owned[order.number].token == order.token for order in lost)
    shared = next(order for order in orders_of(stopped) if isinstance(order, LostShared))
    assert shared.prefix == queue_keys().shard(0, SHARED).prefix
    # It is a member again, and gets its part.
    other.busy = False
    rig_all.until(lambda: rig_all.owners().count("stopped") == 4 and len(other.shards) == 4)


def test_who_was_stopped_and_not_missed_goes_on(rig):
    make_keyed(rig.broker)
    client = rig.other("client", 500)
    wait_until(lambda: rig.owners() == ["client"] * 8)
    before = [rig.lease(shard)["token"] for shard in range(8)]
    client.signal(signal.SIGSTOP)
    wait_until(lambda: rig.owners() == [""] * 8 and rig.consumers() == [])
    client.signal(signal.SIGCONT)
    wait_until(lambda: rig.owners() == ["client"] * 8 and rig.consumers() == ["client"])
    assert [rig.lease(shard)["token"] for shard in range(8)] == before
    assert not [order for order in orders_of(client) if isinstance(order, Lost | LostShared)]


def test_what_the_client_lets_go_of_runs_out(rig):
    client, other = (rig.client(name, lease_ms=1500) for name in ("client", "other"))
    rig.until_ready()
    lease = client.join()
    other.join()
    rig.pass_time(2.5)
    rig.until(lambda: rig.consumers() == ["client", "other"])
    client.keeper.forget(lease)
    rig.until(lambda: rig.stream_consumers() == ["other"])
    assert client.said() == []
    # What was forgotten is another lease by now: the new one stays.
    again = client.join()
    assert again.token > lease.token
    client.keeper.forget(lease)
    rig.pass_time(2.5)
    rig.until(lambda: rig.consumers() == ["client", "other"])


def test_signals_for_the_client_do_not_end_the_keeper(rig):
    client = rig.client("client", lease_ms=500)
    client.join()
    rig.until(lambda: _ignores(client.keeper.pid, signal.SIGTERM))
    assert os.getsid(client.keeper.pid) == client.keeper.pid
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        os.kill(client.keeper.pid, number)
    rig.pass_time(1.0)
    assert rig.consumers() == ["client"]


def _ignores(pid: int, number: int) -> bool:
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigIgn"], 16) & 1 << number - 1)


# Shards


def test_shards_are_spread_and_move_no_more_than_they_must(rig_all):
    make_keyed(rig_all.broker)
    one = rig_all.client("one").consume()
    rig_all.until(lambda: len(one.shards) == 8)
    two = rig_all.client("two").consume()
    rig_all.until(lambda: len(one.shards) == len(two.shards) == 4)
    assert sorted(one.shards + two.shards) == list(range(8))
    before = {**one.tokens, **two.tokens}
    three = rig_all.client("three").consume()
    rig_all.until(lambda: len(three.shards) == 2 and sorted(map(len, (one.shards, two.shards))) == [3, 3])
    after = {**one.tokens, **two.tokens, **three.tokens}
    assert sorted(after) == list(range(8))
    assert {shard for shard in after if after[shard] != before[shard]} == set(three.shards)
    assert all(after[shard] >= before[shard] for shard in after)
    rig_all.pass_time(1.5)
    assert {**one.tokens, **two.tokens, **three.tokens} == after
    infos = {name: json.loads(text) for name, text in rig_all.redis.hgetall(queue_keys().member_info(GROUP)).items()}
    assert {info["pid"] for info in infos.values()} == {os.getpid()}
    assert infos["two"]["host"] == socket.gethostname()
    assert infos["two"]["keeper"] == two.keeper.pid


def test_cancel_hands_over(rig_all):
    make_keyed(rig_all.broker)
    # A lease so long that nothing here can come of its running out.
    one = rig_all.client("one", lease_ms=30_000).consume()
    two = rig_all.client("two", lease_ms=30_000).consume()
    rig_all.until(lambda: len(one.shards) == len(two.shards) == 4)
    two.busy = True
    two.keeper.cancel("q")
    rig_all.until(lambda: two.asked == two.owned.keys() and rig_all.members() == ["one"])
    assert len(one.shards) == 4
    two.busy = False
    rig_all.until(lambda: len(one.shards) == 8, timeout=5)
    assert two.shards == []
    assert Resume not in two.said()
    # It may come back, also while it still gives back.
    one.busy = True
    two.consume()
    rig_all.until(lambda: len(one.asked) == 4)
    one.keeper.cancel("q")
    rig_all.until(lambda: rig_all.members() == ["two"])
    one.consume()
    rig_all.until(lambda: sorted(rig_all.members()) == ["one", "two"] and one.said().count(Resume) == 8)
    one.busy = False
    rig_all.until(lambda: len(one.shards) == len(two.shards) == 4)


def test_shards_that_come_late_are_found_at_once(rig):
    one = rig.client("one", lease_ms=30_000).consume()
    one.join()
    rig.until(lambda: rig.redis.pubsub_numsub(queue_keys().channel(GROUP))[0][1] == 1)
    assert rig.members() == []
    make_keyed(rig.broker, shards=3)
    began, watch = time.monotonic(), Starved()
    rig.until(lambda: one.shards == [0, 1, 2])
    print(f"owned {time.monotonic() - began:.3f} s after the first keyed message")
    assert watch.spent < 1.0


def test_shards_that_come_late_are_found_without_being_told(rig):
    one = rig.client("one").consume()
    rig.until(lambda: rig.redis.pubsub_numsub(queue_keys().channel(GROUP))[0][1] == 1)
    rig.redis.hset(queue_keys().meta, mapping={"epoch": 5, "shards": 2})
    rig.until(lambda: one.shards == [0, 1], timeout=5)
    assert {order.epoch for order in one.owned.values()} == {5}
    assert rig.lease(1, epoch=5)["owner"] == "one"


def test_a_queue_that_is_made_anew_has_other_shards(rig):
    make_keyed(rig.broker, 4)
    one = rig.client("one").consume()
    rig.until(lambda: one.shards == [0, 1, 2, 3])
    make_keyed(rig.broker, 2)
    rig.until(lambda: one.shards == [0, 1])
    rig.until(lambda: [rig.lease(shard)["owner"] for shard in range(4)] == ["one", "one", "", ""])
    make_keyed(rig.broker, 3, epoch=1)
    rig.until(lambda: one.shards == [0, 1, 2] and {order.epoch for order in one.owned.values()} == {1})


def test_a_client_that_stays_busy_keeps_its_shards(rig):
    make_keyed(rig.broker)
    one = rig.client("one", handover_timeout_s=0.3).consume()
    rig.until(lambda: len(one.shards) == 8)
    one.busy = True
    two = rig.client("two").consume()
    rig.until(lambda: one.said().count(Resume) >= 8)
    assert len(one.shards) == 8
    assert two.shards == []
    one.busy = False
    rig.until(lambda: len(one.shards) == len(two.shards) == 4)


def test_a_client_that_does_not_read_keeps_its_shards(rig):
    """A body may hold Python's lock for hours, while others want its shards again and again."""
    make_keyed(rig.broker, 128)
    busy = rig.client("busy", lease_ms=300, handover_timeout_s=0.01).consume()
    rig.until(lambda: len(busy.shards) == 128)
    rig.clients.remove(busy)
    try:
        rig.client("other", lease_ms=300).consume()
        beats = _beats(rig)
        rig.until(lambda: next(beats) >= 60, timeout=30)
        assert rig.owners(128) == ["busy"] * 128
    finally:
        rig.clients.append(busy)
    rig.until(lambda: len(busy.shards) == 64)


def _beats(rig: Rig) -> Iterator[int]:
    """How often the lease of shard 0 was renewed since."""
    before, count = "", 0
    while True:
        now = rig.lease(0)["expires_at"]
        count += now != before
        before = now
        yield count


# Redis goes away


@pytest.mark.slow
def test_an_outage_moves_nothing(own_rig, proxy):
    make_keyed(own_rig.broker)
    way = proxy(own_rig.server)
    via = Broker(way.url)
    one, two = (own_rig.client(name, lease_ms=1500).consume() for name in ("one", "two"))
    three = own_rig.client("three", lease_ms=1500, broker=via).consume()
    own_rig.until_ready()
    for client in own_rig.clients:
        client.join()
    own_rig.until(lambda: sorted(len(client.shards) for client in own_rig.clients) == [2, 3, 3])
    before = [client.tokens for client in (one, two, three)]
    # Not even an answer: all leases run out together.
    own_rig.server.pause()
    own_rig.pass_time(3.5)
    own_rig.server.resume()
    wait_until(lambda: own_rig.consumers() == ["one", "three", "two"] and "" not in own_rig.owners())
    own_rig.pass_time(1.5)
    assert [client.tokens for client in (one, two, three)] == before
    # Its process ends, and starts again with what was on disk.
    own_rig.server.kill()
    own_rig.pass_time(1.5)
    own_rig.server.restart()
    wait_until(lambda: own_rig.consumers() == ["one", "three", "two"] and "" not in own_rig.owners())
    own_rig.pass_time(1.5)
    assert [client.tokens for client in (one, two, three)] == before
    assert not any(kind in LOST for client in own_rig.clients for kind in client.said())
    # One alone is cut off: its shards are the others'.
    way.refuse()
    way.cut()
    own_rig.until(lambda: len(one.shards) == len(two.shards) == 4)
    own_rig.until(lambda: own_rig.consumers() == ["one", "two"])  # to others it lives a moment longer there
    way.accept()
    own_rig.until(lambda: three.lost and LostShared in three.said() and len(three.shards) >= 2)


def test_a_flush_moves_nothing(rig):
    make_keyed(rig.broker)
    one, two = (rig.client(name).consume() for name in ("one", "two"))
    rig.until(lambda: len(one.shards) == len(two.shards) == 4)
    before = {**one.tokens, **two.tokens}
    rig.redis.flushall()
    rig.until(lambda: "" not in rig.owners() and len(rig.members()) == 2)
    rig.pass_time(2.0)
    assert {**one.tokens, **two.tokens} == before
    assert {shard: int(rig.lease(shard)["token"]) for shard in range(8)} == before


def test_redis_that_is_not_there_yet_is_waited_for(own_rig):
    own_rig.server.stop()
    client = own_rig.client("client").consume()
    wait_until(lambda: _ignores(client.keeper.pid, signal.SIGTERM))
    own_rig.pass_time(1.0)
    own_rig.server.restart()
    make_keyed(own_rig.broker)
    own_rig.until(lambda: len(client.shards) == 8)


@pytest.fixture
def cluster(redis_version: str, request: pytest.FixtureRequest) -> Iterator[RedisCluster]:
    with contextlib.closing(RedisCluster(chosen_binaries(request.config)[redis_version], 2)) as cluster:
        cluster.start()
        yield cluster


@pytest.mark.slow
def test_on_a_cluster(cluster):
    """Shards on both servers; then all slots move to one of them."""
    broker = Broker(f"redis+cluster://127.0.0.1:{cluster.port}")
    nodes = {broker.node(queue_keys().shard(0, shard).state) for shard in range(8)}
    assert len(nodes) == 2
    clients = [Client(broker, name) for name in ("one", "two")]
    one, two = clients
    try:
        make_keyed(broker)
        for client in clients:
            client.consume()
            client.join()
        wait_until(lambda: [client.pump() for client in clients] and len(one.shards) == len(two.shards) == 4)
        assert sorted(one.shards + two.shards) == list(range(8))
        _move_slots(*cluster.nodes)
        before = {**one.tokens, **two.tokens}
        leases = [queue_keys().shard(0, shard).lease(GROUP) for shard in range(8)]
        client = cluster.nodes[0].client(decode_responses=True)
        for _ in range(3):
            for lease in leases:
                seen = client.hget(lease, "expires_at")
                wait_until(lambda lease=lease, seen=seen: client.hget(lease, "expires_at") > seen)
        assert [int(client.hget(lease, "token")) for lease in leases] == [before[shard] for shard in range(8)]
        consumers = queue_keys().shard(0, SHARED).consumers(GROUP)
        assert sorted(client.zrange(consumers, 0, -1)) == ["one", "two"]
        assert [kind for client in clients for kind in client.said() if kind in LOST] == []
    finally:
        for client in clients:
            client.keeper.close()
        broker.close()


def _move_slots(target: RedisServer, source: RedisServer) -> None:
    """Moves the slots of all keys that lie on one server to the other; the rest stays."""
    to, of = target.client(decode_responses=True), source.client(decode_responses=True)
    ids = [one.execute_command("CLUSTER", "MYID") for one in (to, of)]
    for slot in {of.execute_command("CLUSTER", "KEYSLOT", key) for key in of.scan_iter()}:
        to.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[1])
        of.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[0])
        while keys := of.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            of.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "REPLACE", "KEYS", *keys)
        for server in (to, of):
            server.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[0])


# What idling costs, and what is found of those who vanished


@pytest.mark.parametrize("keyed", [0, 1])
def test_idle_queues_cost_next_to_nothing(own_rig, keyed):
    """By count of commands, those within scripts included, and of a while in which no beat was late."""
    queues, shards = 40, 8
    client, other = (own_rig.client(name, lease_ms=1500) for name in ("client", "other"))
    own_rig.until_ready()
    for number in range(queues):
        for one in (client, other):
            one.queue = f"q{number}"
            one.consume()
            one.join()
        if number < keyed:
            make_keyed(own_rig.broker, shards, queue=f"q{number}")
    own_rig.until(lambda: len(client.shards) + len(other.shards) == keyed * shards)
    redis, alive = own_rig.redis, queue_keys().alive(GROUP, queue_keys().shard(0, SHARED), cluster=False)

    def commands() -> int:
        """But those by which this test looks."""
        return sum(
            row["calls"] for name, row in redis.info("commandstats").items() if name not in ("cmdstat_info", seen)
        )

    def per_beat() -> float:
        """Over six beats."""
        before, last, beats = commands(), redis.zrange(alive, 0, -1, withscores=True), 0
        while beats < 6:
            own_rig.pass_time(0.02)
            now = redis.zrange(alive, 0, -1, withscores=True)
            beats += sum(one not in last for one in now)
            last = now
        return (commands() - before) / beats

    seen = "cmdstat_zrange"
    bound = 20 + keyed * (12 + shards * 6)
    found: list[float] = []
    own_rig.until(lambda: found.append(per_beat()) or found[-1] < bound, timeout=60)
    print(f"{found[-1]:.1f} commands a beat")


@pytest.mark.slow
def test_a_consumer_is_ended_in_each_of_its_streams(rig_all):
    """Of a process that vanished with its keeper, also in streams that another joins only then."""
    victim, heir = (rig_all.client(name, lease_ms=1500) for name in ("victim", "heir"))
    rig_all.until_ready()
    streams = []
    for name in ("q", "r", "s"):
        victim.queue = heir.queue = name
        victim.join()
        if name != "s":
            heir.join()
        streams.append(queue_keys(name).shard(0, SHARED).stream)

    def names() -> list[list[str]]:
        return [sorted(row["name"] for row in rig_all.redis.xinfo_consumers(key, GROUP)) for key in streams]

    rig_all.pass_time(2.5)
    assert names() == [["heir", "victim"], ["heir", "victim"], ["victim"]]
    rig_all.clients.remove(victim)
    victim.keeper.close()  # renews no longer, and gives nothing back
    rig_all.until(lambda: names() == [["heir"], ["heir"], ["victim"]])
    alive = queue_keys().alive(GROUP, queue_keys().shard(0, SHARED), cluster=False)
    rig_all.until(lambda: rig_all.redis.zrange(alive, 0, -1) == ["heir"], timeout=20)
    heir.join()
    rig_all.until(lambda: names() == [["heir"]] * 3)


# Until when it vouches for a shard


@pytest.mark.parametrize("how", ["stopped", "killed", "cut off"])
def test_what_a_keeper_vouches_for_is_nobody_elses(rig, proxy, how):
    """As long as it renews it does; when it can't, that ends before another client may have the shard."""
    make_keyed(rig.broker)
    line = proxy(rig.server)
    one, two = rig.client("one", broker=Broker(line.url)).consume(), rig.client("two").consume()
    rig.until(lambda: len(one.shards) == len(two.shards) == 4)
    first = one.trusted()
    rig.until(lambda: all(one.trusted()[shard] > mono_s() > at - 0.8 for shard, at in first.items()))
    rig.until(lambda: min(one.trusted().values()) > max(first.values()))
    rig.clients.remove(one)
    if how == "cut off":
        line.blackhole()
    else:
        os.kill(one.keeper.pid, signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
    try:
        before = one.trusted()
        rig.until(lambda: len(two.shards) == 8)
        now = mono_s()
        assert one.trusted() == before or how == "cut off"
        assert all(at + 0.1 * one.lease_ms / 1000 <= now for at in one.trusted().values())
    finally:
        one.keeper.close()


def test_a_shard_that_is_handed_over_is_not_vouched_for(rig):
    make_keyed(rig.broker)
    one = rig.client("one", lease_ms=10_000).consume()
    one.busy = True
    rig.until(lambda: len(one.shards) == 8)
    rig.until(lambda: min(one.trusted().values()) > mono_s())
    one.keeper.cancel("q")
    rig.until(lambda: len(one.asked) == 8)
    assert set(one.trusted().values()) == {0.0}
    one.consume()
    rig.until(lambda: not one.asked and min(one.trusted().values()) > mono_s())


# The keeper dies, or is ended


def test_another_keeper_goes_on_where_one_died(rig):
    make_keyed(rig.broker)
    one, two = (rig.client(name, lease_ms=2000).consume() for name in ("one", "two"))
    shared = one.join()
    rig.until(lambda: len(one.shards) == len(two.shards) == 4)
    before, numbers = one.tokens, set(one.owned)
    os.kill(one.keeper.pid, signal.SIGKILL)
    rig.clients.remove(one)
    with pytest.raises(StreamTaskError, match=r"has ended .*-9"):
        wait_until(lambda: one.pump() and False)
    one.start()
    rig.clients.append(one)
    one.keeper.keep(shared)
    one.consume()
    # It finds by itself what is recorded as its client's, and takes it anew: Redis may have lost that another had it.
    rig.until(lambda: numbers.isdisjoint(one.owned) and len(one.shards) == 4)
    after = one.tokens
    assert after.keys() == before.keys()
    assert all(after[shard] > before[shard] for shard in after)
    rig.pass_time(3.0)
    assert one.tokens == after
    assert rig.consumers() == ["one"]
    assert not any(kind in LOST for kind in one.said() + two.said())


def test_a_new_keeper_can_be_told_of_shards(rig):
    make_keyed(rig.broker)
    one = rig.client("one", lease_ms=600).consume()
    rig.until(lambda: len(one.shards) == 8)
    before = dict(one.owned)
    os.kill(one.keeper.pid, signal.SIGKILL)
    rig.clients.remove(one)
    with pytest.raises(StreamTaskError):
        wait_until(lambda: one.pump() and False)
    # Nobody renews, and another takes shard 3.
    two = rig.client("two", lease_ms=600)
    wait_until(lambda: rig.owners() == [""] * 8)
    keys = queue_keys().shard(0, 3)
    rig.redis.hset(keys.lease(GROUP), mapping={"owner": "two", "token": before[next(iter(before))].token + 10**6,
                                               "expires_at": rig.now_ms() + 60_000, "lease_ms": 60_000})  # fmt: skip
    assert two.said() == []
    one.start()
    rig.clients.append(one)
    one.consume(before.values())
    numbers = {order.shard: number for number, order in before.items()}
    rig.until(lambda: one.lost == [3])
    assert one.keeper.trusted[numbers[3]] == 0.0
    rig.until(lambda: min(one.trusted().values()) > mono_s())
    rig.pass_time(1.0)
    assert {**one.owned} == {number: order for number, order in before.items() if order.shard != 3}
    assert rig.owners() == ["one" if shard != 3 else "two" for shard in range(8)]


def test_close_gives_back_nothing_but_leaves_the_members(rig):
    make_keyed(rig.broker)
    client = rig.client("client", lease_ms=5000).consume()
    client.join()
    rig.until(lambda: len(client.shards) == 8)
    client.keeper.close()
    client.keeper.close()
    assert not is_alive(client.keeper.pid)
    assert rig.members() == []
    assert rig.owners() == ["client"] * 8
    assert rig.consumers() == ["client"]
    rig.clients.clear()


def test_close_does_first_what_was_asked_before(rig):
    make_keyed(rig.broker)
    client = rig.client("client", lease_ms=30_000).consume()
    rig.until(lambda: len(client.shards) == 8)
    client.keeper.cancel("q")
    for number in client.owned:
        client.keeper.released(number)
    client.keeper.close()
    rig.clients.clear()
    assert [rig.lease(shard)["owner"] for shard in range(8)] == [""] * 8


def test_a_keeper_that_nobody_holds_any_more_gives_all_back(rig):
    """As when the client becomes another program (exec): then nobody can end what it had."""
    client = rig.client("client", lease_ms=30_000)
    client.join()
    keeper = client.keeper
    rig.until(lambda: _ignores(keeper.pid, signal.SIGTERM))
    keeper._sock.close()
    rig.clients.clear()
    wait_until(lambda: rig.stream_consumers() == [])
    assert keeper._process.wait(5) == 0


def test_a_forked_child_does_not_end_its_parents_keeper(rig):
    make_keyed(rig.broker)
    client = rig.client("client", lease_ms=600).consume()
    client.join()
    rig.until(lambda: len(client.shards) == 8)
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns where there are threads
        pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            client.keeper.close()
        os._exit(0)
    os.waitpid(pid, 0)
    rig.pass_time(1.5)
    assert rig.consumers() == ["client"]
    assert rig.owners() == ["client"] * 8


# What it is given


def test_a_queue_is_kept_from_expiring(rig):
    client = rig.client("client", lease_ms=500)
    key = expiring("streamtask", APP)
    declared = {"reply": 1_000.0, "soon": 1_000.0, "other": 1_000.0}
    rig.redis.zadd(key, declared)
    client.keeper.touch("reply", 60_000)
    client.keeper.touch("deleted", 60_000)
    rig.until(lambda: rig.redis.zscore(key, "reply") > 1_000)
    first = rig.redis.zscore(key, "reply")
    assert abs(first - rig.now_ms() - 60_000) < 5000
    rig.until(lambda: rig.redis.zscore(key, "reply") > first)
    # More often than the beats, where that is needed; and above maxmemory.
    rig.server.config_set(maxmemory="1mb", maxmemory_policy="noeviction")
    slow = rig.client("slow", lease_ms=18_000)
    slow.keeper.touch("soon", 3_000)
    rig.until(lambda: rig.redis.zscore(key, "soon") > 1_000)
    first = rig.redis.zscore(key, "soon")
    while (soon := rig.redis.zscore(key, "soon")) < first + 3_500:
        assert soon > rig.now_ms()
    slow.keeper.touch("soon", 0)
    rig.until(lambda: rig.redis.zscore(key, "soon") < rig.now_ms() - 300)
    assert sorted(rig.redis.zrange(key, 0, -1)) == sorted(declared)
    assert rig.redis.zscore(key, "other") == 1_000


def test_passwords_and_objects_travel_unseen(own_rig, tmp_path, monkeypatch):
    (tmp_path / "my_credentials.py").write_text(
        "from redis.credentials import CredentialProvider\n"
        "class Mine(CredentialProvider):\n"
        "    def get_credentials(self):\n"
        "        return ('s3cret-word',)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from my_credentials import Mine  # type: ignore[import-not-found]

    make_keyed(own_rig.broker)
    own_rig.server.config_set(requirepass="s3cret-word")
    port = own_rig.server.port
    brokers = [
        Broker(f"redis://:s3cret-word@127.0.0.1:{port}/0"),
        Broker(f"redis://127.0.0.1:{port}/0", options={"credential_provider": Mine()}),
    ]
    one, two = (own_rig.client(f"c{i}", broker=broker).consume() for i, broker in enumerate(brokers))
    own_rig.until(lambda: len(one.shards) == len(two.shards) == 4)
    for client in (one, two):
        for name in ("cmdline", "environ"):
            assert b"s3cret" not in Path(f"/proc/{client.keeper.pid}/{name}").read_bytes()
    with pytest.raises(ConfigError, match="can't be given to the process"):
        Client(Broker(f"redis://127.0.0.1:{port}/0", options={"credential_provider": lambda: 1}), "x")
    with pytest.raises(ConfigError, match="memory://"):
        Client(Broker("memory://x"), "x")


def test_it_is_small_and_imports_no_kombu(rig):
    client = rig.client("client").consume()
    client.join()
    rig.until(lambda: rig.redis.pubsub_numsub(queue_keys().channel(GROUP))[0][1] == 1)
    maps = Path(f"/proc/{client.keeper.pid}/status").read_text()
    resident = int(next(line.split()[1] for line in maps.splitlines() if line.startswith("VmRSS")))
    print(f"{resident / 1024:.1f} MB")
    assert resident < 60 * 1024
    found = os.popen(
        f"{sys.executable} -c 'import sys, streamtask.coordination.keeper_main; print(\"kombu\" in sys.modules)'"
    )
    assert found.read() == "False\n"
    assert found.close() is None
