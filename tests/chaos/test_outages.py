"""Redis away, connections cut and replies lost: no process dies, so every message runs exactly once and in order."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from tests.helpers import wait_until
from tests.worker.rig import keys_on

LEASE = 1.0


def long_bodies(site, owned):
    """Starts a long body in each process, with followers and neighbours behind it."""
    for i, shards in enumerate(owned.values()):
        key, other = keys_on(shards[0], 2)
        site.send_gated(key, i)
        site.wait_started(key, i)
        site.send(key, range(100, 130))
        site.send(other, range(30))
    site.send(None, range(30))


def survives(site, pods, processes, away, back, leases=2.2):
    """An outage longer than the lease kills no body, runs none twice and moves no shard."""
    owned = site.ready(processes)
    children = [pod.children() for pod in pods]
    before = site.leases()
    assert len(before) == site.shards
    long_bodies(site, owned)
    away()
    try:
        time.sleep(LEASE * leases)
        for i in range(len(owned)):
            if i % 2 == 0:
                site.open_gate(i)  # some end while Redis is away, some later
    finally:
        back()
    time.sleep(0.3)
    for i in range(len(owned)):
        site.open_gate(i)
    site.wait_ended()
    assert site.check(killed={}).repeated == 0
    assert [pod.children() for pod in pods] == children
    assert wait_until(lambda: len(site.leases()) == site.shards and site.leases()) == before
    for shard in range(site.shards):
        site.send(keys_on(shard, 3)[2], range(20))
    site.wait_ended()
    site.wait_empty()
    assert site.check(killed={}).repeated == 0
    assert site.dead() == []
    wait_until(lambda: not site.stale_consumers(), LEASE + 2, lambda: f"stale consumers {site.stale_consumers()}")


def test_redis_stops_for_longer_than_the_lease(own_server, site):
    site = site(own_server, lease=LEASE)
    pods = [site.pod(2), site.pod(1)]
    survives(site, pods, 3, own_server.stop, own_server.start)


@pytest.mark.quick
def test_redis_is_killed_and_away_for_longer_than_the_lease(own_server_all, site):
    site = site(own_server_all, lease=LEASE)
    pods = [site.pod(2), site.pod(1)]
    survives(site, pods, 3, own_server_all.kill, own_server_all.start)


@pytest.mark.parametrize("leases", [2.2, 6])
def test_redis_hangs_for_longer_than_the_lease(own_server, site, leases):
    """Also for so long that whoever is gone would have been forgotten: all calls that waited are answered at once then."""
    site = site(own_server, lease=LEASE, redis_timeout=1.0)
    pods = [site.pod(2), site.pod(1)]
    survives(site, pods, 3, own_server.pause, own_server.resume, leases)


def test_redis_refuses_the_password_for_longer_than_the_lease(own_server, site):
    """As while it is being changed, or after a failover to a replica that has not the users yet."""
    site = site(own_server, lease=LEASE)
    pods = [site.pod(2), site.pod(1)]
    back = []
    survives(site, pods, 3, lambda: back.append(own_server.lock_out()), lambda: back.pop()())
    for pod in pods:
        assert "refused the user or password" in pod.log
        assert "Traceback" not in pod.log


@pytest.mark.parametrize("hold", [False, True], ids=["lost", "held"])
def test_the_network_swallows_everything_for_longer_than_the_lease(redis_server, site, proxy, hold):
    site, between = site(redis_server, lease=LEASE, redis_timeout=1.0), proxy(redis_server)
    pods = [site.pod(2, via=between)]
    survives(site, pods, 2, lambda: between.blackhole(hold=hold), lambda: between.blackhole(False))


def under_load(site, pod, harm, processes):
    """A stream of messages, keyed and not, while ``harm`` is done again and again: each runs exactly once."""
    site.ready(processes)
    children = pod.children()
    stop = threading.Event()

    def produce():
        keys = [None, *(key for shard in range(site.shards) for key in keys_on(shard, 2))]
        for i in itertools.count():
            for key in keys:
                site.send(key, range(i * 5, i * 5 + 5), ms=i % 2)
            if stop.wait(0.03):
                return

    producer = threading.Thread(target=produce)
    producer.start()
    try:
        harm()
    finally:
        stop.set()
        producer.join()
    site.wait_ended()
    assert site.check(killed={}).repeated == 0
    assert pod.children() == children, pod.log
    site.wait_empty()
    assert site.dead() == []


@pytest.mark.parametrize("concurrency", [1, 4])
def test_connections_cut_again_and_again(redis_server, site, proxy, concurrency):
    site, between = site(redis_server), proxy(redis_server)
    pod = site.pod(2, concurrency, via=between)

    def harm():
        for i in range(20):
            time.sleep(0.05 + i % 5 * 0.03)
            between.cut()

    under_load(site, pod, harm, 2)


@pytest.mark.parametrize("command", [b"XREADGROUP", b"EVALSHA"])
def test_lost_replies(redis_server_all, site, proxy, command):
    site, between = site(redis_server_all), proxy(redis_server_all)
    pod = site.pod(1, 4, via=between)

    def harm():
        for i in range(25):
            time.sleep(0.04)
            before = between.cuts
            (between.cut_before_request if i % 5 == 4 else between.cut_after_request)(command)
            wait_until(lambda before=before: between.cuts > before, message=f"a {command!r} passes")

    under_load(site, pod, harm, 1)


def test_a_server_that_comes_back_again_and_again(own_server, site):
    """Restarts under load, with the append-only file."""
    site = site(own_server)
    pods = [site.pod(2, 4), site.pod(1)]
    site.ready(3)
    keys = [None, *(key for shard in range(site.shards) for key in keys_on(shard, 2))]
    for i in range(4):
        for key in keys:
            site.send(key, range(i * 40, i * 40 + 40), ms=1)
        time.sleep(0.2)
        own_server.restart(kill=i % 2 == 1)
    site.wait_ended()
    # What a killed server had not told anybody yet may be unknown to it: no more than its last write.
    assert site.check(killed={}).repeated == 0
    assert len([child for pod in pods for child in pod.children()]) == 3
    site.wait_empty()
