"""Delayed messages: never early, soon after they fall due, delivered once, through crashes and rebalances."""

from __future__ import annotations

import datetime as dt
import time

import pytest

from tests.helpers import Starved, wait_until
from tests.worker.rig import keys_on

DELAYED = """
app = make_app()

@app.task(name="put", shard_key="k")
def put(k, n, due):
    note("S", k, n, wall=time.time(), due=due)
    note("E", k, n)

@app.task(name="free")
def free(n, due):
    note("S", None, n, wall=time.time(), due=due)
    note("E", None, n)
"""


def send(site, key, n, countdown, eta=False):
    due = time.time() + countdown
    kwargs = {"n": n, "due": due} | ({"k": key} if key else {})
    task = site.task("put" if key else "free")
    if eta:
        task.apply_async(kwargs=kwargs, eta=dt.datetime.fromtimestamp(due, dt.timezone.utc))
    else:
        task.apply_async(kwargs=kwargs, countdown=countdown)
    site.produced[key].append(n)


def punctual(site, late=1.0):
    """Every message started once, not before it was due and not long after; how late the latest was."""
    starts = site.of("S")
    assert len(starts) == len({(e.key, e.n) for e in starts}) == sum(map(len, site.produced.values()))
    # Both clocks are this machine's; a due time is in whole milliseconds.
    delays = [e.more["wall"] - e.more["due"] for e in starts]
    assert min(delays) >= -0.001, f"early by {-min(delays):.4f} s"
    assert max(delays) <= late, f"late by {max(delays):.3f} s"
    return max(delays)


@pytest.mark.parametrize("eta", [False, True], ids=["countdown", "eta"])
def test_never_early_and_at_most_a_second_late(redis_server_all, site, eta):
    site = site(redis_server_all, DELAYED)
    site.pod(2)
    site.ready(2)
    for shard in range(site.shards):
        for n, countdown in enumerate([0.25, 0.5, 0.9, 1.3]):
            send(site, keys_on(shard, 1)[0], n, countdown, eta)
    for n in range(10):
        send(site, None, n, 0.3 + n * 0.1, eta)
    site.wait_ended()
    site.wait_empty()
    print(f"latest start {punctual(site):.3f} s after its due time")
    assert site.check(killed={}).repeated == 0


def test_a_nearer_message_is_not_kept_waiting_by_a_far_one(redis_server, site):
    site = site(redis_server, DELAYED)
    site.pod(1)
    site.ready(1)
    for key in ("a", None):
        site.task("put" if key else "free").apply_async(
            kwargs={"n": 0, "due": 0} | ({"k": key} if key else {}), countdown=3600
        )
    time.sleep(0.3)
    for key in ("a", None):
        send(site, key, 1, 0.4)
    site.wait_ended()
    punctual(site)
    assert sum("1 delayed" in text for text in site.left().values()) == 2


def test_takeover_in_the_meantime(redis_server, site):
    """The owner is killed, then joined by another, then its pod vanishes; everything is on time or as soon as owned."""
    site = site(redis_server, DELAYED, lease=1.0)
    starved = Starved()
    pod = site.pod(1)
    site.ready(1)
    for shard in range(site.shards):
        for n in range(12):
            send(site, keys_on(shard, 1)[0], n, 0.4 + n * 0.3)
    for n in range(12):
        send(site, None, n, 0.4 + n * 0.3)
    pod.kill_child(pod.children()[0])
    other = site.pod(2)
    site.ready(3)
    time.sleep(0.3)
    pod.kill_all()
    site.ready(2)
    site.wait_ended()
    site.wait_empty()
    site.check()
    late = 2.5 + starved.seconds
    for event in site.of("S"):
        assert event.more["wall"] >= event.more["due"] - 0.001
        assert event.more["wall"] <= event.more["due"] + late
    assert len(other.children()) == 2


def test_due_while_nobody_works_and_in_the_order_of_due_times(redis_server, site):
    site = site(redis_server, DELAYED)
    for n, countdown in [(3, 0.4), (1, 0.2), (2, 0.3), (0, 0.1)]:
        send(site, "a", n, countdown)
    time.sleep(0.5)
    site.pod(1)
    site.wait_ended()
    assert site.started("a") == [0, 1, 2, 3]
    site.wait_empty()


@pytest.mark.parametrize("delayed", [1, 1500])
def test_what_is_sent_after_a_due_time_runs_after_it_though_nobody_worked_then(redis_server_all, site, delayed):
    site = site(redis_server_all, DELAYED)
    put = site.task("put")
    due = dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=1.0 + delayed / 500)
    put.delay(k="a", n=0, due=0)  # before it is due
    for n in range(1, 1 + delayed):
        put.apply_async(kwargs={"k": "a", "n": n, "due": due.timestamp()}, eta=due)
    keys = site.keys.shard(0, next(s for s in range(site.shards) if site.redis.exists(site.keys.shard(0, s).stream)))
    wait_until(lambda: site.now_ms() > due.timestamp() * 1000 + 5, 10)
    later = 1 + delayed
    put.delay(k="a", n=later, due=0)
    put.send_many([{"k": "a", "n": n, "due": 0} for n in range(later + 1, later + 601)])
    put.apply_async(kwargs={"k": "a", "n": later + 601, "due": 0}, dedupe_id="one")
    put.apply_async(kwargs={"k": "a", "n": later + 602, "due": 0}, eta=due)  # is due at once, and not before the others
    put.delay(k="a", n=later + 603, due=0)
    assert site.redis.xlen(keys.stream) == later + 604, "what was due went into the stream first, whoever came"
    assert site.redis.hget(keys.state, "open") == b"0", "nothing is due any more"
    site.produced["a"] += range(later + 604)

    site.pod(1)
    site.wait_ended()

    assert site.started("a") == list(range(later + 604))
    site.wait_empty()


def test_messages_due_in_one_millisecond_keep_the_order_of_their_calls(redis_server, site):
    site = site(redis_server, DELAYED)
    site.pod(1)
    site.ready(1)
    due = dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=0.8)
    for n in range(150):
        site.task("put").apply_async(kwargs={"k": "a", "n": n, "due": due.timestamp()}, eta=due)
        site.produced["a"].append(n)
    site.task("put").delay(k="a", n=1000, due=0)  # an immediate one runs before them
    site.produced["a"].insert(0, 1000)
    site.wait_ended()
    assert site.started("a") == [1000, *range(150)]
    site.check(killed={})


def test_a_delayed_failing_message_retries_at_the_head(redis_server, site):
    site = site(redis_server)
    site.pod(1)
    site.task("put").apply_async(kwargs={"k": "a", "n": 0, "fail": 2}, countdown=0.2)
    wait_until(lambda: site.of("S", "a", 0))
    site.task("put").delay(k="a", n=1)
    wait_until(lambda: site.ended() == 2)
    assert site.started("a") == [0, 0, 0, 1]
    site.wait_empty()
