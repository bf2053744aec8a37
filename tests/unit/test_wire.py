"""The wire format: what goes in comes out, and nothing else is let in."""

from __future__ import annotations

import concurrent.futures
import datetime as dt
import json
import math
import re
import threading
import time
import tracemalloc
import uuid
from collections import OrderedDict, namedtuple
from decimal import Decimal

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamtask.errors import DecodeError, EncodeError
from streamtask.redis import wire

ID = bytes(range(16))
ID_TEXT = str(uuid.UUID(bytes=ID))


def roundtrip(value):
    fields = [wire.MSGPACK, wire.encode("task", b"key", ID, [value], {"k": value})]
    task, key, message_id, args, kwargs, headers = wire.decode(fields)
    assert (task, key, message_id, headers) == ("task", b"key", ID, None)
    assert repr(args[0]) == repr(kwargs["k"])
    return args[0]


def json_entry(**values):
    return [b"j", json.dumps(values).encode()]


# --- values ---

instants = st.datetimes(timezones=st.just(dt.timezone.utc) | st.none()).map(lambda one: one.replace(fold=0))
"""Without ``fold``, which no clock's UTC has: it would mean nothing, and is not kept."""

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | instants
    | st.dates()
    | st.times()
    | st.uuids()
    | st.decimals(allow_nan=False)
    | st.timedeltas(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(0, 2**60), inner, max_size=4),
    max_leaves=12,
)


@given(plain)
def test_plain_values_come_back_as_they_were(value):
    back = roundtrip(value)

    assert back == value
    assert type(back) is type(value)


bare = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | instants
    | st.uuids()
    | st.decimals(allow_nan=False)
)
hashable = st.recursive(bare | st.frozensets(bare, max_size=3), lambda inner: st.tuples(inner, inner), max_leaves=4)


@settings(max_examples=40)
@given(st.dictionaries(hashable, st.integers(0, 9), max_size=4))
def test_keys_of_a_map_come_back_as_they_were(value):
    fields = [wire.MSGPACK, wire.encode("task", b"key", ID, [value], {})]
    found = wire.decode(fields)[3][0]
    assert found == value
    assert set(map(repr, found)) == set(map(repr, value)) or any(isinstance(key, tuple | frozenset) for key in value)
    assert wire.unpack_body(wire.pack_body(value)) == value  # as results are stored


def test_many_keys_that_are_tuples():
    value = {(n, str(n)): n for n in range(5_000)}
    assert roundtrip(value) == value
    with pytest.raises(EncodeError, match="10000"):
        wire.encode("t", None, ID, [{(n,): n for n in range(20_000)}], {})


@pytest.mark.parametrize("key", [None, True, 1.5, (1, 2)])
def test_json_keys_are_text(key):
    with pytest.raises(TypeError, match="key"):
        wire.check_json_keys(([], {"a": [{"b": {key: 1}}]}))
    wire.check_json_keys(([{"a": {1: [{}]}}], {}))


@pytest.mark.parametrize(
    "value",
    [
        math.inf,
        -math.inf,
        dt.datetime(2026, 3, 29, 2, 30, 0, 1, tzinfo=dt.timezone(dt.timedelta(hours=-3, minutes=-30))),
        dt.datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=dt.timezone.utc),
        dt.time(23, 59, 59, 999999, tzinfo=dt.timezone.utc),
        dt.timedelta.max,
        dt.timedelta.min,
        dt.timedelta(microseconds=-1),
        Decimal("1E+400"),
        Decimal("-0.00"),
        2**64 - 1,
        -(2**63),
        "\x00\U0010ffff",
        {1: "int key", "1": "text key", b"1": "bytes key"},
        {"a", 1, None, b"x", 2.5},
        {(1, 2), (3, (4, 5))},
        {frozenset({1, 2}), frozenset({frozenset({3})})},
        set(),
        {uuid.UUID(int=1), Decimal(1), dt.date(2026, 1, 1)},
        [{"nested": [{(1,)}]}],
    ],
    ids=lambda value: type(value).__name__,
)
def test_unusual_values_come_back_as_they_were(value):
    back = roundtrip(value)

    assert back == value
    assert type(back) is type(value)


def test_nan_stays_nan():
    assert math.isnan(roundtrip(math.nan))


