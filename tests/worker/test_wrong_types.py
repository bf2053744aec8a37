"""Keys that are of another type than ours: each rests what is its own, is named, and nothing else is the worse for it."""

from __future__ import annotations

import json
import time

import psutil
import pytest

from streamtask.errors import ReplyError
from streamtask.redis.keys import SHARED, lease_times, type_of
from tests.helpers import wait_until
from tests.worker.rig import TASKS, keys_on

OTHER = """
@app.task(name="elsewhere", shard_key="k", queue="other")
def elsewhere(k, n):
    note("E", k, n)
"""

BROKEN = ("notes", "delayed", "wake", "lease", "token", "state", "dlq")
"""One on each shard; the last shard is sound."""


def spoil(site, key, kind):
    site.redis.delete(key)
    if kind == "string":
        site.redis.set(key, "something else")
    else:
        site.redis.xadd(key, {"something": "else"})


@pytest.mark.parametrize("kind,concurrency", [("string", 1), ("stream", 4)])
def test_keys_of_another_type_rest_their_shards_alone(redis_server_all, site, kind, concurrency):
    site = site(redis_server_all, TASKS + OTHER, lease=1.0)
    pod = site.pod(1, concurrency)
    site.ready(1)
    sound = keys_on(7, 1)[0]
    site.send(sound, range(3))
    site.send(None, range(3))
    site.wait_ended()
    spoiled = []
    for shard, name in enumerate(BROKEN):
        keys = site.keys.shard(0, shard)
        key = getattr(keys, name)
        key = key("workers") if callable(key) else key
        if not (kind == "stream" and name in ("wake", "dlq")):
            spoil(site, key, kind)
            if site.redis.type(key).decode() != type_of(key):  # a token is a string, if not any
                spoiled.append(key)
    shared = site.keys.shard(0, SHARED)
    for key in (shared.consumers("workers"), shared.requeued("workers")):
        spoil(site, key, kind)
        spoiled.append(key)
    shape = site.app.queue("other").keys
    spoil(site, shape.members("workers"), kind)
    spoiled.append(shape.members("workers"))
    for shard in range(6):
        site.task("put").delay(k=keys_on(shard, 1)[0], n=1) if BROKEN[shard] != "state" else None

    for first in (10, 20):
        site.send(sound, range(first, first + 3))
        wait_until(lambda first=first: site.started(sound)[-1:] == [first + 2], 20, lambda: pod.log)
        processes = [psutil.Process(pid) for pid in (pod.pid, *pod.children())]
        began = [sum(one.cpu_times()[:2]) for one in processes]
        time.sleep(1.0)
        assert all(sum(one.cpu_times()[:2]) - before < 0.4 for one, before in zip(processes, began, strict=True))
        if first == 10:
            (child,) = pod.children()
            pod.kill_child(child)
            wait_until(lambda child=child: pod.children() not in ([], [child]), 20, lambda: pod.log)
    assert len(pod.log.splitlines()) < 150
    named = [key for key in spoiled if f"{key} is a {kind}" in pod.log]
    quiet = [key for key in spoiled if key not in named]
    assert all(key.partition("}:")[2].split(":")[0] in ("dlq", "requeued", "notes") for key in quiet), quiet
    with site.command("doctor", "--json") as doctor:
        assert doctor.wait(20) == 1
        (check,) = [row for row in json.loads(doctor.stdout) if row["name"] == "keys"]
    assert all(f"{key} is a {kind}, and has to be a " in check["message"] for key in spoiled), check
    site.redis.delete(*spoiled)
    site.produced.clear()


@pytest.mark.parametrize("concurrency", [1, 4])
def test_junk_in_hashes_rests_what_it_is_of(redis_server, site, concurrency):
    """No numbers where numbers stand: nothing ends but a child whose lease is somebody else's then, the log says which it is,
    and what is sound goes on."""
    site = site(redis_server, TASKS + OTHER, lease=1.0)
    pod = site.pod(2, concurrency)
    site.ready(2)
    sound = keys_on(7, 1)[0]
    other = site.app.queue("other")
    site.task("elsewhere").delay(k="a", n=0)
    wait_until(lambda: site.of("E", key="a"))
    shards = [site.keys.shard(0, shard) for shard in range(6)]
    junk = [
        (other.keys.meta, {"shards": "x", "epoch": "\x9b"}),
        (shards[0].lease("workers"), {"owner": "nobody", "expires_at": "x"}),
        (shards[1].lease("workers"), {"owner": b"\xff", "lease_ms": "-"}),
        (shards[2].lease("workers"), {"token": "x", "voided": "x"}),
        (shards[3].state, {"open": "x", "epoch": "x", "kept:workers": "x", "seq": "x"}),
        (site.app.queue("default").keys.member_info("workers"), dict.fromkeys(("x", "y"), "{")),
        (site.keys.shard(0, SHARED).state, {"kept:workers": "x"}),
        (
            lease_times(site.app.queue("default").keys.alive("workers", site.keys.shard(0, SHARED), cluster=False)),
            {"x": "y"},
        ),
    ]
    before = [site.redis.hgetall(key) for key, _ in junk]
    for key, fields in junk:
        site.redis.hset(key, mapping=fields)
    notes = shards[4].notes("workers")
    site.redis.hset(notes, mapping={"1-1": "x", "y": "\x9b"})
    for first in (10, 20):
        site.send(sound, range(first, first + 3))
        wait_until(lambda first=first: site.started(sound)[-1:] == [first + 2], 20, lambda: pod.log)
        time.sleep(1.5)  # some beats
    assert f"of {shards[0].lease('workers')} is no number" in pod.log
    with pytest.raises(ReplyError, match=r"the field shards of .*t.other.*:meta is no number, but b'x'"):
        site.load(redis_server.url).tasks["elsewhere"].delay(k="a", n=1)
    assert len(pod.log.splitlines()) < 100, pod.log
    site.redis.delete(notes)
    for (key, fields), were in zip(junk, before, strict=True):
        site.redis.hdel(key, *fields)
        if were:
            site.redis.hset(key, mapping=were)
    site.produced.clear()
    site.task("elsewhere").delay(k="a", n=1)
    wait_until(lambda: len(site.of("E", key="a")) == 2, 20, lambda: pod.log)
    for shard in range(6):
        site.send(keys_on(shard, 1)[0], range(30, 32))
    site.wait_ended(timeout=30)
    assert len(pod.children()) == 2
    assert "Traceback" not in pod.log
    assert pod.log.count("a worker process ended") <= 2, pod.log
