"""A body, a hook, an exception's text may end in any way: its message is dealt with, and nobody else notices."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from tests.helpers import wait_until
from tests.parts import sampled
from tests.worker.rig import TASKS, keys_on

ENDINGS = '''
import contextvars, datetime, logging
from decimal import Decimal

class Hooks(Middleware):
    def before_run(self, request):
        seen.set("before")
        self.misbehave("before_run", request)

    def after_run(self, request, result, error):
        self.misbehave("after_run", request)

    def on_retry(self, request, error, delay):
        self.misbehave("on_retry", request)

    def on_dead(self, request, reason, message):
        self.misbehave("on_dead", request)

    def misbehave(self, hook, request):
        if request.kwargs.get("how") == hook:
            sys.exit(f"in {hook}")

class Breaks(logging.Handler):
    def emit(self, record):
        if "no such log" in record.getMessage():
            sys.exit("in a handler")

if "pytest" not in sys.modules:
    logging.getLogger().addHandler(Breaks())

app = make_app(backend=True, middleware=[Hooks()])
quick = dict(retry_backoff=0.01, retry_jitter=False, max_retries=1)
seen = contextvars.ContextVar("seen", default=None)

class Mute(Exception):
    def __str__(self):
        return None.text

class Deadly(Exception):
    def __str__(self):
        sys.exit("in __str__")
    __repr__ = __str__

class Odd(datetime.datetime):
    def isoformat(self, *args):
        raise RuntimeError("no format")

class Deadlier(Odd):
    def isoformat(self, *args):
        sys.exit("no format")

def end(how, items=None, more=None):
    """What bodies of either kind may do."""
    if how in ("mute", "before_run", "on_retry", "on_dead"):
        raise Mute()
    if how == "deadly text":
        raise Deadly()
    if how == "deadly retry":
        raise Retry(exc=Deadly())
    if how == "deadly reject":
        raise Reject(Deadly())
    if how == "surrogate":
        raise ValueError(os.fsdecode(b"caf\\xe9.txt"))
    if how == "naive eta":
        raise Retry(eta=datetime.datetime.utcnow())
    if how == "text eta":
        raise Retry(eta="tomorrow")
    if how == "text countdown":
        raise Retry(countdown="5")
    if how == "nan countdown":
        raise Retry(countdown=float("nan"))
    if how == "retries":
        raise Retry(max_retries="5")
    if how == "bound retries":
        tasks["ends"].retry(exc=ValueError("the cause"), max_retries="5")
    if how == "no exception":
        raise Retry(exc="the cause")
    if how == "changed retry":
        retry = Retry()
        retry.countdown = []
        raise retry
    if how == "timedelta":
        raise Retry(countdown=datetime.timedelta(seconds=0.05), exc=ValueError("the cause"))
    if how == "reject":
        raise Reject(ValueError("no good"), requeue=False)
    if how == "reject bytes":
        raise Reject(b"no")
    if how == "exit":
        sys.exit(3)
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "log":
        raise ValueError("no such log")
    if how == "times out":
        raise asyncio.TimeoutError("mine")
    if how == "nested":
        raise ValueError("outer") from Mute()
    if how == "changes":
        # What the body does to its arguments is gone when it runs again.
        if items != [{"a": [1]}] or more["x"] != {"y": []}:
            raise Ignore
        more["x"]["y"].append("z")
        more["new"] = items[0]["a"].pop()
        raise ValueError("changed")
    if how == "gives back":
        items.append("changed")
        mark = f"given-back-{current().task}"
        if not os.path.exists(mark):
            open(mark, "w").close()
            raise Reject(requeue=True)
        raise Reject(items)
    if how == "returns":
        return os.fsdecode(b"caf\\xe9.txt")
    if how == "returns odd":
        return Odd(2020, 1, 1)
    if how == "returns deadly":
        return Deadlier(2020, 1, 1)
    return how

async def exits():
    await asyncio.sleep(0.01)
    sys.exit(4)

async def end_async(how, items=None, more=None):
    """What only coroutines may do."""
    loop, me = asyncio.get_running_loop(), asyncio.current_task()
    if how == "nested exit":
        await asyncio.create_task(exits())
    elif how == "gathered exit":
        await asyncio.gather(exits(), asyncio.sleep(30))
    elif how == "loose exit":
        asyncio.create_task(exits())
        await asyncio.sleep(0.05)
    elif how == "callback exit":
        loop.call_soon(sys.exit, 5)
        await asyncio.sleep(0.05)
    elif how == "cancels itself":
        me.cancel()
    elif how == "cancels itself and waits":
        me.cancel()
        await asyncio.sleep(30)
    elif how == "stops the loop":
        loop.stop()
        await asyncio.sleep(0.05)
    elif how == "stops the loop at its end":
        loop.stop()
    elif how == "task factory":
        loop.set_task_factory(lambda *args, **more: 1 / 0)
        loop.call_later(0.05, loop.set_task_factory, None)
        await asyncio.sleep(0.1)
    else:
        return end(how, items, more)
    return how

def runs(k, n):
    # What a body sets is seen by no other.
    assert seen.get() == "before", seen.get()
    seen.set("by a body")
    note("S", k, n)

if WAY == "sync":
    @app.task(name="put", shard_key="k")
    def put(k, n):
        runs(k, n)
        note("E", k, n)

    @app.task(name="free")
    def free(n):
        put.function(None, n)

    def ends(how, **more):
        note("S", how, 0)
        return end(how, **more)
else:
    @app.task(name="put", shard_key="k")
    async def put(k, n):
        runs(k, n)
        await asyncio.sleep(0.001)
        note("E", k, n)

    @app.task(name="free")
    async def free(n):
        await put.function(None, n)

    async def ends(how, **more):
        note("S", how, 0)
        return await end_async(how, **more)

tasks = {"ends": app.task(name="ends", **quick)(ends), "limited": app.task(name="limited", soft_time_limit=60, **quick)(ends)}
'''

AGAIN = "exhausted"
# How it ends, and what its dead letter says, its reason first; None where it ends well. How often it runs.
ENDS: dict[str, tuple[str | None, str, int]] = {
    "mute": (AGAIN, "Mute: a Mute without a text", 2),
    "deadly text": (AGAIN, "Deadly: a Deadly without a text", 2),
    "deadly retry": (AGAIN, "Deadly: a Deadly without a text", 2),
    "deadly reject": ("rejected", "Deadly: a Deadly without a text", 1),
    "times out": (AGAIN, "TimeoutError: mine", 2),
    "nested": (AGAIN, "ValueError: outer", 2),
    "changes": (AGAIN, "ValueError: changed", 2),
    "gives back": ("rejected", "[{'a': [1]}, 'changed']", 2),
    "surrogate": (AGAIN, "ValueError: caf\\udce9.txt", 2),
    "naive eta": ("failed", "ConfigError: the retry's eta must be", 1),
    "text eta": ("failed", "ConfigError: the retry's eta must be", 1),
    "text countdown": ("failed", "ConfigError: the retry's countdown must be", 1),
    "nan countdown": ("failed", "ConfigError: the retry's countdown must be", 1),
    "retries": ("failed", "ConfigError: the retry's max_retries must be", 1),
    "bound retries": ("failed", "ConfigError: the retry's max_retries must be", 1),
    "no exception": ("failed", "ConfigError: the retry's exc must be", 1),
    "changed retry": ("failed", "ConfigError: the retry's countdown must be", 1),
    "timedelta": (AGAIN, "ValueError: the cause", 2),
    "reject": ("rejected", "ValueError: no good", 1),
    "reject bytes": ("rejected", "no", 1),
    "exit": ("failed", "SystemExit: 3", 1),
    "interrupt": ("failed", "KeyboardInterrupt: ", 1),
    "log": (AGAIN, "ValueError: no such log", 2),
    "returns": (None, "can't be serialised", 1),
    "returns odd": (None, "can't be serialised", 1),
    "returns deadly": (None, "can't be serialised", 1),
    "before_run": ("failed", "SystemExit: in before_run", 0),
    "after_run": (None, "", 1),
    "on_retry": (AGAIN, "Mute", 2),
    "on_dead": (AGAIN, "Mute", 2),
}
ASYNC_ENDS: dict[str, tuple[str | None, str, int]] = {
    "nested exit": ("failed", "SystemExit: 4", 1),
    "gathered exit": ("failed", "SystemExit: 4", 1),
    "loose exit": (None, "", 1),
    "callback exit": (None, "", 1),
    "cancels itself": (None, "", 1),
    "cancels itself and waits": (AGAIN, "CancelledError: ", 2),
    "stops the loop": (None, "", 1),
    "stops the loop at its end": (None, "", 1),
    "task factory": (None, "", 1),
}


@pytest.mark.parametrize(
    "way,concurrency", sampled([("sync", 1), ("sync", 4), ("async", 1), ("async", 4)], ("sync", 1), ("async", 4))
)
def test_however_a_body_ends_its_own_message_alone_feels_it(redis_server, site, way, concurrency):
    site = site(redis_server, f"WAY = {way!r}\n" + ENDINGS)
    pod = site.pod(1, concurrency)
    site.ready(1)
    children = pod.children()
    expected = {**ENDS, **(ASYNC_ENDS if way == "async" else {})}
    keys = keys_on(0, 2)
    results = {}
    for i, how in enumerate(expected):
        for task in ("ends", "limited"):
            results[how, task] = site.task(task).delay(how=how, items=[{"a": [1]}], more={"x": {"y": []}})
        site.send(keys[0], [i])
        site.send(None, [i])
    site.wait_ended()
    dead = {(how, task) for how, task in results if expected[how][0]}

    def letters():
        return {(row["kwargs"]["how"], row["task"]): row for row in site.dead()}

    wait_until(lambda: letters().keys() >= dead, 20, lambda: f"{dead - letters().keys()}\n{site}\n{pod.log}")
    site.wait_empty()
    assert {one: row["reason"] for one, row in letters().items()} == {one: expected[one[0]][0] for one in dead}
    for (how, _), row in letters().items():
        assert expected[how][1] in row["message"], row
        if how != "before_run":
            assert "in end" in row["traceback"] or "Deadly" in row["message"], row
    for (how, task), result in results.items():
        reason, text, runs = expected[how]
        assert len(site.of("S", how)) == 2 * runs, how
        wait_until(lambda result=result: result.ready(), 10, f"{how} has a result")
        assert result.successful() == (reason is None and not text), (how, task)
    ran = Counter((event.key, event.n) for event in site.of("S"))
    assert all(ran[key, n] == 1 for key, sent in site.produced.items() for n in sent), ran
    assert pod.children() == children, pod.log
    pod.stop()


@pytest.mark.parametrize("concurrency,pauses", sampled([(1, True), (4, True), (1, False)], (1, True)))
def test_what_is_given_back_time_and_again_keeps_nobody_out(redis_server, site, concurrency, pauses):
    """Its neighbours run, even if it comes at once; and it comes ever more rarely."""
    site = site(
        redis_server,
        ("" if pauses else "from streamtask.queue import backlog\nbacklog.PAUSE_S = 0.0")
        + """