@pytest.mark.parametrize(
    "value,expected",
    [
        ((1, 2), [1, 2]),
        (namedtuple("Point", "x y")(1, 2), [1, 2]),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (frozenset({1}), {1}),
        (bytearray(b"x"), b"x"),
        (memoryview(b"x"), b"x"),
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", repr(value)),
)
def test_related_types_come_back_as_the_plain_one(value, expected):
    assert roundtrip(value) == expected


class Own:
    pass


@pytest.mark.parametrize(
    "value",
    [Own(), object(), lambda: None, 2**64, -(2**63) - 1, 1j, "\ud800", range(3), iter([]), Exception(), Own, {Own()}],
    ids=lambda v: type(v).__name__,
)
def test_other_values_are_refused_naming_the_task(value):
    for args, kwargs in (([value], {}), ([], {"k": value}), ([[{"deep": [value]}]], {})):
        with pytest.raises(EncodeError, match=r"mod\.task"):
            wire.encode("mod.task", None, ID, args, kwargs)


def test_a_structure_that_contains_itself_is_refused():
    loop = []
    loop.append(loop)

    with pytest.raises(EncodeError):
        wire.encode("t", None, ID, loop, {})


def test_headers_come_back():
    headers = {"expires": 123, "trace": "x", "n": [1]}

    assert wire.decode([b"m", wire.encode("t", None, ID, [], {}, headers)])[5] == headers


# --- the envelope ---


def test_the_envelope_is_a_msgpack_array_of_six():
    assert msgpack.unpackb(wire.encode("t", b"k", ID, [1], {"a": 2})) == ["t", b"k", ID, [1], {"a": 2}, None]


@pytest.mark.parametrize("message_id", [ID, "some text", b"short"])
def test_ids_of_any_form_come_back(message_id):
    assert wire.decode([b"m", wire.encode("t", None, message_id, [], {})])[2] == message_id


def test_further_fields_of_an_entry_do_not_disturb():
    assert wire.decode([b"m", wire.encode("t", None, ID, [], {}), b"replayed", b"1"])[0] == "t"


GOOD = ["t", b"k", ID, [], {}, None]


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [b"m"],
        [b"m", b""],
        [b"m", b"\xc1"],
        [b"m", b"\x96"],
        [b"m", b"plain text"],
        [b"m", msgpack.packb(GOOD) + b"\x00"],
        [b"m", msgpack.packb(GOOD)[:-1]],
        [b"m", msgpack.packb(GOOD[:5])],
        [b"m", msgpack.packb([*GOOD, None])],
        [b"m", msgpack.packb({"task": "t"})],
        [b"m", msgpack.packb(None)],
        *[[b"m", msgpack.packb([*GOOD[:i], bad, *GOOD[i + 1 :]])] for i, bad in enumerate([b"t", "k", 5, {}, [], []])],
        [b"m", msgpack.packb([None, *GOOD[1:]])],
        [b"m", msgpack.packb(["t", 42, *GOOD[2:]])],
        [b"m", msgpack.packb([*GOOD[:2], None, *GOOD[3:]])],
        [b"m", msgpack.packb([*GOOD[:3], [msgpack.ExtType(99, b"")], {}, None])],
        [b"m", msgpack.packb([*GOOD[:3], [msgpack.ExtType(1, b"no date")], {}, None])],
        [b"m", msgpack.packb([*GOOD[:3], [msgpack.ExtType(4, b"short")], {}, None])],
        [b"M", msgpack.packb(GOOD)],
        [b"m2", msgpack.packb(GOOD)],
        [b"payload", b"{}"],
        [b"j", b""],
        [b"j", b"null"],
        [b"j", b"[]"],
        [b"j", b"{"],
        [b"j", b"\xff"],
        json_entry(task=1, id="x"),
        json_entry(id="x"),
        json_entry(task="t"),
        json_entry(task="t", id=5),
        json_entry(task="t", id="x", args={"a": 1}),
        json_entry(task="t", id="x", kwargs=[1]),
        json_entry(task="t", id="x", headers=[1]),
        json_entry(task="t", id="x", key=1.5),
        json_entry(task="t", id="x", key=True),
        json_entry(task="t", id="x", key=""),
        json_entry(task="t", id="x", key=["k"]),
        json_entry(task="t", id="x", unknown=1),
    ],
    ids=lambda fields: repr(fields)[:60],
)
def test_what_is_no_message_is_a_decode_error(fields):
    with pytest.raises(DecodeError):
        wire.decode(fields)


@given(st.binary(max_size=60), st.sampled_from([b"m", b"j"]))
def test_no_bytes_raise_anything_else(data, field):
    try:
        envelope = wire.decode([field, data])
    except DecodeError:
        return
    assert len(envelope) == 6
    assert isinstance(envelope[0], str)


