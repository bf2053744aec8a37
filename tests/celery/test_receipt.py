"""Messages that break their Celery worker at receipt, before any body: dead letters, and what lies behind them runs."""

from __future__ import annotations

import json
from datetime import datetime

import msgpack
import pytest

from tests.celery.malformed import AT_FETCH, AT_RECEIPT, JUST_FAILS, LATER, REJECTED, SOON, parts
from tests.helpers import is_alive, wait_until
from tests.parts import sampled


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_what_no_task_can_be_made_of_is_a_dead_letter_at_once(own_server, site, pool):
    """Whatever is wrong with it, with its reason. The worker lives, its executors are free, and keys go on."""
    s = site(own_server, max_crashes=1)
    s.send("late")
    s.send("put", "a")
    shared, shard = sorted(filter(s.redis.xlen, s.redis.scan_iter("*:stream")), key=lambda name: b"shared" not in name)
    wrong = {**AT_FETCH, **AT_RECEIPT}
    cases = [case for some in (*wrong.values(), REJECTED) for case in some]
    for number, case in enumerate([*cases, *JUST_FAILS]):
        for stream, key in ((shared, None), (shard, b"a")):
            if key is None or number % 3 == 0:
                s.redis.xadd(stream, {"m": msgpack.packb(["late", key, b"i" * 16, case, {}, None])})
    for case in LATER:
        s.redis.xadd(shared, {"m": msgpack.packb(["late", None, b"i" * 16, case, {}, None])})
        s.redis.xadd(shard, {"m": msgpack.packb(["late", b"a", b"i" * 16, case, {}, None])})
    behind = [s.send("late"), s.send("put", "a")]
    worker = s.worker(pool, c=2)
    for junk in (b"junk", packed(parts("[]")), packed(parts("5")), packed(parts(properties={"body_encoding": 5}))):
        for exchange in ("celeryev/worker.online", "celeryev/worker.heartbeat", "celery.pidbox"):
            name = f"streamtask:{{kombu}}:fanout:0:{exchange}"
            wait_until(
                lambda name=name, junk=junk: s.redis.publish(name, junk), 10, lambda name=name: f"who hears {name}"
            )
    for n in behind:
        s.wait("E", n)
    behind = [s.send("late"), s.send("late"), s.send("put", "a")]
    for n in behind:
        s.wait("E", n)
    s.nothing_left()
    delayed = [s.redis.zcard(stream.replace(b":stream", b":delayed")) for stream in (shared, shard)]
    assert delayed == [len(LATER)] * 2
    first = s.redis.zrange(shared.replace(b":stream", b":delayed"), 0, 0, withscores=True)[0][1]
    assert abs(first / 1000 - datetime.fromisoformat(SOON).timestamp()) < 1
    assert s.app.control.inspect(timeout=1).stats()[worker.name]["prefetch_count"] == 8
    found = errors(s)
    for why, some in wrong.items():
        assert sum(why in error["message"] for error in found) >= len(some), (why, found)
    expected = len(cases) + (len(cases) + 2) // 3
    assert len(found) == expected, found
    assert {error["reason"] for error in found} == {"undecodable", "rejected"}
    assert is_alive(worker.pid)


def packed(message):
    return msgpack.packb(["late", None, b"i" * 16, message, {}, None])


@pytest.mark.parametrize(
    "pool, key, how, deaths",
    sampled(
        [
            ("prefork", None, "vanish", 2),
            ("threads", "a", "error", 1),
            ("threads", "a", "vanish", 2),
            ("threads", None, "vanish with all", 3),
            ("solo", None, "error", 1),
            ("prefork", "a", "system exit", 1),
            ("prefork", "a", "vanish with all", 3),  # the first time nobody is left who could count
        ],
        ("prefork", None, "vanish", 2),
        ("threads", "a", "error", 1),
        ("prefork", "a", "vanish with all", 3),
    ),
)
def test_what_ends_its_worker_at_receipt_each_time_is_a_dead_letter(own_server, site, pool, key, how, deaths):
    """However it does that: after ``max_crashes``, alone, and what was handed out beside it runs."""
    s = site(own_server, max_crashes=1)
    ms = 300 if pool == "threads" else 0  # they run beside it
    others = [s.send("put", "b", ms=ms), s.send("late", ms=ms)]
    s.send("fragile" if key else "fragile_plain", key, apply={"headers": {"breaks": how}})
    others += [s.send("put", "a"), s.send("late"), s.send("put", "b")]
    c = 4 if pool == "threads" else 1
    worker = s.start_worker(pool, c=c)

    def decided() -> bool:
        nonlocal worker
        if not is_alive(worker.pid):
            worker = s.start_worker(pool, c=c)
        letters = len(dead(s))
        return letters > 1 or (letters == 1 and all(s.of("E", n=n) for n in others))

    wait_until(decided, 60, lambda: f"a dead letter; {reasons(s)} {s}", poll=0.05)
    s.nothing_left()
    assert reasons(s) == ["crashed"]
    received = deaths + (how in ("error", "system exit"))  # the last time it ends no worker
    assert len(s.of("X")) == received
    assert is_alive(worker.pid)


@pytest.mark.parametrize("pool, key", sampled([("prefork", None), ("solo", "a")], ("solo", "a")))
def test_what_ends_its_worker_when_it_is_read_is_a_dead_letter_in_the_end(own_server, site, pool, key):
    """Before Celery has seen it. It is found among those that were fetched with it, and these run."""
    s = site(own_server, max_crashes=1)
    others = [s.send("put", "a"), s.send("late")]
    behind = [s.send("put", "a"), s.send("late")]
    pattern = "*.shared}:stream" if key is None else "*.[0-9]}:stream"
    (stream,) = [name for name in s.redis.scan_iter(pattern) if s.redis.xlen(name)]
    parts = [b"", "application/json", "utf-8", {}, {}, msgpack.ExtType(77, b"")]
    envelope = msgpack.packb(["late", key and key.encode(), b"i" * 16, parts, {}, None])
    s.redis.xadd(stream, {"m": envelope})
    behind += [s.send("put", "a"), s.send("late")]
    worker = s.start_worker(pool, c=1)
    ends = 0

    def decided() -> bool:
        nonlocal worker, ends
        if not is_alive(worker.pid):
            ends += 1
            worker = s.start_worker(pool, c=1)
        return bool(dead(s)) and all(s.of("E", n=n) for n in others + behind)

    wait_until(decided, 90, lambda: f"a dead letter; {reasons(s)} {ends} ends {s}", poll=0.05)
    s.nothing_left()
    assert reasons(s) == ["crashed"]
    assert "while it was read" in errors(s)[0]["message"]
    # Once with the others, then alone; once more than a body may, for that is how the two are told apart.
    assert ends <= 4
    assert is_alive(worker.pid)


def dead(s):
    return [letter for key in s.redis.scan_iter("*:dlq") for letter in s.redis.xrange(key)]


def errors(s):
    return [json.loads(fields[b"error"]) for _, fields in dead(s)]


def reasons(s):
    return [error["reason"] for error in errors(s)]
