"""How much of what had ended runs again after kill -9 of its process: no more than is promised, also where Redis answers late.
Counted by what the bodies wrote; nothing here is judged by time."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.helpers import wait_until
from tests.parts import sampled
from tests.worker.rig import TASKS, keys_on

KILLS = 2


def kill_while_it_works(site, pod, least, kills=KILLS):
    """Kills the worker process ``KILLS`` times while it has more to do; how often each key's messages ended twice."""
    for _ in range(kills):
        ended = site.ended()
        wait_until(lambda ended=ended: site.ended() >= ended + least, 60, lambda: str(site), progress=site.ended)
        (child,) = wait_until(pod.children)
        pod.kill_child(child)


def again(site):
    """How many that had ended ended again, by key and process that ended them first."""
    first = {}
    found = Counter()
    for event in site.of("E"):
        seen = first.setdefault((event.key, event.n), event)
        if seen is not event:
            found[event.key, seen.pid] += 1
    return found


@pytest.mark.parametrize("concurrency", sampled([1, 4], 4))
def test_each_message_acknowledged_by_itself(redis_server, site, concurrency):
    keys = [key for shard in range(2) for key in keys_on(shard, 4, 2)]
    site = site(redis_server, TASKS, shards=2, ack="each", max_crashes=100)
    for key in keys:
        site.send(key, range(200))
    pod = site.pod(1, concurrency)

    kill_while_it_works(site, pod, 300)

    site.wait_ended(timeout=60)
    found = again(site)
    assert max(found.values(), default=0) <= 2, f"the last one or two of a key: {found}"
    site.check(slack=2)


@pytest.mark.parametrize(
    "concurrency", [pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.more)]
)
def test_a_batch_and_no_more_where_redis_answers_late(redis_server, site, proxy, concurrency):
    site = site(redis_server, TASKS, shards=1, max_crashes=100, lease=10.0)
    relay = proxy(redis_server)
    for key in keys_on(0, 8, 1):
        site.send(key, range(150))
    pod = site.pod(1, concurrency, via=relay)
    site.wait_started()
    relay.delay(0.03)

    kill_while_it_works(site, pod, 250, 1)

    relay.delay(0)
    site.wait_ended(timeout=60)
    by_process = Counter()
    for (_, pid), times in again(site).items():
        by_process[pid] += times
    assert max(by_process.values(), default=0) <= 200, f"ack_batch: {by_process}"
