"""Warm and cold shutdown, and rolling restarts."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from tests.helpers import Starved, is_alive, wait_until
from tests.parts import sampled
from tests.worker.rig import keys_on


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_warm_stop_ends_what_runs_and_hands_the_rest_over_at_once(redis_server, site, concurrency):
    site = site(redis_server, lease=10.0)
    first = site.pod(1, concurrency)
    site.ready(1)
    key, other = keys_on(0, 2)
    site.send_gated(key, 0)
    site.wait_started(key, 0)
    site.send(key, range(1, 100))
    site.send(other, range(50), ms=5)
    site.send(None, range(100), ms=1)
    second = site.pod(1, concurrency)
    wait_until(lambda: len(site.members()) == 2)
    old = first.children()[0]
    began = time.monotonic()
    first.spawned.signal(signal.SIGTERM)
    time.sleep(0.3)
    assert is_alive(old), "a warm stop waits for the body"
    starved = Starved()
    site.open_gate(0)
    ended = wait_until(lambda: site.of("E", key, 0))[0]
    follower = site.wait_started(key, 1)
    assert first.spawned.wait(5) == 0
    stopped = time.monotonic()
    print(f"the follower ran {follower.at - ended.at:.3f} s after the body's end, the pod was gone after "
          f"{stopped - ended.at:.3f} s")  # fmt: skip
    assert follower.pid == second.children()[0]
    assert follower.at - ended.at - starved.seconds < 1
    assert ended.at - began >= 0.3
    site.wait_ended()
    assert site.check(killed={}).repeated == 0
    site.wait_empty()
    assert site.stale_consumers() == []
    assert set(site.members()) == {owner for owner, _ in site.leases().values()}


def test_an_idle_pod_stops_quickly(redis_server, site):
    site = site(redis_server)
    pod = site.pod(2, 4)
    site.ready(2)
    starved = Starved()
    took = pod.stop()
    print(f"an idle pod stopped in {took:.3f} s")
    assert took - starved.seconds < 1.5
    assert site.leases() == {}
    assert site.members() == {}
    assert [names for names in site.consumers().values() if len(names) > 1] == []


@pytest.mark.parametrize("second", sampled([signal.SIGTERM, signal.SIGINT], signal.SIGINT))
def test_a_second_signal_stops_cold(redis_server, site, second):
    site = site(redis_server)
    pod = site.pod(2)
    site.ready(2)
    site.send_gated("a", 0)
    site.wait_started("a", 0)
    children = pod.children()
    pod.spawned.signal(signal.SIGTERM)
    time.sleep(0.3)
    assert pod.spawned.returncode is None
    watch = Starved()
    pod.spawned.signal(second)
    pod.spawned.wait(5)
    assert watch.spent < 2
    wait_until(lambda: not any(map(is_alive, children)), 2)
    # Nothing is lost.
    site.open_gate(0)
    site.pod(1)
    site.wait_ended()
    assert site.started("a") == [0, 0]
    site.wait_empty()


def test_ctrl_c_stops_the_whole_group_warmly(redis_server, site):
    """A terminal sends SIGINT to the supervisor and its children."""
    site = site(redis_server)
    pod = site.pod(2)
    site.ready(2)
    site.send_gated("a", 0)
    site.wait_started("a", 0)
    site.send("a", range(1, 10))
    pod.spawned.signal_group(signal.SIGINT)
    time.sleep(0.2)
    assert pod.spawned.returncode is None, "a warm stop waits for the body"
    site.open_gate(0)
    pod.spawned.wait(5)
    assert site.ended() >= 1
    site.pod(1)
    site.wait_ended()
    assert site.check(killed={}).repeated == 0


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_rolling_restart_under_load_repeats_nothing(redis_server, site, concurrency):
    site = site(redis_server, lease=5.0)
    pods = [site.pod(2, concurrency), site.pod(2, concurrency)]
    site.ready(4)
    stop = threading.Event()

    def produce():
        keys = [None, *(key for shard in range(site.shards) for key in keys_on(shard, 3))]
        n = 0
        while not stop.is_set():
            for i, key in enumerate(keys):
                site.send(key, range(n, n + 4), ms=1, fail=1 if i == n % 97 else 0)
            n += 4
            time.sleep(0.05)

    producer = threading.Thread(target=produce)
    producer.start()
    try:
        for i in (0, 1):
            pods[i].stop()
            pods[i] = site.pod(2, concurrency)
            site.ready(4)
    finally:
        stop.set()
        producer.join()
    site.wait_ended()
    report = site.check(killed={})
    assert report.repeated == 0
    print(report)
    site.wait_empty()
    assert site.dead() == []
    assert site.stale_consumers() == []
