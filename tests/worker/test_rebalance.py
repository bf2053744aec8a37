"""Shards over processes and pods that come and go: even, and with no needless move."""

from __future__ import annotations

import time

import pytest

from tests.helpers import wait_until
from tests.parts import sampled
from tests.worker.rig import TASKS, keys_on


def moved(before, after):
    """Shards that changed their owner."""
    was = {shard: owner for owner, shards in before.items() for shard in shards}
    now = {shard: owner for owner, shards in after.items() for shard in shards}
    return {shard for shard in was if was[shard] != now[shard]}


def test_only_what_must_move_moves(redis_server, site):
    site = site(redis_server)
    for shard in range(site.shards):
        site.send(keys_on(shard, 1)[0], range(400), ms=1)
    site.send(None, range(400), ms=1)
    site.pod(1)
    one = site.ready(1)
    tokens = site.leases()
    second = site.pod(1)
    two = site.ready(2)
    assert len(moved(one, two)) == 4
    third = site.pod(1)
    three = site.ready(3)
    assert sorted(map(len, three.values())) == [2, 3, 3]
    assert len(moved(two, three)) == 2
    third.stop()
    fewer = site.ready(2)
    gone = set(three) - set(fewer)
    assert moved(three, fewer) == {shard for owner in gone for shard in three[owner]}
    second.stop()
    site.ready(1)
    site.wait_ended()
    assert site.check(killed={}).repeated == 0
    site.wait_empty()
    # Whoever never lost a shard kept its token.
    stayed = [
        shard for shard in range(site.shards) if all(shard in owned[next(iter(one))] for owned in (one, two, three))
    ]
    assert stayed
    assert all(site.leases()[shard] == tokens[shard] for shard in stayed)


def test_processes_of_a_pod_count_like_pods(redis_server, site):
    site = site(redis_server)
    site.pod(3)
    site.ready(3)
    other = site.pod(2)
    five = site.ready(5)
    assert sorted(map(len, five.values())) == [1, 1, 2, 2, 2]
    other.kill_all()
    site.ready(3)


def test_standbys_step_in(redis_server, site):
    site = site(redis_server, shards=2)
    pod = site.pod(4)
    wait_until(lambda: len(site.members()) == 4)
    wait_until(lambda: sorted(map(len, site.owned().values())) == [0, 0, 1, 1])
    site.send("a", range(300), ms=2)
    site.wait_started("a", 10)
    before = site.leases()
    victims = {info["pid"] for one, info in site.members().items() if one in {owner for owner, _ in before.values()}}
    for pid in victims:
        pod.kill_child(pid)
    site.wait_ended()
    site.check()
    wait_until(lambda: sorted(map(len, site.owned().values())) == [0, 0, 1, 1], message=lambda: str(site))
    owners = {owner for owner, _ in site.leases().values()}
    assert owners.isdisjoint(owner for owner, _ in before.values())


def test_a_running_body_keeps_its_shard_where_it_is(redis_server, site):
    """The move waits for the body, up to handover_timeout; then it is tried later."""
    site = site(redis_server, handover_timeout=0.5)
    site.pod(1)
    site.ready(1)
    keys = [keys_on(shard, 1)[0] for shard in range(site.shards)]
    site.send_gated(keys[7], 0)
    site.wait_started(keys[7], 0)
    owner = site.leases()[7]
    for key in keys:
        site.send(key, range(1, 30))
    site.pod(1)
    wait_until(lambda: len(site.members()) == 2)
    # The seven others run, here or there, though the process that holds shard 7 is busy.
    site.open_gate(0)
    site.wait_ended()
    assert site.check(killed={}).repeated == 0
    site.ready(2)
    assert owner is not None
    site.wait_empty()


def test_a_move_that_is_put_off_holds_up_no_other_key(redis_server, site):
    """A body runs for long, beside others of its shard: the owner goes on with these when the time for the move is over."""
    site = site(redis_server, shards=2, handover_timeout=0.5)
    owner = site.pod(1, 2)
    site.ready(1)
    long, other = keys_on(1, 2, 2)
    site.send_gated(long, 0)
    site.wait_started(long, 0)
    site.pod(1)
    wait_until(lambda: "hand-over put off" in owner.log)
    site.send(other, range(10))
    wait_until(lambda: site.of("E", other, 9))
    assert not site.of("E", long, 0)
    site.open_gate(0)
    site.ready(2)
    site.wait_empty()


