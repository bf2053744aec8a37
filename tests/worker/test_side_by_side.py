"""Many bodies at once in one process: the order of each key, and a body that holds up the event loop."""

from __future__ import annotations

import pytest

from tests.helpers import wait_until
from tests.worker.rig import TASKS, keys_on

ASYNC = """
app = make_app()

@app.task(name="put", shard_key="k", retry_backoff=0.02, retry_jitter=False)
async def put(k, n, ms=0, fail=0, block=False):
    note("S", k, n)
    await asyncio.sleep(ms / 1000)
    if current().attempt < fail:
        note("F", k, n)
        raise ValueError(f"fails {fail} times")
    while block and not os.path.exists("gate"):
        time.sleep(0.01)  # and nothing else runs on the loop
    note("E", k, n)
"""

NEVER_WAIT = """
app = make_app()

@app.task(name="computes")
async def computes(n):
    until = time.monotonic() + 0.02
    while time.monotonic() < until:
        pass

@app.task(name="waits")
async def waits(n):
    for _ in range(5):
        await asyncio.sleep(0.01)
    note("E", None, n)
"""


@pytest.mark.parametrize("source", [TASKS, ASYNC], ids=["threads", "coroutines"])
def test_the_order_of_a_key_holds_at_concurrency_16_with_retries(redis_server, site, source):
    site = site(redis_server, source, shards=2)
    keys = [f"k{n}" for n in range(25)]
    for n in range(30):
        for key in keys:
            site.send(key, [n], fail=int((n + len(key)) % 11 == 0), ms=n % 7 == 0)
    site.pod(1, 16)
    site.wait_ended()
    site.wait_empty()
    assert site.check(killed={}).repeated == 0


def test_a_body_that_blocks_the_event_loop_holds_up_no_other_shard(redis_server, site):
    """What ended before it is acknowledged, and shards whose bodies don't run go to another process."""
    site = site(redis_server, ASYNC)
    pod = site.pod(1, 8)
    site.ready(1)
    blocked = keys_on(0, 1)[0]
    for shard in range(1, 8):
        site.send(keys_on(shard, 1)[0], range(20))
    site.wait_ended()
    site.send(blocked, [0])
    site.wait_started(blocked, 0)
    site.task("put").delay(k=blocked, n=1, block=True)
    site.produced[blocked].append(1)
    site.wait_started(blocked, 1)
    wait_until(lambda: _one_pending(site), 10, lambda: f"{site.left()}\n{pod.log}")
    other = site.pod(1, 8)
    wait_until(lambda: sorted(map(len, site.owned().values())) == [4, 4], 8, lambda: f"{site.owned()}\n{other.log}")
    (site.folder / "gate").touch()
    site.wait_ended()
    site.wait_empty()
    assert site.check(killed={}).repeated == 0


def test_a_body_that_waits_goes_on_between_bodies_that_never_do(redis_server, site):
    """However many of these there are: the control loop brings more while they hold up the event loop."""
    site = site(redis_server, NEVER_WAIT)
    site.task("computes").send_many([{"n": n} for n in range(10)])
    site.task("waits").delay(n=0)
    site.task("computes").send_many([{"n": n} for n in range(400)])
    pod = site.pod(1, 8)
    site.wait_ended(1)
    assert site.redis.xlen(site.stream("shared")) > 200, pod.log


def _one_pending(site):
    """Nothing is kept but the message that runs."""
    return sum(site.redis.xlen(site.keys.shard(0, shard).stream) for shard in range(8)) == 1
