"""How long a death costs, and that what was acknowledged before it never runs again."""

from __future__ import annotations

import time

from tests.chaos.checker import START
from tests.helpers import Starved, is_alive, wait_until
from tests.worker.rig import keys_on


def gap(site, key, died):
    """From a kill until the key's next start in another process."""
    found = wait_until(
        lambda: [e for e in site.of(START, key) if e.at > died and e.pid not in site.killed],
        15, lambda: f"{key} runs again: {site}",
    )  # fmt: skip
    return found[0].at - died


def test_the_children_end_with_their_supervisor(own_server, site):
    site = site(own_server)
    pod = site.pod(3)
    owned = site.ready(3)
    children = pod.children()
    assert len(children) == 3
    for i, shards in enumerate(owned.values()):
        site.send_gated(keys_on(shards[0], 1)[0], i)  # running bodies don't keep them
    site.wait_started(count=3)
    died = time.monotonic()
    pod.kill()
    wait_until(lambda: not any(map(is_alive, children)), 2, lambda: f"ended: {[c for c in children if is_alive(c)]}")
    print(f"the children ended {time.monotonic() - died:.3f} s after their supervisor")


def test_a_lone_process_is_replaced(own_server, site):
    site = site(own_server, lease=10.0)
    pod = site.pod(1)
    site.ready(1)
    key = keys_on(0, 1)[0]
    site.send(key, range(1500), ms=2)
    site.wait_started(key, 20)
    victim = pod.children()[0]
    starved = Starved()
    pod.kill_child(victim)
    took = gap(site, key, site.killed[victim])
    print(f"a lone process was replaced, and its key ran again, in {took:.3f} s")
    # Start-up of the new process on a busy machine, and little more.
    assert took - starved.seconds < 3
    site.wait_ended()
    site.check()


def test_a_sibling_takes_over(own_server, site):
    site = site(own_server, lease=10.0)
    pod = site.pod(2)
    site.ready(2)
    victim = pod.children()[0]
    shard = next(shard for shard in range(site.shards) if site.pid_of(shard) == victim)
    key = keys_on(shard, 1)[0]
    site.send(key, range(800), ms=2)
    site.send(None, range(200), ms=2)
    site.wait_started(key, 20)
    starved = Starved()
    pod.kill_child(victim)
    took = gap(site, key, site.killed[victim])
    print(f"the sibling took over in {took:.3f} s")
    assert took - starved.seconds < 1
    site.wait_ended()
    site.check()
    site.ready(2)
    site.wait_empty()
    assert site.stale_consumers() == []


def test_a_pod_that_vanished(own_server_all, site):
    site = site(own_server_all, lease=1.0)
    lost, _ = site.pod(2), site.pod(2)
    site.ready(4)
    victims = lost.children()
    shard = next(shard for shard in range(site.shards) if site.pid_of(shard) in victims)
    key = keys_on(shard, 1)[0]
    site.send(key, range(600), ms=2)
    site.send(None, range(400), ms=2)
    site.wait_started(key, 20)
    starved = Starved()
    lost.kill_all()
    took = gap(site, key, max(site.killed.values()))
    print(f"the shard of a pod that vanished ran again in {took:.3f} s (lease 1 s)")
    assert took - starved.seconds <= 2
    site.wait_ended()
    site.check()
    site.ready(2)
    site.wait_empty()
    wait_until(lambda: not site.stale_consumers(), 3, lambda: f"stale consumers {site.stale_consumers()}")


def test_nothing_acknowledged_runs_again(own_server, site):
    """Killed in a quiet moment, there is nothing to repeat at all."""
    site = site(own_server)
    pod = site.pod(2, 4)
    site.ready(2)
    for shard in range(site.shards):
        site.send(keys_on(shard, 1)[0], range(100))
    site.send(None, range(100))
    site.wait_ended()
    site.wait_empty()
    for child in pod.children():
        pod.kill_child(child)
    wait_until(lambda: len(set(pod.children()) - set(site.killed)) == 2)
    site.ready(2)
    for shard in range(site.shards):
        site.send(keys_on(shard, 1)[0], range(100, 110))
    site.wait_ended()
    assert site.check().repeated == 0


def test_a_pod_that_vanished_before_the_clock_was_set_back(own_server, site):
    """What it has left in Redis ends in the future."""
    site = site(own_server, lease=1.0)
    lost, _ = site.pod(1), site.pod(1)
    site.ready(2)
    victims = lost.children()
    theirs = [shard for shard in range(site.shards) if site.pid_of(shard) in victims]
    owner = site.leases()[theirs[0]][0]
    lost.kill_all()
    ahead = site.now_ms() + 40_000
    for shard in theirs:
        site.redis.hset(site.keys.shard(0, shard).lease("workers"), "expires_at", ahead)
    site.redis.zadd(site.keys.members("workers"), {owner: ahead})
    site.redis.zadd(site.keys.alive("workers", site.keys.shard(0, "shared"), cluster=False), {owner: ahead})
    key = keys_on(theirs[0], 1)[0]
    site.send(key, range(20))
    took = gap(site, key, max(site.killed.values()))
    print(f"ran again in {took:.3f} s (lease 1 s)")
    site.wait_ended()
    site.ready(1)
    wait_until(lambda: not site.stale_consumers(), 10, lambda: f"stale consumers {site.stale_consumers()}")
