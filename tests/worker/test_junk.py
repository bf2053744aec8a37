"""What can't be run is a dead letter, whole; the worker goes on behind it."""

from __future__ import annotations

import json
import uuid

from streamtask.redis import wire
from tests.helpers import wait_until
from tests.worker.rig import keys_on


def test_junk_becomes_dead_letters_and_nothing_else_suffers(redis_server_all, site):
    site = site(redis_server_all)
    pod = site.pod(1, 2)
    site.ready(1)
    children = pod.children()
    key = keys_on(0, 1)[0]
    stream, shared = site.stream(0), site.stream("shared")
    good = wire.encode("put", key.encode(), uuid.uuid4().bytes, [], {"k": key, "n": 0})
    junk = [
        {b"m": b"\xc1 no msgpack"},
        {b"m": b""},
        {b"m": good[:-3]},
        {b"m": good + b"\x01"},
        {b"x": good},
        {b"other": b"1", b"m": good},
        {b"j": b"{not json"},
        {b"j": json.dumps({"task": "put"}).encode()},
        {b"m": wire.pack_body(["put", "text key", b"i" * 16, [], {}, None])},
        {b"m": wire.pack_body(["put", key.encode(), b"i" * 16, [], {"k": key, "n": 0}])},
    ]
    for fields in junk:
        site.redis.xadd(stream, fields)
        site.redis.xadd(shared, fields)
    site.send(key, range(20))
    site.send(None, range(20))
    site.wait_ended()
    site.wait_empty()
    rows = site.dead()
    assert len(rows) == 2 * len(junk)
    assert {row["reason"] for row in rows} == {"undecodable"}
    for shard in (0, "shared"):
        kept = [row["fields"] for row in rows if row["shard"] == shard]
        assert all(fields.items() <= row.items() for fields, row in zip(junk, kept, strict=True))
    site.check(killed={})
    assert pod.children() == children


def test_unknown_tasks_and_wrong_arguments(redis_server, site):
    site = site(redis_server)
    pod = site.pod(1)
    site.ready(1)
    children = pod.children()
    key = keys_on(0, 1)[0]

    def append(shard, task, key, args, kwargs):
        envelope = wire.encode(task, key, uuid.uuid4().bytes, args, kwargs)
        site.redis.xadd(site.stream(shard), {b"m": envelope})

    for shard, lane in ((0, key.encode()), ("shared", None)):
        append(shard, "no.such.task", lane, [1], {"a": 2})
        append(shard, "put", lane, [], {"k": key, "n": 1, "nonsense": 2})
        append(shard, "put", lane, [1, 2, 3, 4, 5, 6, 7], {})
        append(shard, "put", lane, [], {})
    site.send(key, range(10))
    site.send(None, range(10))
    wait_until(lambda: len(site.dead()) == 8, 20, lambda: str([row["reason"] for row in site.dead()]))
    site.wait_ended()
    site.wait_empty()
    unknown = [row for row in site.dead() if row["reason"] == "unknown-task"]
    assert [(row["task"], row["args"], row["kwargs"]) for row in unknown] == [("no.such.task", [1], {"a": 2})] * 2
    assert all("TypeError" in row["message"] for row in site.dead() if row["reason"] != "unknown-task")
    assert site.started(key)[-10:] == list(range(10))
    assert pod.children() == children


def test_an_entry_on_a_shard_that_is_not_its_keys(redis_server, site):
    """A foreign producer's mistake: it runs, or is a dead letter; it is not lost and stops nobody."""
    site = site(redis_server)
    site.pod(1)
    site.ready(1)
    key = keys_on(0, 1)[0]
    envelope = wire.encode("put", key.encode(), uuid.uuid4().bytes, [], {"k": key, "n": 7})
    site.redis.xadd(site.stream(5), {b"m": envelope})
    wait_until(lambda: site.of("E", key, 7) or site.dead())
    site.send(keys_on(5, 1)[0], range(5))
    site.wait_ended(5)
    site.wait_empty()
