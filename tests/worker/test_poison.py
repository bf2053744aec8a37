"""Bodies that take their process with them: dead letters in the end, their neighbours untouched."""

from __future__ import annotations

import pytest

from tests.helpers import wait_until
from tests.parts import sampled
from tests.worker.rig import keys_on

PILLS = """
app = make_app()

@app.task(name="put", shard_key="k")
def put(k, n):
    note("S", k, n)
    time.sleep(0.002)
    note("E", k, n)

@app.task(name="pill", shard_key="k")
def pill(k, n, how):
    note("S", k, n)
    die(how)

@app.task(name="free")
def free(n):
    note("S", None, n)
    time.sleep(0.002)
    note("E", None, n)

@app.task(name="free_pill")
def free_pill(n, how):
    note("S", None, n)
    die(how)

@app.task(name="late_pill", shard_key="k")
def late_pill(k, n):
    note("S", k, n)
    while not os.path.exists("go"):
        time.sleep(0.005)
    die("kill")

def die(how):
    time.sleep(0.05)
    if how == "exit":
        os._exit(1)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "segv":
        ctypes.string_at(0)
    if how == "pod":
        os.killpg(os.getpgrp(), signal.SIGKILL)
"""


def neighbours(site, pill_key, pill_n):
    """Each neighbour ran, is no dead letter, and the pill's key goes on behind it."""
    for key, numbers in site.produced.items():
        starts = site.started(key)
        assert set(numbers) <= set(starts)
    rows = site.dead()
    assert [(row["reason"], row["kwargs"]["n"]) for row in rows] == [("crashed", pill_n)]
    assert rows[0]["key"] == (pill_key.encode() if pill_key else None)
    return rows[0]


@pytest.mark.parametrize(
    "how,concurrency", sampled([("exit", 1), ("kill", 1), ("kill", 4), ("segv", 4)], ("exit", 1), ("kill", 4))
)
def test_a_pill_becomes_a_dead_letter_and_200_neighbours_run_once(redis_server, site, how, concurrency):
    site = site(redis_server, PILLS, max_crashes=2)
    key, *others = keys_on(0, 200)
    site.send(key, [0])
    site.task("pill").delay(k=key, n=1, how=how)
    site.send(key, range(2, 10))
    site.task("put").send_many([{"k": other, "n": 0} for other in others])
    for other in others:
        site.produced[other] = [0]
    pod = site.pod(1, concurrency)
    site.wait_ended()
    wait_until(lambda: site.dead())
    site.wait_empty()
    neighbours(site, key, 1)
    # It may take two processes down; with the third it is dead.
    assert len(site.of("S", key, 1)) == 3
    starts = [len(site.of("S", other)) for other in others]
    if concurrency == 1:
        # Finished ones whose acknowledgement was under way may repeat, those that had not started may not.
        assert sum(starts) <= 199 + 30
    assert len(pod.children()) == 1


SIDE_BY_SIDE = """
app = make_app()

@app.task(name="thread", shard_key="k")
def thread(k, n):
    note("S", k, n)
    while not os.path.exists("died"):
        time.sleep(0.005 if n == 0 else 60)
        if os.path.exists("go"):
            os.rename("go", "died")
            os.kill(os.getpid(), signal.SIGKILL)
    note("E", k, n)

@app.task(name="coroutine", shard_key="k")
async def coroutine(k, n):
    note("S", k, n)
    while not os.path.exists("died"):
        await asyncio.sleep(60)
    note("E", k, n)
"""


def test_who_is_charged_with_a_crash(redis_server, site):
    """All whose bodies ran, for nobody can tell which of them it was; what was only read ahead never is."""
    site = site(redis_server, SIDE_BY_SIDE, max_crashes=0, shards=1)
    for n in range(8):
        site.task("coroutine" if n % 4 in (1, 2) else "thread").delay(k=f"k{n}", n=n)
    site.pod(1, 4)
    wait_until(lambda: len(site.of("S")) == 4, 15, lambda: str(site))
    (site.folder / "go").write_text("")
    wait_until(lambda: len(site.dead()) + site.ended() == 8, 15, lambda: str(site))
    assert sorted(row["kwargs"]["n"] for row in site.dead()) == [0, 1, 2, 3]
    assert {row["reason"] for row in site.dead()} == {"crashed"}


def test_an_unkeyed_pill(redis_server, site):
    site = site(redis_server, PILLS, max_crashes=1)
    site.send(None, range(50))
    site.task("free_pill").delay(n=1000, how="kill")
    site.send(None, range(50, 200))
    site.pod(2, 2)
    site.wait_ended()
    wait_until(lambda: site.dead())
    site.wait_empty()
    neighbours(site, None, 1000)
    assert len(site.of("S", None, 1000)) == 2


def test_a_pill_that_takes_whole_pods_with_it(redis_server_all, site):
    """The supervisor dies too and can charge nobody: what was delivered before is marked before it starts."""
    site = site(redis_server_all, PILLS, lease=1.0, max_crashes=1)
    pods = [site.pod(1), site.pod(1)]
    site.ready(2)
    key, other = keys_on(0, 2)
    site.task("pill").delay(k=key, n=1, how="pod")
    site.send(key, range(2, 10))
    site.send(other, range(100))
    for _ in range(12):
        if site.dead():
            break
        found = wait_until(
            lambda: site.dead() or [pod for pod in pods if pod.spawned.returncode is not None], 10, lambda: str(site)
        )
        for pod in found:
            if pod in pods:
                pods.remove(pod)
                pods.append(site.pod(1))
    site.wait_empty()
    neighbours(site, key, 1)
    site.wait_ended()
    # One more than with a supervisor that lives: the first death of a fresh message leaves no mark.
    assert 2 <= len(site.of("S", key, 1)) <= 3


def test_a_crash_while_redis_is_away_is_charged_when_it_is_back(own_server, site):
    site = site(own_server, PILLS, lease=1.0, max_crashes=1)
    pod = site.pod(1)
    site.ready(1)
    key = keys_on(0, 1)[0]
    site.task("late_pill").delay(k=key, n=1)
    site.wait_started(key, 1)
    (child,) = pod.children()
    own_server.stop()
    (site.folder / "go").touch()
    wait_until(lambda: pod.children() and child not in pod.children(), 10)
    own_server.start()
    site.send(key, range(2, 10))
    site.wait_ended()
    site.wait_empty()
    neighbours(site, key, 1)
    assert len(site.of("S", key, 1)) == 2