def test_nothing_is_unpickled_unless_it_is_asked_for(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    body = pickle.dumps(([Evil()], {}))
    for content in ("application/x-python-serialize", "application/x-yaml", "nonsense", None, 5):
        fields = [b"m", msgpack.packb(["t", None, ID, body, None, {"content": content}])]
        with pytest.raises(DecodeError):
            wire.decode(fields)
    assert not (tmp_path / "evil").exists()


def test_a_body_of_another_content_type_is_loaded_if_it_is_safe():
    body = json.dumps([[1], {"a": 2}]).encode()

    envelope = wire.decode([b"m", msgpack.packb(["t", None, ID, body, None, {"content": "application/json"}])])

    assert envelope[3:5] == [[1], {"a": 2}]


# --- JSON ---


def test_a_json_envelope():
    fields = json_entry(task="t", key="42", id=ID_TEXT, args=[1], kwargs={"a": "é"}, headers={"h": 1})

    assert wire.decode(fields) == ["t", b"42", ID, [1], {"a": "é"}, {"h": 1}]


def test_what_a_json_envelope_may_leave_out():
    assert wire.decode(json_entry(task="t", id="order-1")) == ["t", None, "order-1", [], {}, None]
    assert wire.decode(json_entry(task="t", id="x", key=None, args=None, kwargs=None)) == ["t", None, "x", [], {}, None]


@pytest.mark.parametrize("key", [42, "42"])
def test_a_number_and_its_text_are_one_key_in_json_too(key):
    assert wire.decode(json_entry(task="t", id="x", key=key))[1] == b"42"


# --- ids ---


@pytest.mark.parametrize(
    "text",
    [
        ID_TEXT,
        ID_TEXT.upper(),
        ID_TEXT.replace("-", ""),
        "{" + ID_TEXT + "}",
        f"urn:uuid:{ID_TEXT}",
        "order-1",
        "é",
        "",
    ],
)
def test_an_id_is_shown_as_it_was_given(text):
    assert wire.id_text(wire.id_bytes(text)) == text
    if text:
        assert wire.id_text(wire.decode(json_entry(task="t", id=text))[2]) == text


@given(st.binary(min_size=16, max_size=16))
def test_sixteen_bytes_are_a_uuid(raw):
    assert wire.id_bytes(wire.id_text(raw)) == raw


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_packed_ids_have_sixteen_bytes(text):
    assert len(wire.pack_id(text)) == 16


def test_packed_ids_of_different_ids_differ():
    assert wire.pack_id(ID) == ID
    assert len({wire.pack_id(f"order-{n}") for n in range(1000)}) == 1000


# --- limits: a message of a hostile producer, and what its sender is told before it is one ---

HASH_0 = 2**61 - 1
"""Multiples of it have the hash 0, as int, Decimal, UUID and float."""


def packed_set(values):
    return msgpack.ExtType(7, msgpack.packb(values, default=wire._default))


def with_args(*args):
    return [b"m", msgpack.packb(["t", b"k", ID, list(args), {}, None], default=wire._default)]


def sets_in_sets(levels):
    inner = []
    for _ in range(levels):
        inner = [msgpack.ExtType(7, msgpack.packb(inner))]
    return inner[0]


def frozensets(levels):
    value = frozenset()
    for _ in range(levels - 1):
        value = frozenset([value])
    return value


def test_sets_nest_as_deep_as_it_is_said():
    most = wire.MOST_NESTED_SETS
    assert roundtrip({"a": frozensets(most)}) == {"a": set(frozensets(most))}
    assert wire.decode(with_args(sets_in_sets(most)))
    for levels in (most + 1, 250, 5000):
        with pytest.raises(DecodeError, match="nested"):
            wire.decode(with_args(sets_in_sets(levels)))
        with pytest.raises(EncodeError, match="nested"):
            wire.encode("t", None, ID, [frozensets(levels)], {})


@pytest.mark.parametrize("kb, packed", [(512, False), (2048, True)], ids=["decode", "encode"])
def test_the_deepest_that_is_taken_needs_no_large_stack(kb, packed):
    """Of a thread (8 MB on Linux), with arrays as deep as msgpack lets them be in each of the sets."""
    inner = []
    for _ in range(wire.MOST_NESTED_SETS):
        inner = [msgpack.ExtType(7, b"\x91" * 1000 + msgpack.packb(inner))]
    fields = with_args(inner[0])
    value = wire.decode(fields)[3][0]
    before = threading.stack_size(kb << 10)
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            if packed:
                assert len(pool.submit(wire.encode, "t", None, ID, [value], {}).result()) > 4000
            else:
                assert len(pool.submit(wire.decode, fields).result()) == 6
    finally:
        threading.stack_size(before)


FLOODS = {
    "decimals": [Decimal(HASH_0 * n) for n in range(1, 20_000)],
    "uuids": [uuid.UUID(int=HASH_0 * n) for n in range(1, 20_000)],
    "many numbers": list(range(wire.MOST_HASHED + 1)),
    "few decimals": [Decimal(HASH_0 * n) for n in range(1, wire.MOST_ALIKE + 2)],
}


@pytest.mark.parametrize("values", FLOODS.values(), ids=FLOODS)
@pytest.mark.parametrize("how", ["set", "keys", "set of sets"])
def test_no_hash_table_is_made_of_what_would_flood_it(values, how):
    packed = [msgpack.Packer(default=wire._default).pack(value) for value in values]
    if how == "keys":
        head = msgpack.Packer().pack_map_header(len(packed))
        raw = head + b"".join(key + b"\xc0" for key in packed)
    else:
        raw = msgpack.packb(msgpack.ExtType(7, msgpack.Packer().pack_array_header(len(packed)) + b"".join(packed)))
    if how == "set of sets":
        raw = msgpack.packb(msgpack.ExtType(7, b"\x91" + raw))
    marker = msgpack.packb("here")
    fields = with_args("here")
    fields[1] = fields[1].replace(marker, raw)
    began = time.process_time()
    with pytest.raises(DecodeError, match=r"hash|at most"):
        wire.decode(fields)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "values", [set(range(20_000)), dict.fromkeys(range(20_000)), {Decimal(HASH_0 * n) for n in range(99)}]
)
def test_the_sender_is_told_of_what_would_be_refused(values):
    with pytest.raises(EncodeError, match=r"hash|at most"):
        wire.encode("t", None, ID, [[values]], {})


