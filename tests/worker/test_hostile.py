"""Messages of a producer that is wrong or means harm: each harms nothing but itself, however bodies are run."""

from __future__ import annotations

import datetime as dt
import json
import random
import uuid
from decimal import Decimal

import msgpack
import psutil
import pytest

from streamtask.errors import ConfigError, EncodeError
from tests.fuzz import near_envelope
from tests.helpers import wait_until
from tests.worker.rig import TASKS, keys_on

ASYNC = """
app = make_app()

async def body(key, n, ms, fail):
    note("S", key, n)
    await asyncio.sleep(ms / 1000)
    note("E", key, n)

@app.task(name="put", shard_key="k")
async def put(k, n, ms=0, fail=0):
    await body(k, n, ms, fail)

@app.task(name="free")
async def free(n, ms=0, fail=0):
    await body(None, n, ms, fail)
"""

WAYS = pytest.mark.parametrize(
    "source,concurrency", [(TASKS, 1), (TASKS, 4), (ASYNC, 4)], ids=["one", "threads", "async"]
)
KEY = keys_on(0, 1)[0]

# What still ends a process when it is read, without a word: in workers alone, not in the test that sends it.
DEADLY = """
from streamtask.redis import wire

def with_deadly(hook):
    def deadly(code, data):
        if code == 77:
            if data == b"segv":
                ctypes.string_at(0)
            os._exit(1)
        return hook(code, data)
    return deadly

if "pytest" not in sys.modules:
    wire.ext_hook = with_deadly(wire.ext_hook)
"""


def envelope(args=(), key=KEY, headers=None):
    return msgpack.packb(["put", key and key.encode(), uuid.uuid4().bytes, list(args), {"k": key, "n": 0}, headers])


def nested(levels, inner=b"\x90"):
    """The bytes of a set in a set in a set, in one go: what packs them would refuse."""
    for _ in range(levels):
        inner = b"\x91\xc9" + len(inner).to_bytes(4, "big") + b"\x07" + inner
    return inner[1:]


def with_arg(raw):
    """An envelope that has these bytes in the place of its only argument."""
    marker = "here-it-stands"
    return envelope([marker]).replace(msgpack.packb(marker), raw)


def append(site, raw, field="m"):
    for shard in (0, "shared"):
        site.redis.xadd(site.stream(shard), {field: raw})


def nothing_else_suffered(site, pod, children, dead):
    """All that is not hostile runs, in its order; what is hostile is a dead letter; no process has ended."""
    site.send(KEY, range(10))
    site.send(None, range(10))
    site.wait_ended()
    wait_until(lambda: len(site.dead()) >= dead, 20, lambda: f"{len(site.dead())} dead letters; {site}")
    site.wait_empty()
    assert len(site.dead()) == dead
    assert site.started(KEY) == list(range(10))
    assert pod.children() == children
    assert pod.log.replace("\n", "").isprintable()
    assert len(pod.log) < 500_000


@WAYS
def test_what_no_worker_may_decode_is_a_dead_letter_at_once(redis_server, site, source, concurrency):
    site = site(redis_server, source)
    pod = site.pod(1, concurrency)
    site.ready(1)
    children = pod.children()
    flood = [Decimal((2**61 - 1) * n) for n in range(1, 20_000)]
    packed = [msgpack.ExtType(5, str(one).encode()) for one in flood]
    hostile = [
        with_arg(nested(250)),
        with_arg(nested(5)),
        envelope([msgpack.ExtType(7, msgpack.packb(packed))]),
        envelope([dict.fromkeys(packed)]),
        envelope([msgpack.ExtType(7, msgpack.packb(list(range(20_000))))]),
        envelope(headers={"expires": "x"}),
        envelope(headers={"expires": [1]}),
        envelope(headers={"expires": 1e300}),
        envelope(headers={"eta": {}}),
        envelope(headers={"at": b"1"}),
        envelope(headers={"content": 5}),
        envelope(headers={b"bytes": 1}),
        envelope(["x" * (1 << 20)]),
    ]
    for raw in hostile:
        append(site, raw)
    nothing_else_suffered(site, pod, children, 2 * len(hostile))
    assert {row["reason"] for row in site.dead()} == {"undecodable"}


@WAYS
def test_text_that_cant_be_encoded_harms_nobody(redis_server, site, source, concurrency):
    """A lone surrogate, as JSON can write it, wherever text is, or what moves a cursor; with ids that are remembered, and
    results."""
    source = source.replace("make_app()", "make_app(backend=True, middleware=[Dedupe(ttl=60)])") + RAISES
    site = site(redis_server, source)
    pod = site.pod(1, concurrency)
    site.ready(1)
    children = pod.children()
    hostile = [
        {"task": "put", "id": "\ud800"},
        {"task": "\ud800", "id": "1"},
        {"task": "put", "id": "2", "key": "\udfff"},
        {"task": "put", "id": "3", "kwargs": {"k": KEY, "n": 1, "ms": "\ud800"}},
        {"task": "put", "id": "4", "headers": {"\ud800": 1}},
        {"task": "put", "id": "5", "\ud800": 1},
        {"task": "\x1b\x9b\u202e" * 20_000, "id": "\x9b" * 50_000},
    ]
    for one in hostile:
        append(site, json.dumps(one), "j")
    results = [site.task("raises").delay(how=how) for how in ("error", "reject", "nested")]
    returned = site.task("raises").delay(how="return")
    nothing_else_suffered(site, pod, children, 2 * len(hostile) + len(results))
    for result in [*results, returned]:
        wait_until(lambda result=result: result.state == "FAILURE", 10)
    shown = {row["reason"]: f"{row['shard']}:{row['dlq_id']}" for row in site.dead()}
    assert set(shown) == {"undecodable", "unknown-task", "exhausted", "rejected"}
    assert all(len(row["message"]) < 10_000 and len(row.get("task") or "") < 10_000 for row in site.dead())
    for command in (["list"], *(["show", one] for one in shown.values())):
        with site.command("dlq", *command) as spawned:
            assert spawned.wait(20) == 0, str(spawned)


