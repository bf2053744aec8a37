"""What runs again after a crash is, per key, a contiguous run that ends at the last message that was started: nothing that is
written of a message overtakes the acknowledgement of what ended before it."""

from __future__ import annotations

import contextlib

import pytest

from streamtask.operations import Inspector
from streamtask.redis.scripts import script
from tests.helpers import wait_until
from tests.parts import sampled

TASKS = """
class DiesOnce(Middleware):
    def on_dead(self, request, reason, message):
        if not os.path.exists("died"):
            open("died", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)

app = make_app(middleware=[DiesOnce()])

@app.task(name="put", shard_key="k", max_retries=0)
def put(k, n):
    note("S", k, n)
    if n == 3:
        raise ValueError("dead")
    note("E", k, n)

@app.task(name="later", shard_key="k")
def later(k, n):
    note("S", k, n)
    if n == 3 and current().attempt == 0:
        raise Retry(countdown=3600)
    note("E", k, n)
"""


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_dead_letter_does_not_overtake_what_ended_before_it(redis_server_all, site, concurrency):
    """The process dies as soon as the dead letter is stored."""
    site = site(redis_server_all, TASKS, shards=1)
    site.task("put").send_many([{"k": "a", "n": n} for n in range(6)])
    site.pod(1, concurrency)
    wait_until(lambda: site.of("E", "a", 5), 20, lambda: str(site))
    assert site.started("a") == list(range(6)), "0 to 2 were acknowledged before 3 became a dead letter"
    site.wait_empty()


@pytest.mark.parametrize("concurrency", sampled([1, 4], 4))
@pytest.mark.parametrize("way", ["drop", "replay"])
def test_a_held_lane_opens_also_after_a_crash(redis_server_all, site, concurrency, way):
    site = site(redis_server_all, TASKS, shards=1, on_dead="hold")
    site.task("put").send_many([{"k": "a", "n": n} for n in range(6)])
    pod = site.pod(1, concurrency)
    wait_until(site.dead, 20, lambda: str(site))
    wait_until(lambda: (site.folder / "died").exists() and pod.children() and site.ready(1), 20, lambda: str(site))
    with contextlib.closing(Inspector(site.app)) as inspector:
        if way == "drop":
            assert inspector.drop("default") == 1
            wait_until(lambda: site.of("E", "a", 5), 20, lambda: f"{site}\n{pod.log}")
            assert site.started("a") == list(range(6))
            site.wait_empty()
        else:
            assert inspector.replay("default") == 1
            wait_until(lambda: site.started("a") == [0, 1, 2, 3, 3], 20, lambda: f"{site}\n{pod.log}")


def test_a_retry_does_not_overtake_what_ended_before_it(redis_server_all, site, proxy):
    """No acknowledgement gets through, and the process dies: what had ended does not wait for the retry behind it."""
    site = site(redis_server_all, TASKS, shards=1)
    way = proxy(redis_server_all)
    pod = site.pod(1, via=way)
    site.ready(1)
    way.cut_before_request(script("settle").sha.encode(), times=100_000)
    site.task("later").send_many([{"k": "a", "n": n} for n in range(6)])
    wait_until(lambda: 3 in site.started("a") and way.cuts >= 3, 20, lambda: str(site))
    assert site.redis.hgetall(site.keys.shard(0, 0).notes("workers")) == {}
    pod.kill_child(pod.children()[0])
    way.clear_rules()
    wait_until(lambda: site.started("a") == [0, 1, 2, 3, 0, 1, 2, 3], 20, lambda: f"{site}\n{pod.log}")
