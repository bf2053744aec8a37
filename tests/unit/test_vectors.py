"""docs/vectors.json holds for this code, both ways; a producer in another language is held to the same file."""

from __future__ import annotations

import datetime as dt
import json
import re
import uuid
import zlib
from decimal import Decimal

import msgpack
import pytest

from streamtask import StreamTask
from streamtask.errors import DecodeError
from streamtask.queue.seen import dedupe_hash
from streamtask.redis import wire
from streamtask.redis.keys import segment
from streamtask.redis.scripts import script
from streamtask.sharding import canonical, shard_of
from tests.helpers import ROOT

VECTORS = json.loads((ROOT / "docs" / "vectors.json").read_text())
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text()

TYPES = {
    "datetime": dt.datetime.fromisoformat,
    "date": dt.date.fromisoformat,
    "time": dt.time.fromisoformat,
    "uuid": uuid.UUID,
    "decimal": Decimal,
    "timedelta_us": lambda us: dt.timedelta(microseconds=us),
    "set": set,
    "bytes_hex": bytes.fromhex,
}


def value(one):
    """A value as the file writes it."""
    if isinstance(one, dict):
        if "$type" in one:
            return TYPES[one["$type"]](one["$value"])
        return {name: value(inner) for name, inner in one.items()}
    return [value(inner) for inner in one] if isinstance(one, list) else one


def decoded(vector):
    d = vector["decoded"]
    key = None if d["key_hex"] is None else bytes.fromhex(d["key_hex"])
    return [d["task"], key, wire.id_bytes(d["id"]), value(d["args"]), value(d["kwargs"]), value(d["headers"])]


def entry(vector):
    raw = bytes.fromhex(vector["hex"]) if "hex" in vector else vector["json"].encode()
    return [vector["field"].encode(), raw]


@pytest.mark.parametrize("vector", VECTORS["shard_keys"], ids=lambda v: f"{v['type']}:{v['value']}")
def test_shard_keys(vector):
    key = vector["value"]
    if vector["type"] == "uuid":
        key = uuid.UUID(key)
    elif vector["type"] == "hex":
        key = bytes.fromhex(key)
    raw = bytes.fromhex(vector["canonical_hex"])

    assert canonical(key) == raw
    assert zlib.crc32(raw) == vector["crc32"]
    assert {n: shard_of(raw, int(n)) for n in vector["shards"]} == vector["shards"]
    assert set(vector["shards"]) == {"1", "8", "12"}


@pytest.mark.parametrize("vector", VECTORS["segments"], ids=lambda v: v["text"])
def test_segments_of_key_names(vector):
    assert segment(vector["text"]) == vector["segment"]


@pytest.mark.parametrize("vector", VECTORS["envelopes"], ids=lambda v: f"{v['field']}:{v['name']}")
def test_envelopes_decode(vector):
    found = wire.decode(entry(vector))

    assert found == decoded(vector)
    assert list(map(type, found[3])) == list(map(type, decoded(vector)[3]))


@pytest.mark.parametrize("vector", [v for v in VECTORS["envelopes"] if v["field"] == "m"], ids=lambda v: v["name"])
def test_msgpack_envelopes_encode(vector):
    assert wire.encode(*decoded(vector)).hex() == vector["hex"]


@pytest.mark.parametrize("vector", VECTORS["refused"], ids=lambda v: v["why"])
def test_what_is_refused(vector):
    with pytest.raises(DecodeError):
        wire.decode(entry(vector))


@pytest.mark.parametrize("vector", VECTORS["dedupe_hashes"], ids=lambda v: v["hash_hex"])
def test_dedupe_hashes(vector):
    key = None if vector["shard_key_hex"] is None else bytes.fromhex(vector["shard_key_hex"])

    assert dedupe_hash(vector["queue"], key, vector["dedupe_id"]).hex() == vector["hash_hex"]


# --- a producer that has read docs/protocol.md and nothing else ---


@pytest.fixture
def app(redis_server_all):
    app = StreamTask("shop", broker=redis_server_all.url)

    @app.task(name="pushes.send_push", shard_key="user_id", queue="pushes")
    def send_push(user_id, text):
        pass

    app.queue("pushes").declare(("workers",))
    yield app
    app.close()


def example(text):
    """The fenced block of the page that contains the text."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", PROTOCOL, re.MULTILINE | re.DOTALL)
    return next(block for block in blocks if text in block)


def test_the_worked_example_of_a_plain_xadd(redis_server_all, app):
    client = redis_server_all.client()
    command, stream, star, field, envelope = re.fullmatch(
        r"(XADD) (\S+) (\S+) (\S+) '(.*)'\n", example("XADD streamtask:")
    ).groups()

    client.execute_command(command, stream, star, field, envelope)

    ((_, fields),) = client.xreadgroup("workers", "c", {stream: ">"})[0][1]
    task, key, message_id, args, kwargs, _ = wire.decode([part for pair in fields.items() for part in pair])
    assert (task, key, args, kwargs) == ("pushes.send_push", b"42", [], {"user_id": 42, "text": "hi"})
    assert wire.id_text(message_id) == json.loads(envelope)["id"]
    # where the app itself puts messages of that key
    assert stream == app.queue("pushes").shard_keys(app.queue("pushes").shard_for(key)).stream


def test_the_worked_example_of_produce_lua(redis_server_all, app):
    """In the page's own words: load the file with its includes, call it, call it again."""
    client = redis_server_all.client()
    code = example("EVALSHA")
    scope = {"client": client, "source": script("produce").source, "json": json, "uuid": uuid, "zlib": zlib}
    exec(code, scope)

    assert re.fullmatch(rb"\d+-\d+", scope["first"])
    assert scope["again"] == 0
    ((_, fields),) = client.xrange(scope["tag"] + "stream")
    assert wire.decode([b"j", fields[b"j"]])[:2] == ["pushes.send_push", b"42"]
    app.tasks["pushes.send_push"].delay(user_id=42, text="ours")
    assert client.xlen(scope["tag"] + "stream") == 2


def test_the_page_agrees_with_the_code():
    for number, name in [(-2, "NO_STATE"), (-3, "SEALED"), (-4, "FULL")]:
        assert re.search(rf"^\| `{number}` \| {name}", PROTOCOL, re.MULTILINE)
    assert msgpack.packb(["pushes.send_push", b"42", b"i" * 16, [], {}, None])[:1].hex() in PROTOCOL
    # every argument of the script is explained
    for line in re.findall(r"^-- ((?:KEYS|ARGV)\[\d+\])", script("produce").source, re.MULTILINE):
        assert f"`{line}`" in PROTOCOL
