"""Bodies that do what they should not."""

from __future__ import annotations

import time

import pytest

from tests.helpers import wait_until
from tests.worker.rig import keys_on

FORKS = """
app = make_app()

@app.task(name="forks", shard_key="k", max_retries=0)
def forks(k, n, ends):
    note("S", k, n)
    pid = os.fork()
    if pid == 0:
        # The child comes back out of the body: it must not go on as a second worker on its parent's connections.
        if ends:
            sys.exit(0)
        return
    os.waitpid(pid, 0)
    note("E", k, n)
"""


def test_a_child_that_a_body_forks_does_not_go_on_as_a_worker(redis_server, site):
    site = site(redis_server, FORKS)
    pod = site.pod(1)
    site.ready(1)
    keys = [key for shard in range(4) for key in keys_on(shard, 2)]
    for key in keys:
        site.task("forks").send_many([{"k": key, "n": n, "ends": n % 2 == 0} for n in range(6)])
    wait_until(lambda: site.ended() == 6 * len(keys), 20, lambda: f"{site}\n{pod.log}")
    site.wait_empty()
    for key in keys:
        assert site.started(key) == list(range(6))
    assert site.dead() == []


FORKS_ON_THE_LOOP = """
app = make_app()

@app.task(name="forks")
async def forks(n):
    note("S", None, n)
    pid = os.fork()
    if pid == 0:
        until = time.monotonic() + 1
        while time.monotonic() < until:
            await asyncio.sleep(0)
        return
    await asyncio.get_running_loop().run_in_executor(None, os.waitpid, pid, 0)
    note("E", None, n)

@app.task(name="put", shard_key="k")
async def put(k, n):
    note("S", k, n)
    note("E", k, n)
"""


def test_a_child_that_a_coroutine_forks_runs_no_control_loop_where_it_waits(redis_server, site):
    site = site(redis_server, FORKS_ON_THE_LOOP)
    pod = site.pod(1, 8)
    site.ready(1)
    site.task("forks").delay(n=0)
    site.wait_started(None, 0)
    site.produced[None].append(0)
    for n in range(60):
        site.send(f"k{n % 10}", [n])
        time.sleep(0.01)
    site.wait_ended()
    site.wait_empty()
    assert len({event.pid for event in site.of("S", None) if event.key}) == 1
    assert site.check(killed={}).repeated == 0
    assert not any(said in pod.log for said in ("can't be reached", "claimed", "failed")), pod.log


ANSWERS = """
import functools
app = make_app(backend=True)
once = dict(max_retries=0)

async def body(name, n):
    note("S", name, n)
    await asyncio.sleep(0.01)
    note("E", name, n)
    return [name, n, current().task]

def wrapped(function):
    @functools.wraps(function)
    def inner(*args):
        return function(*args)
    return inner

class Body:
    async def __call__(self, name, n):
        return await body(name, n)

class Later:
    def __init__(self, *args):
        self.args = args
    def __await__(self):
        return body(*self.args).__await__()

def generates(name, n):
    yield n

async def agenerates(name, n):
    yield n

async def slow(name, n):
    try:
        await asyncio.sleep(60)
    except SoftTimeLimitExceeded:
        note("E", name, n)
        raise

async def fails(name, n):
    await asyncio.sleep(0)
    raise KeyError(name)

kinds = {
    "wrapped": wrapped(body),
    "object": Body(),
    "lambda": lambda name, n: body(name, n),
    "partial": functools.partial(lambda name, n: Later(name, n)),
}
for name, kind in kinds.items():
    app.task(kind, name=name, **once)
    app.task(kind, name=name + "-plain", ignore_result=True, **once)
    app.task(kind, name=name + "-limited", soft_time_limit=60, time_limit=90, **once)
for more in ({}, {"ignore_result": True}):
    end = "-plain" if more else ""
    app.task(lambda name, n: fails(name, n), name="fails" + end, **once, **more)
    app.task(lambda name, n: generates(name, n), name="generates" + end, **once, **more)
    app.task(lambda name, n: agenerates(name, n), name="agenerates" + end, **once, **more)
app.task(lambda name, n: slow(name, n), name="slow", soft_time_limit=0.3, **once)
"""


@pytest.mark.parametrize("concurrency", [1, 4])
def test_what_a_function_returns_to_be_awaited_is_awaited(redis_server, site, concurrency):
    site = site(redis_server, ANSWERS)
    pod = site.pod(1, concurrency)
    site.ready(1)
    good = [name for name in site.app.tasks if name.partition("-")[0] in ("wrapped", "object", "lambda", "partial")]
    results = {name: [site.task(name).delay(name, n) for n in range(3)] for name in (*good, "slow")}
    bad = [name for name in site.app.tasks if name not in results]
    for name in bad:
        site.task(name).delay(name, 0)
    wait_until(lambda: len(site.dead()) == len(bad) + 3, 30, lambda: f"{site.dead()}\n{pod.log}")
    for name in good:
        if not name.endswith("-plain"):
            assert [one.get(timeout=20) for one in results[name]] == [[name, n, name] for n in range(3)]
    wait_until(lambda: len(site.of("E")) == 3 * len(good) + 3, 20, lambda: f"{site}\n{pod.log}")
    dead = {row["task"]: (row["reason"], row["message"]) for row in site.dead()}
    for name in bad:
        if name.startswith("fails"):
            assert dead[name] == ("exhausted", f"KeyError: '{name}' (after 0 retries)")
        else:
            assert dead[name][0] == "rejected"
            assert "has returned a generator" in dead[name][1]
    assert "SoftTimeLimitExceeded: soft_time_limit of 0.3 s" in dead["slow"][1]
    site.wait_empty()
