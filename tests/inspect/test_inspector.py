"""The inspector against real servers: what it reads is what is there, and reading leaves no trace."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from streamtask import StreamTask, StreamTaskError
from streamtask.clock import wall_ms
from streamtask.coordination import lease as leases
from streamtask.coordination.membership import Membership
from streamtask.operations import Inspector
from streamtask.queue.consumer import ShardConsumer
from streamtask.queue.delivery import Kind, Outcome
from streamtask.queue.rules import ConsumerSettings
from streamtask.redis.link import Link
from tests.fix_redis import RedisServer, chosen_binaries
from tests.one_link import OneLink

ONE, TWO = "1" * 32, "2" * 32


class Rig:
    """An app with two tasks, and owners of its shards that are driven by hand."""

    def __init__(self, url: str, **options: Any) -> None:
        self.app = StreamTask("shop", broker=url, **{"shards": 3, "lease": 0.5, **options})

        @self.app.task(name="push", shard_key="user")
        def push(user: int, text: str = "") -> None: ...

        @self.app.task(name="tidy")
        def tidy() -> None: ...

        self.push, self.tidy = push, tidy
        self.queue = self.app.queue("default")
        self.inspector = Inspector(self.app)
        self.link: Link = self.app.broker.link()

    def close(self) -> None:
        self.inspector.close()
        self.link.close()
        self.app.close()

    def own(
        self, shard: int, incarnation: str = ONE, group: str = "workers", lease_ms: int = 60_000, **settings: Any
    ) -> ShardConsumer:
        """Takes a shard and reads what waits in it."""
        self.queue.declare((group,))
        lease = leases.acquire(self.link, self.queue.shard_keys(shard), group, incarnation, lease_ms)
        assert isinstance(lease, leases.Lease)
        consumer = ShardConsumer(lease, "default", shard, ConsumerSettings(group=group, **settings), OneLink(self.link))
        self.read(consumer)
        return consumer

    def join(self, incarnation: str, lease_ms: int = 60_000) -> ShardConsumer:
        """Becomes a consumer of the shared stream."""
        self.queue.declare(("workers",))
        keys = self.queue.shard_keys("shared")
        alive = self.queue.keys.alive("workers", keys, cluster=False)
        lease = leases.join_shared(self.link, keys, "workers", incarnation, lease_ms, alive=alive)
        consumer = ShardConsumer(lease, "default", "shared", ConsumerSettings(), OneLink(self.link))
        self.read(consumer)
        return consumer

    def read(self, consumer: ShardConsumer) -> None:
        reply = self.link.call(consumer.arrivals.read_command())
        if reply:
            consumer.arrivals.absorb(reply[0][1])

    def finish(self, consumer: ShardConsumer, count: int) -> None:
        batch = consumer.hand_out(count)
        assert batch is not None
        consumer.backlog.complete(batch)
        consumer.settler.settle()

    def kill(self, consumer: ShardConsumer, count: int = 1, message: str = "ValueError: no") -> None:
        """Lets the next messages die."""
        for _ in range(count):
            batch = consumer.hand_out(1)
            assert batch is not None
            batch.outcomes.append((0, Outcome(Kind.DEAD, reason="failed", message=message, traceback="Traceback ...")))
            consumer.backlog.complete(batch)
            consumer.settler.flush()

    def beat(self, *incarnations: str, lease_ms: int = 60_000, group: str = "workers") -> None:
        Membership(self.queue.keys, group, lease_ms).beat(
            self.link, {one: {"host": "pod", "pid": 10 + i, "concurrency": 4} for i, one in enumerate(incarnations)}
        )

    def key_of(self, shard: int) -> int:
        """A shard key that lies in the shard."""
        return next(i for i in range(1000) if self.queue.shard_for(b"%d" % i) == shard)

    def send(self, shard: int, count: int = 1, **options: Any) -> None:
        for i in range(count):
            self.push.apply_async((self.key_of(shard), f"text {i}"), **options)

    def shard(self, shard: int | str) -> dict[str, Any]:
        rows = self.inspector.status("default", interval=0)["default"]["shards"]
        return next(row for row in rows if row["shard"] == shard)

    def check(self, name: str) -> dict[str, Any]:
        return next(check for check in self.inspector.doctor() if check["name"] == name)


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    with contextlib.ExitStack() as stack:

        def make(url: str, **options: Any) -> Rig:
            rig = Rig(url, **options)
            stack.callback(rig.close)
            return rig

        yield make


@pytest.fixture
def rig(redis_server: RedisServer, make_rig: Callable[..., Rig]) -> Rig:
    return make_rig(redis_server.url)


# Status


def test_a_row_of_each_shard_says_what_is_there(redis_server_all: RedisServer, make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(redis_server_all.url)
    rig.send(1, 5)
    rig.send(1, 2, countdown=1000)
    consumer = rig.own(1)
    rig.finish(consumer, 1)
    rig.kill(consumer)
    rig.send(1, 4)
    rig.beat(ONE)
    row = rig.inspector.status(interval=0)["default"]
    assert row["shards"][1] == {
        "shard": 1,
        "owner": ONE,
        "token": consumer.fence.lease.token,
        "lag": 4,
        "pending": 3,
        "delayed": 2,
        "dead": 1,
        "length": 7,
    }
    assert [one["shard"] for one in row["shards"]] == [0, 1, 2, "shared"]
    assert [one["owner"] for one in row["shards"]] == [None, ONE, None, None]
    assert (row["epoch"], row["backlog"], row["in_per_s"], row["out_per_s"]) == (0, 9, None, None)
    assert row["groups"] == [{"group": "workers", "lag": 4, "pending": 3, "backlog": 9, "members": 1}]
    (worker,) = row["workers"]
    assert {name: worker[name] for name in ("id", "host", "pid", "shards")} == {
        "id": ONE,
        "host": "pod",
        "pid": 10,
        "shards": [1],
    }


def test_without_any_worker_all_is_lag(rig: Rig) -> None:
    rig.send(0, 3)
    rig.tidy.delay()
    row = rig.inspector.status(interval=0)["default"]
    assert (row["backlog"], row["lag"], row["workers"], row["consumers"], row["groups"]) == (4, 4, [], [], [])
    assert row["shards"][0]["token"] is None


def test_an_expired_or_released_lease_has_no_owner(rig: Rig) -> None:
    rig.queue.declare(("workers",))
    lease = leases.acquire(rig.link, rig.queue.shard_keys(0), "workers", ONE, 30)
    assert isinstance(lease, leases.Lease)
    time.sleep(0.05)
    assert rig.shard(0)["owner"] is None
    assert rig.shard(0)["token"] == lease.token
    lease.renew(rig.link)
    assert rig.shard(0)["owner"] == ONE
    lease.release(rig.link)
    assert rig.shard(0)["owner"] is None


def test_lag_of_several_groups_counts_what_each_was_not_given(
    redis_server_all: RedisServer, make_rig: Callable[..., Rig]
) -> None:
    rig = make_rig(redis_server_all.url)
    rig.send(0, 6)
    rig.queue.declare(("workers", "sink"))
    consumer = rig.own(0)
    rig.finish(consumer, 2)
    rig.send(0, 4)
    groups = {one["group"]: one for one in rig.inspector.status(interval=0)["default"]["groups"]}
    # The two finished ones stay: the sink needs them.
    assert (groups["workers"]["lag"], groups["workers"]["pending"]) == (4, 4)
    assert (groups["sink"]["lag"], groups["sink"]["pending"]) == (10, 0)
    assert rig.shard(0)["length"] == 10


def test_rates_are_taken_over_the_interval(rig: Rig) -> None:
    rig.send(0, 20)
    consumer = rig.own(0)

    def work() -> None:
        time.sleep(0.2)
        rig.finish(consumer, 6)
        rig.kill(consumer)
        rig.send(0, 10)

    thread = threading.Thread(target=work)
    thread.start()
    row = rig.inspector.status(interval=1.0)["default"]
    thread.join()
    assert row["in_per_s"] == pytest.approx(10, rel=0.2)
    assert row["out_per_s"] == pytest.approx(6, rel=0.2)


def test_a_flush_between_the_samples_gives_no_negative_rates(rig: Rig, redis_server: RedisServer) -> None:
    rig.send(0, 20)
    rig.finish(rig.own(0), 5)
    timer = threading.Timer(0.1, redis_server.client().flushall)
    timer.start()
    row = rig.inspector.status(interval=0.4)["default"]
    timer.join()
    assert (row["in_per_s"], row["out_per_s"], row["backlog"]) == (0, 0, 0)


def test_reading_creates_nothing(rig: Rig, redis_server: RedisServer) -> None:
    client = redis_server.client()
    assert rig.inspector.queues() == []
    assert rig.inspector.status(interval=0) == {}
    assert rig.inspector.consumers() == []
    rig.inspector.doctor()
    for read in (rig.inspector.status, rig.inspector.consumers, rig.inspector.count_dead):
        with pytest.raises(StreamTaskError, match="no queue 'nope' in Redis"):
            read("nope")
    assert client.keys() == []
    rig.send(0)
    rig.own(0)
    rig.join(ONE)

    def dump() -> dict[bytes, bytes]:
        return {key: client.dump(key) for key in client.scan_iter()}  # type: ignore[misc]

    before = dump()
    rig.inspector.status(interval=0.01)
    rig.inspector.consumers()
    rig.inspector.dead_letters("default")
    rig.inspector.doctor()
    assert dump() == before


def test_many_shards_take_a_few_round_trips(
    redis_server: RedisServer, make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(redis_server.url, shards=300)
    rig.queue.declare(("workers",))
    sent = []
    plain = Link.pipeline
    monkeypatch.setattr(Link, "pipeline", lambda self, packed: sent.append(len(packed)) or plain(self, packed))
    assert len(rig.inspector.status(interval=0)["default"]["shards"]) == 301
    assert len(sent) <= 5


def test_other_apps_and_queues_are_kept_apart(
    rig: Rig, redis_server: RedisServer, make_rig: Callable[..., Rig]
) -> None:
    rig.send(0)
    other = StreamTask("other", broker=redis_server.url, shards=2)
    try:
        other.queue("a.b").declare()
        other.queue("default").declare()
        assert Inspector(other).queues() == ["default", "a.b"]
        assert rig.inspector.queues() == ["default"]
        assert Inspector(other).status("a.b", interval=0)["a.b"]["backlog"] == 0
    finally:
        other.close()


# Consumers


def test_consumers_of_dead_processes_are_stale(rig: Rig) -> None:
    for _ in range(3):
        rig.tidy.delay()
    rig.join(TWO, lease_ms=20)
    rig.join(ONE)
    rig.own(0)
    rig.own(1).fence.lease.release(rig.link)
    rig.beat(ONE)
    time.sleep(0.03)
    rows = {(row["shard"], row["consumer"]): row for row in rig.inspector.consumers("default")}
    dead = rows["shared", TWO]
    assert (dead["pending"], dead["alive"], dead["stale"], dead["worker"]) == (3, False, True, None)
    assert rows[0, "owner"]["worker"] == ONE
    assert (rows[0, "owner"]["host"], rows[0, "owner"]["pid"]) == ("pod", 10)
    assert not rows[0, "owner"]["stale"]
    # Read once by a group, and given back in good order: nobody's name, so it is not stale.
    if (1, "owner") in rows:
        assert (rows[1, "owner"]["alive"], rows[1, "owner"]["stale"]) == (False, False)
    workers = rig.inspector.status(interval=0)["default"]["workers"]
    assert [one["shards"] for one in workers] == [[0, "shared"]]


# Dead letters


def test_a_dead_letter_is_shown_whole(redis_server_all: RedisServer, make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(redis_server_all.url)
    sent = rig.push.delay(rig.key_of(2), text="hi")
    rig.kill(rig.own(2), message="ValueError: no such device")
    (row,) = rig.inspector.dead_letters("default")
    assert row["id"].startswith("2:")
    expected = {
        "queue": "default",
        "shard": 2,
        "group": "workers",
        "held": False,
        "reason": "failed",
        "error": "ValueError: no such device",
        "traceback": "Traceback ...",
        "task": "push",
        "task_id": sent.id,
        "key": str(rig.key_of(2)),
        "attempts": 1,
        "crashes": 0,
        "args": [rig.key_of(2)],
        "kwargs": {"text": "hi"},
        "fields": None,
    }
    assert {name: row[name] for name in expected} == expected
    assert row["dead_at"] > row["appended_at"] > "2020-"
    assert rig.inspector.dead_letter(row["id"]) == row
    assert rig.inspector.dead_letter(row["id"], "default") == row
    assert rig.inspector.count_dead() == {"default": 1}


def test_an_entry_that_is_no_message_shows_its_fields(rig: Rig, redis_server: RedisServer) -> None:
    rig.queue.declare(("workers",))
    redis_server.client().xadd(rig.queue.shard_keys(0).stream, {"held": "x", "bin": b"\xff"})
    rig.own(0).settler.flush()
    (row,) = rig.inspector.dead_letters("default")
    assert (row["reason"], row["task"], row["args"], row["held"]) == ("undecodable", None, None, False)
    assert row["fields"] == {"held": "x", "bin": "\\xff"}


@pytest.mark.parametrize("wrong", ["", "x", "3:", "3:1", ":1-1", "-1:1-1", "3:1-1-1", "9999999999:1-x"])
def test_a_wrong_id_is_refused(rig: Rig, wrong: str) -> None:
    rig.queue.declare()
    with pytest.raises(StreamTaskError, match="is no id of a dead letter"):
        rig.inspector.dead_letter(wrong)
    with pytest.raises(StreamTaskError, match="is no id of a dead letter"):
        rig.inspector.replay("default", [wrong])


@pytest.mark.parametrize("unknown", ["0:1-1", "shared:1-1", "99:1-1"])
def test_an_unknown_id_is_not_there(rig: Rig, unknown: str) -> None:
    rig.queue.declare()
    with pytest.raises(StreamTaskError, match="there is no dead letter"):
        rig.inspector.dead_letter(unknown)
    assert rig.inspector.replay("default", [unknown]) == 0


def test_lists_are_ordered_limited_and_filtered(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamtask.operations.dead_letters.BATCH", 2)
    for shard in (0, 1):
        rig.send(shard, 4)
        rig.kill(rig.own(shard), 4)
    rig.tidy.delay()
    batch_of = rig.join(ONE)
    rig.kill(batch_of)
    newest = rig.inspector.dead_letters("default", limit=100)
    assert len(newest) == 9
    assert [row["task"] for row in newest].count("tidy") == 1
    oldest = rig.inspector.dead_letters("default", limit=100, newest_first=False)
    assert [row["id"] for row in oldest] == [row["id"] for row in newest][::-1]
    assert rig.inspector.dead_letters("default", limit=3) == newest[:3]
    assert [row["shard"] for row in rig.inspector.dead_letters("default", 5, task="tidy")] == ["shared"]
    assert rig.inspector.dead_letters("default", 5, task="other") == []
    times = [row["dead_at"] for row in oldest]
    assert times == sorted(times)


def test_dead_letters_of_all_queues_are_one_list(rig: Rig) -> None:
    for name, times in (("default", (1, 4)), ("other", (2, 3))):
        queue = rig.app.queue(name)
        queue.declare()
        for ms in times:
            rig.link.command("XADD", queue.shard_keys(0).dlq, f"{ms}-0", "error", "{}")
    newest = [(row["queue"], row["id"]) for row in rig.inspector.dead_letters(limit=3)]
    assert newest == [("default", "0:4-0"), ("other", "0:3-0"), ("other", "0:2-0")]
    assert [row["id"] for row in rig.inspector.dead_letters(limit=2, newest_first=False)] == ["0:1-0", "0:2-0"]


def test_replay_of_one_some_and_all(
    redis_server_all: RedisServer, make_rig: Callable[..., Rig], monkeypatch: Any
) -> None:
    monkeypatch.setattr("streamtask.operations.dead_letters.BATCH", 2)
    rig = make_rig(redis_server_all.url)
    rig.send(0, 7)
    rig.send(1, 2)
    consumer, other = rig.own(0), rig.own(1)
    rig.kill(consumer, 7)
    rig.kill(other, 2)
    texts = [row["args"][1] for row in rig.inspector.dead_letters("default", newest_first=False) if row["shard"] == 0]
    first = rig.inspector.dead_letters("default", 1, newest_first=False)[0]["id"]
    assert rig.inspector.replay("default", [first, first]) == 1
    assert rig.inspector.replay("default", [first]) == 0
    assert rig.inspector.replay("default", task="other") == 0
    assert rig.inspector.replay("default", task="push") == 8
    assert rig.inspector.count_dead() == {"default": 0}
    rig.read(consumer)
    batch = consumer.hand_out(100)
    assert batch is not None
    assert [delivery.args[1] for delivery in batch.deliveries] == texts
    assert all(delivery.replayed for delivery in batch.deliveries)


def test_a_replay_is_for_the_group_whose_dead_letter_it_is(redis_server_all: RedisServer, make_rig: Any) -> None:
    rig = make_rig(redis_server_all.url)
    rig.queue.declare(("workers", "sink"))
    rig.send(0, 1)
    consumer, sink = rig.own(0), rig.own(0, "other", "sink")
    rig.finish(sink, 1)
    rig.kill(consumer)
    assert [row["group"] for row in rig.inspector.dead_letters("default")] == ["workers"]
    assert rig.inspector.replay("default") == 1

    rig.read(sink)
    assert sink.hand_out(10) is None
    sink.settler.settle()
    rig.read(consumer)
    batch = consumer.hand_out(10)
    assert batch is not None
    assert [delivery.replayed for delivery in batch.deliveries] == [True]
    consumer.backlog.complete(batch)
    consumer.settler.settle()
    assert rig.shard(0)["length"] == 0


def test_replay_of_all_does_not_replay_what_dies_meanwhile(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamtask.operations.dead_letters.BATCH", 1)
    rig.send(0, 3)
    consumer = rig.own(0)
    rig.kill(consumer, 3)
    ask = rig.inspector.reader.ask

    def ask_and_die(calls: Any) -> list[Any]:
        answers = ask(calls)
        if calls and b"EVALSHA" in calls[0][1][:30]:
            rig.read(consumer)
            rig.kill(consumer)
        return answers

    monkeypatch.setattr(rig.inspector.reader, "ask", ask_and_die)
    assert rig.inspector.replay("default") == 3
    assert rig.inspector.count_dead() == {"default": 3}


def test_a_held_lane_opens_at_replay_and_at_drop(rig: Rig) -> None:
    rig.send(0, 2)
    consumer = rig.own(0, hold_on_dead=True)
    rig.kill(consumer)
    (row,) = rig.inspector.dead_letters("default")
    assert row["held"]
    assert rig.shard(0)["pending"] == 2
    assert consumer.hand_out(10) is None
    assert rig.inspector.replay("default", [row["id"]]) == 1
    consumer.arrivals.reread_notes()
    rig.kill(consumer)
    assert rig.inspector.drop("default") == 1
    consumer.arrivals.reread_notes()
    batch = consumer.hand_out(10)
    assert batch is not None
    assert [delivery.args[1] for delivery in batch.deliveries] == ["text 1"]


def test_drop_removes_for_good(rig: Rig) -> None:
    rig.send(0, 3)
    consumer = rig.own(0)
    rig.kill(consumer, 3)
    rows = rig.inspector.dead_letters("default")
    assert rig.inspector.drop("default", [rows[0]["id"]]) == 1
    assert rig.inspector.drop("default", task="push") == 2
    assert rig.inspector.drop("default") == 0
    assert (rig.shard(0)["dead"], rig.shard(0)["length"]) == (0, 0)


# Purge


def test_purge_leaves_what_workers_were_given(
    redis_server_all: RedisServer, make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamtask.operations.inspector.PURGE_BATCH", 3)
    rig = make_rig(redis_server_all.url)
    rig.send(0, 3)
    consumer = rig.own(0)
    rig.send(0, 7)
    rig.send(0, 4, countdown=1000)
    rig.send(1, 5)
    rig.tidy.delay()
    assert rig.inspector.purge("default", delayed=False) == 13
    assert (rig.shard(0)["length"], rig.shard(0)["delayed"], rig.shard(1)["length"]) == (3, 4, 0)
    assert rig.inspector.purge("default") == 4
    assert rig.inspector.purge("default") == 0
    rig.finish(consumer, 3)
    rig.send(0, 1)
    rig.read(consumer)
    rig.finish(consumer, 1)
    assert rig.shard(0)["length"] == 0


def test_purge_leaves_what_any_group_was_given(rig: Rig) -> None:
    rig.send(0, 4)
    rig.queue.declare(("workers", "sink"))
    consumer = rig.own(0)
    rig.finish(consumer, 1)
    rig.send(0, 5)
    assert rig.inspector.purge("default") == 5
    assert rig.shard(0)["length"] == 4
    sink = rig.own(0, TWO, group="sink")
    rig.finish(sink, 4)
    rig.finish(consumer, 3)
    assert rig.shard(0)["length"] == 0


def test_purge_of_an_unknown_queue_creates_nothing(rig: Rig, redis_server: RedisServer) -> None:
    with pytest.raises(StreamTaskError, match="no queue 'nope'"):
        rig.inspector.purge("nope")
    assert redis_server.client().keys() == []


def test_purged_messages_count_as_come(rig: Rig) -> None:
    rig.queue.declare(("workers",))

    def work() -> None:
        time.sleep(0.1)
        rig.send(0, 10)
        with Inspector(rig.app) as other:
            other.purge("default")

    thread = threading.Thread(target=work)
    thread.start()
    row = rig.inspector.status(interval=0.5)["default"]
    thread.join()
    assert row["backlog"] == 0
    assert row["in_per_s"] == pytest.approx(20, rel=0.3)


# Doctor


def test_a_healthy_system_has_no_complaint(redis_server_all: RedisServer, make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(redis_server_all.url)
    redis_server_all.config_set(appendonly="yes", appendfsync="everysec")
    rig.send(0, 1)
    for shard in range(3):
        rig.own(shard)
    rig.join(ONE)
    rig.beat(ONE)
    checks = {check["name"]: check for check in rig.inspector.doctor()}
    # The servers of the tests ask for no password.
    assert [check["name"] for check in checks.values() if check["ok"] is not True] == ["access"]
    assert set(checks) >= {
        "redis", "access", "version", "role", "eviction", "memory", "persistence", "clock", "scripts", "id-sets",
        "shard-counts", "shard-owners", "stale-consumers", "served", "stream-ids", "dead-letters",
    }  # fmt: skip


@pytest.mark.parametrize(
    "policy, maxmemory, ok",
    [
        ("allkeys-lru", "500mb", False),
        ("volatile-ttl", "500mb", False),
        ("allkeys-lru", "0", None),
        ("noeviction", "500mb", True),
    ],
)
def test_an_evicting_policy_is_said_loudly(
    rig: Rig, redis_server: RedisServer, policy: str, maxmemory: str, ok: bool | None
) -> None:
    redis_server.config_set(maxmemory=maxmemory, maxmemory_policy=policy)
    check = rig.check("eviction")
    assert check["ok"] is ok
    assert policy in check["message"]
    assert ok is not False or "MESSAGES CAN BE LOST" in check["message"]


def test_memory_at_its_limit_fails(rig: Rig, redis_server: RedisServer) -> None:
    def used() -> int:
        return int(redis_server.client().info("memory")["used_memory"])

    rig.inspector.doctor()  # loads the scripts, which take memory too
    assert rig.inspector.full() == ""
    redis_server.config_set(maxmemory=used())
    assert rig.check("memory")["ok"] is False
    assert "Redis is full" in rig.inspector.full()
    assert "of maxmemory" in rig.inspector.full()
    redis_server.config_set(maxmemory=int(used() * 1.1))
    assert rig.check("memory")["ok"] is None


def test_no_append_only_file_is_a_warning(rig: Rig) -> None:
    check = rig.check("persistence")
    assert check["ok"] is None
    assert "appendonly is off" in check["message"]


@pytest.mark.parametrize("off_s, ok", [(0, True), (5, None), (-5, None), (100, False), (-100, False)])
def test_clocks_apart(rig: Rig, monkeypatch: pytest.MonkeyPatch, off_s: int, ok: bool | None) -> None:
    monkeypatch.setattr("streamtask.operations.doctor.wall_ms", lambda: wall_ms() + off_s * 1000)
    assert rig.check("clock")["ok"] is ok


def test_small_hash_settings_are_told(rig: Rig, redis_server: RedisServer) -> None:
    redis_server.config_set(hash_max_listpack_entries=32)
    assert rig.check("id-sets")["ok"] is None


def test_another_shard_count_is_told(rig: Rig, redis_server: RedisServer, make_rig: Callable[..., Rig]) -> None:
    rig.queue.declare()
    check = make_rig(redis_server.url, shards=5).check("shard-counts")
    assert check["ok"] is False
    assert "default has 3 in Redis, the app says 5" in check["message"]


def test_messages_that_nobody_serves(rig: Rig) -> None:
    rig.send(0, 3)
    assert "no worker has ever started (3 messages)" in rig.check("served")["message"]
    rig.queue.declare(("workers", "sink"))
    rig.beat(ONE)
    check = rig.check("served")
    assert check["ok"] is False
    assert check["message"] == "nobody works on group sink of queue default (3 messages)"


def test_shards_without_owner_and_stale_consumers(rig: Rig) -> None:
    rig.tidy.delay()
    rig.own(0)
    rig.own(2)
    rig.join(TWO, lease_ms=10)
    rig.beat(ONE)
    time.sleep(0.02)
    checks = {check["name"]: check for check in rig.inspector.doctor()}
    assert checks["shard-owners"]["ok"] is False
    assert checks["shard-owners"]["message"] == "workers live, but nobody owns default/1"
    assert checks["stale-consumers"]["ok"] is False
    assert f"default/shared/workers/{TWO}" in checks["stale-consumers"]["message"]


def test_the_doctor_and_consumers_and_status_say_the_same_of_stale_consumers(rig: Rig) -> None:
    """Of shared streams and of shards, while a worker lives and while none does."""
    rig.tidy.delay()
    rig.join(TWO, lease_ms=10)
    rig.own(0, lease_ms=10)
    rig.own(1)
    time.sleep(0.02)

    def stale() -> tuple[list[str], int, dict[str, Any]]:
        rows = [row for row in rig.inspector.consumers() if row["stale"]]
        names = sorted(f"default/{row['shard']}/workers/{row['consumer']}" for row in rows)
        shown = sum(row["stale"] for row in rig.inspector.status(interval=0)["default"]["consumers"])
        return names, shown, rig.check("stale-consumers")

    names, shown, check = stale()
    assert len(names) == shown > 0
    assert (check["ok"], check["message"].rpartition(": ")[2]) == (None, ", ".join(names))
    assert "no worker lives" in check["message"]
    rig.beat(ONE)
    names, shown, check = stale()
    assert len(names) == shown > 0
    assert (check["ok"], check["message"].rpartition(": ")[2]) == (False, ", ".join(names))


def test_what_passes_within_a_lease_time_is_no_complaint(rig: Rig) -> None:
    rig.own(0)
    rig.own(1)
    rig.beat(ONE)
    with contextlib.closing(rig.app.broker.link()) as link:
        keys = rig.queue.shard_keys(2)
        timer = threading.Timer(0.3, leases.acquire, (link, keys, "workers", ONE, 60_000))
        timer.start()
        assert rig.check("shard-owners")["ok"] is True
        timer.join()


def test_what_a_user_may_not_ask_is_a_warning(
    rig: Rig, redis_server: RedisServer, make_rig: Callable[..., Rig]
) -> None:
    redis_server.client().execute_command("ACL", "SETUSER", "ann", "on", ">pw", "~*", "+@all", "-info", "-config")
    checks = make_rig(redis_server.url.replace("//", "//ann:pw@")).inspector.doctor()
    odd = {check["name"]: check["ok"] for check in checks if check["ok"] is not True}
    assert odd == {"access": None, "server": None, "id-sets": None}


def test_who_may_use_it_without_a_password(redis_server_all: RedisServer, make_rig: Callable[..., Rig]) -> None:
    admin = redis_server_all.client()
    admin.execute_command("ACL", "SETUSER", "ann", "on", ">hunter2", "~*", "&*", "+@all")
    rig = make_rig(redis_server_all.url.replace("//", "//ann:hunter2@"))

    def told() -> tuple[bool | None, str]:
        check = rig.check("access")
        return check["ok"], check["message"]

    assert told() == (None, "every user of this machine may use it: it asks for no password")
    admin.config_set("protected-mode", "no")
    assert told() == (None, "whoever reaches Redis may use it: it asks for no password")
    for rules in (["resetpass", ">pw"], ["nopass", "off"], ["on", "nopass", "-@all", "+ping"]):
        admin.execute_command("ACL", "SETUSER", "default", *rules)
        assert told() == (True, "a connection without a password is refused"), rules


def test_a_socket_needs_no_password(request: pytest.FixtureRequest, make_rig: Callable[..., Rig]) -> None:
    with RedisServer(list(chosen_binaries(request.config).values())[-1], unix=True) as server:
        assert make_rig(server.url).check("access")["ok"] is True


def test_dead_letters_are_a_warning(rig: Rig) -> None:
    rig.send(0, 2)
    rig.kill(rig.own(0), 2)
    check = rig.check("dead-letters")
    assert (check["ok"], check["message"]) == (None, "there are dead letters: 2 in default")


def test_an_unreachable_redis_is_the_only_check(make_rig: Callable[..., Rig]) -> None:
    checks = make_rig("redis://:hunter2@127.0.0.1:1/0").inspector.doctor()
    assert [(check["name"], check["ok"]) for check in checks] == [("redis", False)]
    assert "hunter2" not in str(checks)


def test_a_server_that_goes_and_comes_back(own_server: RedisServer, make_rig: Callable[..., Rig]) -> None:
    # Under everysec a busy disk may put a write off, and a kill then loses it.
    own_server.config_set(appendfsync="always")
    rig = make_rig(own_server.url)
    rig.send(0, 2)
    assert rig.shard(0)["length"] == 2
    own_server.kill()
    with pytest.raises(ConnectionError):
        rig.inspector.status(interval=0)
    own_server.restart()
    assert rig.shard(0)["length"] == 2


# Ids and keys from outside


@pytest.mark.parametrize("stream", ["stream", "dlq", "wake"])
def test_a_stream_without_ids_is_named(rig: Rig, redis_server: RedisServer, stream: str) -> None:
    key = getattr(rig.queue.shard_keys(2), stream)
    rig.queue.declare(("workers",))
    client = redis_server.client()
    client.xadd(key, {"m": "x"}, id="9999999999999999-7")
    check = rig.check("stream-ids")
    assert check["ok"] is None
    assert f"ids of the future were appended to {key}:" in check["message"]
    client.xadd(key, {"m": "x"}, id=f"{2**64 - 1}-{2**64 - 1}")
    check = rig.check("stream-ids")
    assert check["ok"] is False
    assert f"was appended to {key}: nothing more" in check["message"]
    assert "DEL it" in check["advice"]
    client.delete(key)
    assert rig.check("stream-ids")["ok"]
