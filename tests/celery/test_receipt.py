"""Messages that break their Celery worker at receipt, before any body: dead letters, and what lies behind them runs."""

from __future__ import annotations

import json

import msgpack
import pytest
from kombu import Producer

from tests.helpers import is_alive, wait_until

FINE = [[], {"n": 0}, {}]
HEADERS = {"task": "late", "id": "x"}
WRONG = {
    "no id": ({"task": "late"}, FINE),
    "a dict as id": ({**HEADERS, "id": {"a": 1}}, FINE),
    "a dict as task": ({**HEADERS, "task": {}}, FINE),
    "an unknown task without id": ({"task": "unknown"}, FINE),
    "body {}": (HEADERS, {}),
    "body []": (HEADERS, []),
    "timelimit: a text": ({**HEADERS, "timelimit": "abc"}, FINE),
    "timelimit: two texts": ({**HEADERS, "timelimit": ["a", "b"]}, FINE),
    "timelimit: a number": ({**HEADERS, "timelimit": 5}, FINE),
    "timelimit: beyond floats": ({**HEADERS, "timelimit": [10**400, None]}, FINE),
    "keyed, no id": ({"task": "late", "shard_key": "a"}, FINE),
    "keyed, body []": ({**HEADERS, "shard_key": "a"}, []),
}


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_what_is_no_message_of_celerys_is_a_dead_letter_at_once(own_server, site, pool):
    """Whatever is wrong with it, with its reason; the worker lives, and its key goes on."""
    s = site(own_server)
    with s.app.connection_for_write() as connection:
        for headers, body in WRONG.values():
            Producer(connection).publish(body, serializer="json", routing_key="celery", headers=headers)
    behind = [s.send("late"), s.send("put", "a")]
    worker = s.worker(pool, c=1)
    for n in behind:
        s.wait("E", n)
    wait_until(lambda: len(dead(s)) == len(WRONG), 10, lambda: f"dead letters {reasons(s)}; {s}")
    assert set(reasons(s)) == {"rejected"}
    assert all("can't receive it" in error["message"] for error in errors(s))
    assert is_alive(worker.pid)
    s.nothing_left()


@pytest.mark.parametrize(
    "pool, key, how, deaths",
    [
        ("prefork", None, "vanish", 2),
        ("threads", "a", "error", 1),
        ("threads", "a", "vanish", 2),
        ("threads", None, "vanish with all", 3),
        ("solo", None, "error", 1),
        ("prefork", "a", "system exit", 1),
        ("prefork", "a", "vanish with all", 3),  # the first time nobody is left who could count
    ],
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


@pytest.mark.parametrize("pool, key", [("prefork", None), ("solo", "a")])
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