def test_what_waits_for_an_executor_keeps_no_shard_where_it_is(redis_server, site):
    """All executors run long bodies of one shard; messages of another wait behind them, and this one is to move."""
    site = site(redis_server, shards=2)
    site.pod(1, 2)
    site.ready(1)
    for key, number in zip(keys_on(0, 2, 2), (0, 1), strict=True):
        site.send_gated(key, number)
        site.wait_started(key, number)
    waits = keys_on(1, 1, 2)[0]
    site.send(waits, range(3))
    stream = site.keys.shard(0, 1).stream
    wait_until(lambda: site.redis.xpending(stream, "workers")["pending"])
    site.pod(1, 2)
    wait_until(lambda: site.of("E", waits, 2))
    site.open_gate(0)
    site.open_gate(1)
    site.ready(2)
    site.wait_empty()
    assert site.check(killed={}).repeated == 0


@pytest.mark.more
def test_one_process_owns_as_many_shards_as_a_queue_can_have(redis_server, site):
    site = site(redis_server, shards=1024)
    pod = site.pod(1)
    site.ready(1, 40)
    for i in range(200):
        site.send(f"k{i}", range(3))
    site.send(None, range(20))
    site.wait_ended()
    assert site.check(killed={}).repeated == 0
    assert len(pod.children()) == 1
    assert pod.stop(40) >= 0
    assert site.leases() == {}


FEW = f"""
import streamtask.worker.supervisor
streamtask.worker.supervisor.MAX_LEASES = 6  # the shared stream's is one of them
{TASKS}
"""


def test_who_survives_takes_what_it_can_and_leaves_the_rest(redis_server, site):
    """Two processes that can own five shards each, of eight; then one vanishes."""
    site = site(redis_server, FEW, lease=1.0)
    first, second = site.pod(1), site.pod(1)
    site.ready(2)
    first.kill_all()
    # It may have been full before, too, and have shared: it says so once each time that it becomes full.
    wait_until(lambda: len(site.members()) == 1 and sorted(map(len, site.owned().values())) == [5]
               and "can own at most 6" in second.log.rsplit("took a lease", 1)[-1], 15,
               lambda: f"{site}\n{second.log}")  # fmt: skip
    mine, said = sorted(site.leases()), second.log.count("can own at most 6")
    for shard in range(site.shards):
        site.send(keys_on(shard, 1)[0], range(20))
    site.send(None, range(20))
    site.wait_ended(count=20 * 6)
    assert sorted(site.leases()) == mine
    assert len(second.children()) == 1
    assert second.log.count("can own at most 6") == said
    site.pod(1)
    site.wait_ended()
    site.check()
    site.ready(2)


@pytest.mark.slow
@pytest.mark.parametrize("old,new", sampled([(30.0, 2.0), (2.0, 30.0)], (2.0, 30.0)))
def test_processes_with_different_lease_times_live_side_by_side(redis_server, site, old, new):
    """A deployment that changes the setting: nobody is taken for dead, nothing runs twice."""
    long = """
@app.task(name="long")
def long(n):
    note("S", None, n)
    while not os.path.exists("gate-long"): time.sleep(0.02)
    note("E", None, n)
"""
    site = site(redis_server, TASKS + long, shards=4)
    first = site.pod(1, 2, lease=old)
    site.ready(1)
    site.task("long").delay(n=1)
    wait_until(lambda: site.of("S", None, 1))
    second = site.pod(1, 2, lease=new)
    site.ready(2, 40)  # who beats rarely looks rarely
    children, members = first.children() + second.children(), set(site.members())
    keys = [keys_on(shard, 1, site.shards)[0] for shard in range(site.shards)]
    consumers = site.keys.shard(0, "shared").consumers("workers")
    alive = site.keys.alive("workers", site.keys.shard(0, "shared"), cluster=False)
    often = (second if new < old else first).children()[0]
    name = next(one for one, info in site.members().items() if info["pid"] == often)
    beats: set[float] = set()
    n = 0
    while len(beats) < 12:  # of the one that is heard more often: some of its lease times
        beats.add(site.redis.zscore(alive, name))
        assert set(site.members()) == members
        assert site.redis.zcard(consumers) == 2
        for key in keys:
            site.send(key, [n])
        n += 1
        time.sleep(0.1)
    (site.folder / "gate-long").write_text("")
    wait_until(lambda: site.ended() == 1 + n * len(keys), 30)
    starts = [(event.key, event.n) for event in site.of("S")]
    assert len(starts) == len(set(starts)) == 1 + n * len(keys)
    assert first.children() + second.children() == children
    assert "is gone" not in str(first.log) + str(second.log)
