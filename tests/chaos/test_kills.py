"""Random ``kill -9`` of worker processes, supervisors and whole pods: nothing lost, nothing out of order."""

from __future__ import annotations

import os
import random
import threading
import time

import pytest

from tests.helpers import wait_until
from tests.worker.rig import TASKS

SEED = int(os.environ.get("STREAMTASK_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)


class Chaos:
    """Two pods under a producer, and a hand that kills."""

    def __init__(self, site, random, processes, concurrency):
        self.site, self.random = site, random
        self.processes, self.concurrency = processes, concurrency
        self.pods = [site.pod(processes, concurrency) for _ in range(2)]
        self.stop = threading.Event()
        self.failure = None

    def produce(self):
        """Numbers per key in order: one by one and in bulk, some of them failing once or twice."""
        try:
            keys = [f"user{i}" for i in range(40)]
            following = dict.fromkeys([*keys, None], 0)
            while not self.stop.is_set():
                key = self.random.choice([*keys, None])
                count = self.random.choice([1, 1, 1, 10, 60])
                numbers = list(range(following[key], following[key] + count))
                following[key] += count
                fail = self.random.choice([0] * 8 + [1, 2])
                if count == 1:
                    task = self.site.task("put" if key else "free")
                    task.delay(**({"k": key} if key else {}), n=numbers[0], fail=fail)
                    self.site.produced[key] += numbers
                else:
                    self.site.send(key, numbers, ms=self.random.choice([0, 0, 1]))
                self.stop.wait(self.random.uniform(0, 0.02))
        except BaseException as exc:
            self.failure = exc

    def kill_one(self, what):
        pod = self.random.choice(self.pods)
        if what == "process":
            children = pod.children()
            if children:
                pod.kill_child(self.random.choice(children))
            return
        if what == "supervisor":
            pod.kill()
        else:
            pod.kill_all()
        self.pods.remove(pod)
        self.pods.append(self.site.pod(self.processes, self.concurrency))


def run(site, kinds, processes, concurrency, rounds):
    print(f"STREAMTASK_SEED={SEED}")
    chaos = Chaos(site, random.Random(SEED), processes, concurrency)
    site.ready(2 * processes)
    producer = threading.Thread(target=chaos.produce)
    producer.start()
    try:
        for i in range(rounds):
            time.sleep(chaos.random.uniform(0.2, 0.7))
            chaos.kill_one(kinds[i % len(kinds)])
    finally:
        chaos.stop.set()
        producer.join()
    assert chaos.failure is None, chaos.failure
    site.wait_ended(timeout=40)
    lease = site.options["lease"]
    wait_until(lambda: not site.stale_consumers(), lease + 2, lambda: f"stale consumers {site.stale_consumers()}")
    site.wait_empty()
    assert site.dead() == []
    report = site.check()
    print(f"{report}, {len(site.killed)} processes killed")
    assert report.ended > 100


@pytest.mark.quick
def test_worker_processes_die(own_server_all, site):
    run(site(own_server_all, max_crashes=50), ["process"], 2, 4, 6)


ASYNC = """
app = make_app()

async def body(key, n, ms, fail):
    note("S", key, n)
    if n % 50 == 7:
        time.sleep(0.05)  # holds up the event loop
    if ms or n % 3:
        await asyncio.sleep(ms / 1000)
    if current().attempt < fail:
        note("F", key, n)
        raise ValueError(f"fails {fail} times")
    note("E", key, n)

@app.task(name="put", shard_key="k", retry_backoff=0.02, retry_jitter=False)
async def put(k, n, ms=0, fail=0):
    await body(k, n, ms, fail)

@app.task(name="free", retry_backoff=0.02, retry_jitter=False)
async def free(n, ms=0, fail=0):
    await body(None, n, ms, fail)
"""


@pytest.mark.parametrize("source", [TASKS, ASYNC], ids=["functions", "coroutines"])
def test_worker_processes_die_at_a_high_concurrency(own_server, site, source):
    run(site(own_server, source, max_crashes=50), ["process"], 2, 32, 6)


def test_worker_processes_die_at_concurrency_1(own_server, site):
    run(site(own_server, max_crashes=50), ["process"], 2, 1, 6)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_supervisors_and_pods_die(own_server, site, concurrency):
    run(site(own_server, lease=1.0, max_crashes=50), ["supervisor", "pod"], 2, concurrency, 4)


def test_all_of_it_at_once(own_server_all, site):
    kinds = ["process", "supervisor", "process", "pod", "process", "process"]
    run(site(own_server_all, lease=1.0, max_crashes=50), kinds, 3, 4, 6)
