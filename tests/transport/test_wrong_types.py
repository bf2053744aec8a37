"""Keys of a wrong type, which a neighbour has written: they harm their own queue alone, and that until they are gone."""

from __future__ import annotations

import time

import pytest

from tests.helpers import wait_until
from tests.transport.kit import Inbox, Kit, publish

OF_QUEUE = ["meta", "members:workers", "member-info:workers"]
OF_STREAM = ["stream", "state", "notes:workers", "delayed", "wake", "token:workers"]
PLAIN = ["meta", *OF_STREAM, "requeued:workers", "consumers:workers", "lease:workers"]
KEYED = [*OF_QUEUE, *OF_STREAM, "replaced:workers", "lease:workers"]
UNUSED = {"notes:workers", "token:workers", "members:workers", "member-info:workers"}
"""Of these the test's messages need none, or not in this process."""


def taken(inbox: Inbox, wanted: set[str], seconds: float) -> set[str]:
    """Drains and acknowledges until all that is wanted has come; what has not."""
    ends = time.monotonic() + seconds
    left = set(wanted)
    while left and time.monotonic() < ends:
        inbox.drain(0.05)
        while inbox.messages:
            message = inbox.messages.pop()
            left.discard(message.payload)
            message.ack()
    return left


@pytest.mark.parametrize("key", [None, "u1"], ids=["plain", "keyed"])
def test_only_the_queue_of_such_a_key_rests(
    kit: Kit, key: str | None, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """All others of the process go on, also of one that begins now; when the key is gone the queue does, too."""
    headers = {"headers": {"shard_key": key}} if key else {}
    kinds = {f"bad{n}": kind for n, kind in enumerate(KEYED if key else PLAIN)}
    channel, client = kit.channel(), kit.client()
    for name in (*kinds, "good"):
        kit.queue(channel, name)
        publish(channel, f"{name} 0", to=name, **headers)
    first = Inbox(kit.channel(), *kinds, "good", prefetch=100)
    shard = "shared"
    if key:
        shard = next(stream.split("}")[0][-1] for stream in kit.keys("{kombu.good.*}:stream") if client.xlen(stream))
    assert taken(first, {f"{name} 0" for name in (*kinds, "good")}, 15) == set()
    odd = {}
    for name, kind in kinds.items():
        what = f"{{kombu.{name}}}" if kind in OF_QUEUE else f"{{kombu.{name}.0.{shard}}}"
        odd[name] = f"{kit.namespace}:{what}:{kind}"
        if kind == "lease:workers" and not key:
            (odd[name],) = kit.keys(f"{what}:{kind}:*")
        if client.exists(odd[name]):
            client.rename(odd[name], f"aside {odd[name]}")
        client.set(odd[name], "junk")
    publish(channel, "good 1", to="good", **headers)
    assert taken(first, {"good 1"}, 10) == set()
    second = Inbox(kit.channel(transport_options={"eta_hold": 59}), *kinds, "good", prefetch=100)
    first.cancel()
    publish(channel, "good 2", to="good", **headers)
    assert taken(second, {"good 2"}, 10) == set()
    by_keepers: list[str] = []

    def unsaid() -> set[str]:
        by_keepers.append(capfd.readouterr().err)  # a keeper may be the first to look at a lease
        said = "\n".join([*by_keepers, *(record.getMessage() for record in caplog.records)])
        return {kinds[name] for name in odd if odd[name] not in said}

    wait_until(lambda: unsaid() <= UNUSED, 5, lambda: str(unsaid()))
    for name in odd.values():
        client.delete(name)
        if client.exists(f"aside {name}"):
            client.rename(f"aside {name}", name)
    for name in kinds:
        publish(channel, f"{name} 1", to=name, **headers)
    assert {kinds[left.split()[0]] for left in taken(second, {f"{name} 1" for name in kinds}, 20)} == set()


def test_nothing_is_taken_for_good_that_can_t_be_given(kit: Kit) -> None:
    """Without acknowledging, what Redis gave with an error would be gone."""
    kinds = {"a": "state", "b": "notes:workers", "c": "wake"}
    channel, client = kit.channel(), kit.client()
    odd = {}
    for name, kind in kinds.items():
        kit.queue(channel, name)
        publish(channel, f"{name} 0", to=name)
        odd[name] = f"{kit.namespace}:{{kombu.{name}.0.shared}}:{kind}"
        if client.exists(odd[name]):
            client.rename(odd[name], f"aside {odd[name]}")
        client.set(odd[name], "junk")
    inbox = Inbox(kit.channel(), *kinds, no_ack=True)
    assert not inbox.drain(1.5)
    for name in odd.values():
        client.delete(name)
        if client.exists(f"aside {name}"):
            client.rename(f"aside {name}", name)
    inbox.take(3)
    assert sorted(inbox.bodies) == ["a 0", "b 0", "c 0"]


def test_junk_in_hashes_rests_what_it_is_of(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    """No numbers where numbers stand, and no retry where a retry is stored."""
    channel, client = kit.channel(), kit.client()
    for name in ("bad", "odd", "good"):
        kit.queue(channel, name)
        publish(channel, f"{name} 0", to=name, headers={"shard_key": "u1"})
    first = Inbox(kit.channel(), "odd", prefetch=100)
    (entry,) = first.take()
    (stream,) = [key for key in kit.keys("{kombu.odd.0.[0-9]}:stream") if client.xlen(key)]
    client.hset(stream.replace(":stream", ":replaced:workers"), entry.headers["streamtask_delivery"]["entry"], "junk")
    meta = f"{kit.namespace}:{{kombu.bad}}:meta"
    shards = client.hget(meta, "shards")
    client.hset(meta, mapping={"shards": "x", "priority:x": "1"})
    first.channel.close()
    second = Inbox(kit.channel(transport_options={"eta_hold": 59}), "bad", "odd", "good", prefetch=100)
    assert taken(second, {"odd 0", "good 0"}, 15) == set()
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert f"the field shards of {meta} is no number, but b'x'" in said
    client.hset(meta, "shards", shards)
    assert taken(second, {"bad 0"}, 15) == set()
    wait_until(lambda: kit.pending("odd") == 0 or second.drain(0.05))