RAISES = """
class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no text")

def raises(how):
    if how == "error":
        raise ValueError("\\ud800")
    if how == "reject":
        raise Reject("\\ud800")
    if how == "nested":
        raise ValueError("outer") from Mute()
    return "\\ud800"

if put.is_async:
    async def araises(how):
        return raises(how)
    app.task(name="raises", max_retries=0)(araises)
else:
    app.task(name="raises", max_retries=0)(raises)
"""


def test_the_sender_is_told_at_once(redis_server, site):
    site = site(redis_server)
    deep = frozenset()
    for _ in range(250):
        deep = frozenset([deep])
    for value in (
        deep,
        set(range(20_000)),
        dict.fromkeys(range(20_000)),
        {Decimal((2**61 - 1) * n) for n in range(99)},
    ):
        with pytest.raises(EncodeError):
            site.task("free").delay(n=value)
    for headers in ({"expires": "x"}, {"eta": dt.timedelta(1)}, {"content": "application/json"}, {5: 1}):
        with pytest.raises(EncodeError if 5 not in headers else ConfigError):
            site.task("free").apply_async(kwargs={"n": 1}, headers=headers)
    assert not site.left()


@pytest.mark.parametrize("shard", [0, "shared"])
@pytest.mark.parametrize(
    "source,concurrency,how",
    [
        (TASKS, 1, b"exit"),
        pytest.param(TASKS, 4, b"segv", marks=pytest.mark.more),
        pytest.param(ASYNC, 4, b"exit", marks=pytest.mark.more),
    ],
    ids=["one", "threads", "async"],
)
def test_what_ends_its_process_when_it_is_read_is_a_dead_letter_in_the_end(
    redis_server, site, source, concurrency, how, shard
):
    """No body has begun, so none can be charged: the entries are read one at a time then, and the culprit is found."""
    site = site(redis_server, source.replace("app = make_app()", DEADLY + "app = make_app()"), max_crashes=1)
    key = None if shard == "shared" else KEY
    site.send(key, range(10))
    site.redis.xadd(site.stream(shard), {"m": envelope([msgpack.ExtType(77, how)], key)})
    site.send(key, range(10, 20))
    pod = site.pod(1, concurrency)
    site.wait_ended()
    site.wait_empty(30)
    (row,) = site.dead()
    assert row["reason"] == "crashed"
    assert "while it was read" in row["message"]
    # The first time it was among others, and then alone.
    ends = pod.log.count("a worker process ended")
    assert 4 <= ends <= 6
    runs = [len(site.of("S", key, n)) for n in range(20)]
    # Side by side a body may run while another message is read.
    assert runs == [1] * 20 or (concurrency > 1 and key is None and set(runs) <= set(range(1, ends)))
    assert site.started(key) == sorted(site.started(key)) or key is None


def test_messages_above_the_limit_leave_no_memory_behind(own_server, site):
    site = site(own_server)
    pod = site.pod(1)
    site.ready(1)
    site.send(KEY, range(5))
    site.wait_ended()
    (child,) = pod.children()
    before = psutil.Process(child).memory_info().rss
    for _ in range(20):
        site.redis.xadd(site.stream(0), {"m": envelope(["x" * (4 << 20)])})
    wait_until(lambda: len(site.dead()) == 20, 30)
    site.send(KEY, range(5, 10))
    site.wait_ended()
    assert "max_message_bytes is 1048576" in site.dead()[0]["message"]
    assert pod.children() == [child]
    assert psutil.Process(child).memory_info().rss - before < 40 << 20


@WAYS
def test_whatever_is_appended_the_worker_lives(redis_server, site, source, concurrency):
    """Some hundred entries near real ones: each is run, or dropped by its own rules, or a dead letter."""
    site = site(redis_server, source)
    pod = site.pod(1, concurrency)
    site.ready(1)
    children = pod.children()
    chance = random.Random(7)
    for _ in range(150):
        for shard in (0, "shared"):
            fields = near_envelope(chance, task="put" if shard == 0 else "free")
            site.redis.execute_command("XADD", site.stream(shard), "*", *fields)
    good = range(1000, 1010)
    site.send(KEY, good)
    site.send(None, good)
    wait_until(
        lambda: all(site.of("E", key, n) for key in (KEY, None) for n in good), 30, lambda: str(site),
        progress=lambda: (site.ended(), len(site.dead())),
    )  # fmt: skip
    site.wait_empty(30)
    assert pod.children() == children, pod.log
