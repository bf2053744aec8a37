"""Messages without a key go to whoever is free: none waits behind a body that takes long while another executor has nothing."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.helpers import wait_until
from tests.worker.rig import TASKS

SYNC = """
app = make_app()

@app.task(name="free")
def free(n, ms=0, hold=False):
    note("S", None, n)
    time.sleep(ms / 1000)
    while hold and not os.path.exists("gate"):
        time.sleep(0.01)
    note("E", None, n)
"""
ASYNC = SYNC.replace("def free", "async def free").replace("time.sleep", "await asyncio.sleep")


@pytest.mark.parametrize("source,concurrency", [(SYNC, 1), (SYNC, 4), (ASYNC, 50)], ids=["one", "threads", "async"])
@pytest.mark.parametrize("known", [False, True], ids=["new", "quick"])
def test_nothing_waits_while_somebody_is_free(redis_server, site, source, concurrency, known):
    """``known``: that bodies have been quick so far, so that much is read ahead when one comes that is not."""
    site = site(redis_server, source)
    site.pod(3, concurrency)
    site.ready(3)
    count = 1000 if known else 0
    site.send(None, range(count))
    site.wait_ended()
    # All executors but one are held, each by one message.
    held = range(1000, 1000 + 3 * concurrency - 1)
    quick = range(2000, 2100)
    bodies = [{"n": n, "hold": True} for n in held] + [{"n": n} for n in quick]
    random.Random(7).shuffle(bodies)
    site.task("free").send_many(bodies)
    site.produced[None] += [*held, *quick]
    wait_until(
        lambda: site.ended() == count + len(quick) and set(held) <= set(site.started()), 15, lambda: str(site),
        progress=lambda: len(site.events()),
    )  # fmt: skip
    (site.folder / "gate").touch()
    site.wait_ended()
    site.wait_empty()
    assert site.check(killed={}).repeated == 0


def test_what_takes_long_is_shared_out_evenly(redis_server, site):
    site = site(redis_server, TASKS)
    for _ in range(2):
        site.pod(1)
    site.ready(2)
    site.send(None, range(40), ms=100)
    site.wait_ended()
    counts = Counter(event.pid for event in site.of("S"))
    assert len(counts) == 2
    assert min(counts.values()) >= 10
    assert site.check(killed={}).repeated == 0


@pytest.mark.parametrize("concurrency,ms", [(1, 60), (4, 240)])
def test_nothing_waits_until_no_keyed_ones_are_left(redis_server, site, concurrency, ms):
    """A process that has always keyed ones at hand reads the shared stream, too."""
    site = site(redis_server, TASKS, shards=1)
    count = 100 * concurrency
    site.task("put").send_many([{"k": f"k{n % 20}", "n": n, "ms": ms} for n in range(count)])
    site.pod(1, concurrency)
    wait_until(lambda: site.ended() >= 3 * concurrency, 15, lambda: str(site))
    site.task("free").send_many([{"n": n} for n in range(5)])
    wait_until(
        lambda: len(site.of("E")) > count / 2 or sum(event.key is None for event in site.of("E")) == 5, 15,
        lambda: str(site), progress=lambda: len(site.events()),
    )  # fmt: skip
    keys = [event.key for event in site.of("E")][: count // 2]
    assert keys.count(None) == 5, "half of the keyed ones went before"
    print(f"{keys.index(None)} before the first, {count} in all")