@pytest.mark.parametrize(
    "value",
    [
        dict.fromkeys(map(str, range(50_000))),
        set(map(str, range(50_000))),
        dict.fromkeys(range(wire.MOST_HASHED)),
        {2.0**n for n in range(-1000, 1000)},
        {True: 1, None: 2, 1.5: 3, b"b": 4, uuid.UUID(int=5): 5, dt.date(2026, 1, 1): 6, Decimal("1E+400"): 7},
        {(n, str(n)) for n in range(1000)},
    ],
    ids=["text keys", "a set of text", "numbers as keys", "powers of two", "keys of all types", "pairs"],
)
def test_large_sets_and_maps_of_honest_values_are_taken(value):
    assert wire.decode([b"m", wire.encode("t", b"k", ID, [value], {})])[3] == [value]


@pytest.mark.parametrize("name", ["expires", "eta", "at"])
@pytest.mark.parametrize("value", ["x", b"1", [1], {}, True, math.nan, math.inf, 1e300, 2**63, -(2**60)], ids=repr)
def test_an_instant_that_is_none_is_refused_at_both_ends(name, value):
    with pytest.raises(DecodeError):
        wire.decode([b"m", msgpack.packb([*GOOD[:5], {name: value}])])
    with pytest.raises(EncodeError, match=name):
        wire.encode("t", None, ID, [], {}, {name: value})
    if not isinstance(value, bytes):
        with pytest.raises(DecodeError):
            wire.decode(json_entry(task="t", id="x", headers={name: value}))


@pytest.mark.parametrize("headers", [{1: 2}, {b"b": 1}, {"content": "application/json"}, {"content": 5}], ids=repr)
def test_other_headers_that_no_worker_understands(headers):
    with pytest.raises(DecodeError):
        wire.decode([b"m", msgpack.packb([*GOOD[:5], headers])])
    with pytest.raises(EncodeError):
        wire.encode("t", None, ID, [], {}, headers)


def test_no_headers_that_are_named_are_as_good_as_none():
    named = {"expires": None, "eta": None, "content": None, "mine": [1]}
    assert wire.decode([b"m", wire.encode("t", None, ID, [], {}, named)])[5] == named


@pytest.mark.parametrize("where", ["id", "task", "key", "args", "kwargs", "headers"])
def test_a_lone_surrogate_in_json_is_refused(where):
    values = {"task": "t", "id": "x", "key": "k", "args": ["a"], "kwargs": {"a": {"b": "c"}}, "headers": {"h": "v"}}
    assert wire.decode(json_entry(**values))
    text = json.dumps({**values, where: json.loads(json.dumps(values[where]).replace('"', '"\\ud83d', 1))})
    with pytest.raises(DecodeError):
        wire.decode([b"j", text.encode()])
    assert wire.decode(json_entry(**{**values, "task": "\U0001f600 \\ud800"}))[0] == "\U0001f600 \\ud800"


def test_what_claims_to_be_large_takes_no_memory():
    """msgpack before 1.2.4 made room for all that an array says it has: 780 MB for 200 KB."""
    claim = b"\xdd" + (200_000).to_bytes(4, "big")
    raw = b"\x96\xa1t\xc4\x01k\xc4\x10" + ID + claim * 500
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError):
            wire.decode([b"m", raw + b"\xc0" * (200_000 - len(raw))])
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert msgpack.version >= (1, 2, 4)