app = make_app()

@app.task(name="put", shard_key="k")
def put(k, n):
    note("S", k, n)
    note("E", k, n)

@app.task(name="free")
def free(n):
    put.function(None, n)

@app.task(name="returns", shard_key="k")
def returns(k, n):
    note("S", k, n)
    raise Reject(requeue=True)

@app.task(name="returns_free")
def returns_free(n):
    returns.function("free", n)
""",
    )
    site.pod(1, concurrency)
    site.ready(1)
    first, second = keys_on(0, 2)
    site.task("returns").delay(k=first, n=0)
    site.task("returns_free").delay(n=0)
    for key in (first, "free"):
        site.wait_started(key, 0, count=3)
    for n in range(20):
        site.send(second, [n])
        site.send(None, [n])
    site.wait_ended()
    for key in (first, "free") if pauses else ():
        waited = [after.at - before.at for before, after in itertools.pairwise(site.of("S", key))]
        assert all(pause >= 0.0099 * 2**i for i, pause in enumerate(waited)), waited


BREAKS = """
from streamtask.coordination.shared import Slot

def begin(self, lease, entry_ids, begin=Slot.begin):
    if not os.path.exists("broken"):
        open("broken", "w").close()
        raise RuntimeError("an executor breaks")
    begin(self, lease, entry_ids)

if "pytest" not in sys.modules:
    Slot.begin = begin
"""

ASYNC = """
app = make_app()

@app.task(name="put", shard_key="k")
async def put(k, n):
    note("S", k, n)
    note("E", k, n)
"""


@pytest.mark.parametrize(
    "source,concurrency",
    sampled([(TASKS, 1), (TASKS, 4), (ASYNC, 4)], (TASKS, 4)),
    ids=["one", "threads", "async"],
)
def test_a_process_whose_executor_breaks_ends_loudly_and_is_replaced(redis_server, site, source, concurrency):
    site = site(redis_server, source + BREAKS)
    pod = site.pod(1, concurrency)
    site.ready(1)
    children = pod.children()
    site.send(keys_on(0, 1)[0], range(3))
    site.wait_ended()
    assert site.check(killed={}).repeated == 0
    assert len(pod.children()) == 1
    assert pod.children() != children
    assert "failed; the process ends" in pod.log
    assert "RuntimeError: an executor breaks" in pod.log
    assert site.dead() == []
