"""A blocked lane neither stalls the others nor fills memory, in the worker or in Redis."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import wait_until
from tests.worker.rig import TASKS, keys_on

SLOW_RETRY = TASKS.replace("retry_backoff=0.02", "retry_backoff=60.0")


def rss_kb(pid):
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmRSS:")).split()[1])


def test_20000_followers_of_a_failing_head(redis_server, site):
    site = site(redis_server, SLOW_RETRY)
    pod = site.pod(1)
    site.ready(1)
    key, other, third = keys_on(0, 3)
    site.send(third, range(200))
    site.wait_ended()
    pid = pod.children()[0]
    before = rss_kb(pid)
    site.send(key, [0], fail=1)
    wait_until(lambda: site.of("F", key, 0))
    site.task("put").send_many([{"k": key, "n": n} for n in range(1, 20_000)])
    wait_until(lambda: site.redis.xpending(site.stream(0), "workers")["pending"] == 20_000, 20)
    # The others go on, on this shard and elsewhere, as ever.
    for shard in range(site.shards):
        one = other if shard == 0 else keys_on(shard, 1)[0]
        site.send(one, range(1000, 1050))
    site.send(None, range(50))
    wait_until(lambda: len(site.of("E", other)) == 50, 3)
    wait_until(lambda: site.ended() == 200 + 9 * 50, 3, lambda: str(site))
    assert site.started(key) == [0]
    grown = rss_kb(pid) - before
    print(f"20,000 waiting followers took {grown} kB of the worker's memory")
    assert grown < 12_000


def test_a_lane_with_large_bodies_keeps_few_of_them(redis_server, site):
    source = SLOW_RETRY.replace("def put(k, n, ms=0, fail=0):", "def put(k, n, ms=0, fail=0, text=None):")
    site = site(redis_server, source)
    pod = site.pod(1)
    site.ready(1)
    key = keys_on(0, 1)[0]
    site.send(key, [0], fail=1)
    wait_until(lambda: site.of("F", key, 0))
    pid = pod.children()[0]
    before = rss_kb(pid)
    for n in range(0, 3000, 100):
        site.task("put").send_many([{"k": key, "n": i, "text": "x" * 10_000} for i in range(n + 1, n + 101)])
    wait_until(lambda: site.redis.xpending(site.stream(0), "workers")["pending"] == 3001, 20)
    grown = rss_kb(pid) - before
    print(f"3,000 waiting followers of 10 kB took {grown} kB of the worker's memory")
    assert grown < 15_000  # of 30,000 kB; one read is 200 bodies


@pytest.mark.slow
def test_a_held_head_does_not_keep_what_was_acknowledged_behind_it(redis_server, site):
    site = site(redis_server)
    site.pod(1, 2)
    site.ready(1)
    key, *others = keys_on(0, 40)
    site.send_gated(key, 0)
    site.wait_started(key, 0)
    memory = site.redis.memory_usage(site.stream(0), samples=0)
    for round_ in range(5):
        for other in others:
            site.send(other, range(round_ * 100, round_ * 100 + 100))
    total = sum(map(len, site.produced.values())) - 1
    wait_until(lambda: site.ended() == total, 40, lambda: f"{site.ended()} of {total}", poll=0.1)
    wait_until(lambda: site.redis.xlen(site.stream(0)) == 1)
    assert site.redis.memory_usage(site.stream(0), samples=0) < memory + 20_000
    site.open_gate(0)
    site.wait_ended()
    site.check(killed={})
    site.wait_empty()


def test_the_followers_run_in_order_when_the_lane_opens(redis_server, site):
    """Beyond what is kept in memory they are read again, also by another owner."""
    site = site(redis_server, TASKS.replace("retry_backoff=0.02", "retry_backoff=1.0"))
    pod = site.pod(1)
    site.ready(1)
    key, other = keys_on(0, 2)
    site.send(key, [0], fail=2)
    site.send(key, range(1, 1500))
    site.send(other, range(1500))
    wait_until(lambda: len(site.of("F", key, 0)) == 1)
    wait_until(lambda: len(site.of("E", other)) == 1500)
    pod.kill_child(pod.children()[0])
    site.wait_ended()
    site.check()
    assert site.of("S", key, 0)[-1].attempt == 2
    site.wait_empty()
