"""The canonical bytes of a shard key and the shard that they lead to: a part of the wire contract."""

from __future__ import annotations

import enum
import sys
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtask.errors import SendError, ShardKeyError, StreamTaskError
from streamtask.sharding import canonical, shard_of

UUID_TEXT = "0190163d-8694-739b-aea5-966c26f8ad91"


class Tier(enum.IntEnum):
    GOLD = 7


class Region(str, enum.Enum):
    EU = "eu-west"


class Name(str):
    """A str whose own text differs from its value."""

    __slots__ = ()

    def __str__(self) -> str:
        return "not the value"


class Number(int):
    def __str__(self) -> str:
        return "not the value"

    __repr__ = __str__


# --- the canonical bytes ---


@pytest.mark.parametrize(
    "key,expected",
    [
        ("a", b"a"),
        (" 42 ", b" 42 "),
        ("grüße", b"gr\xc3\xbc\xc3\x9fe"),
        ("e\u0301", b"e\xcc\x81"),
        ("\U0001f600", b"\xf0\x9f\x98\x80"),
        ("\x00", b"\x00"),
        (0, b"0"),
        (42, b"42"),
        (-1, b"-1"),
        (2**63, b"9223372036854775808"),
        (10**40, b"1" + b"0" * 40),
        (uuid.UUID(UUID_TEXT), UUID_TEXT.encode()),
        (uuid.UUID(UUID_TEXT.upper()), UUID_TEXT.encode()),
        (uuid.UUID(int=0), b"00000000-0000-0000-0000-000000000000"),
        (b"\x00\xff", b"\x00\xff"),
        (bytearray(b"raw"), b"raw"),
        (memoryview(b"raw"), b"raw"),
    ],
)
def test_canonical_bytes(key, expected):
    result = canonical(key)

    assert result == expected
    assert type(result) is bytes


@pytest.mark.parametrize(
    "key,expected",
    [(Tier.GOLD, b"7"), (Region.EU, b"eu-west"), (Name("value"), b"value"), (Number(5), b"5")],
    ids=["IntEnum", "str-Enum", "str-subclass", "int-subclass"],
)
def test_subclasses_count_by_value(key, expected):
    assert canonical(key) == expected


@pytest.mark.skipif(sys.version_info < (3, 11), reason="enum.StrEnum is new in 3.11")
def test_str_enum_counts_by_value():
    color = enum.StrEnum("Color", {"RED": "r"})

    assert canonical(color.RED) == b"r"


@pytest.mark.parametrize(
    "one,other",
    [(42, "42"), (-7, "-7"), (uuid.UUID(UUID_TEXT), UUID_TEXT), ("é", "é".encode()), (42, b"42"), (Tier.GOLD, "7")],
)
def test_keys_with_equal_bytes_are_one_key(one, other):
    assert canonical(one) == canonical(other)


@pytest.mark.parametrize("one,other", [("42", "042"), ("a", "A"), ("é", "e\u0301"), (UUID_TEXT, UUID_TEXT.upper())])
def test_nothing_is_normalised(one, other):
    assert canonical(one) != canonical(other)


@given(st.integers())
def test_an_int_and_its_decimal_text_are_one_key(number):
    assert canonical(number) == canonical(str(number)) == str(number).encode("ascii")


@given(st.uuids())
def test_a_uuid_is_its_lower_case_hyphenated_text(key):
    assert canonical(key) == canonical(str(key)) == str(key).lower().encode("ascii")


@given(st.text(min_size=1, alphabet=st.characters(exclude_categories=["Cs"])))
def test_text_is_its_utf8(text):
    assert canonical(text) == canonical(text.encode()) == text.encode()


# --- what is refused ---


@pytest.mark.parametrize("key", [None, True, False, 1.0, float("nan"), (), ("a",), ["a"], {"a": 1}, object(), 1j])
def test_other_types_are_refused(key):
    with pytest.raises(ShardKeyError, match="must be a str, int, UUID or bytes"):
        canonical(key)


@pytest.mark.parametrize("key", ["", b"", bytearray(), memoryview(b""), Name("")])
def test_an_empty_key_is_refused(key):
    with pytest.raises(ShardKeyError, match="empty"):
        canonical(key)


@pytest.mark.parametrize("key", ["\ud800", "a\udfff", "\ud83d\ude00", Name("\udc80")])
def test_lone_surrogates_are_refused(key):
    with pytest.raises(ShardKeyError, match="not valid Unicode"):
        canonical(key)


def test_the_error_is_one_of_ours_and_a_value_error():
    assert issubclass(ShardKeyError, SendError)
    assert issubclass(ShardKeyError, StreamTaskError)
    assert issubclass(ShardKeyError, ValueError)


# --- the shard ---

# CRC-32 as in zlib, PNG and PKZIP; the first is the check value that catalogues of CRCs give.
CRC_VECTORS = [
    (b"123456789", 0xCBF43926),
    (b"a", 0xE8B7BE43),
    (b"abc", 0x352441C2),
    (b"42", 0x3224B088),
    (b"The quick brown fox jumps over the lazy dog", 0x414FA339),
    (UUID_TEXT.encode(), 0xFA73FFB9),
    (b"\x00\xff", 0x6CDBFD72),
]


@pytest.mark.parametrize("raw,crc", CRC_VECTORS)
@pytest.mark.parametrize("shards", [1, 2, 3, 8, 13, 256, 1000])
def test_shard_is_the_crc32_modulo_the_number_of_shards(raw, crc, shards):
    assert shard_of(raw, shards) == crc % shards


@pytest.mark.parametrize(
    "key,shards,shard",
    [(42, 8, 0), ("42", 8, 0), ("a", 8, 3), ("abc", 8, 2), ("123456789", 8, 6), ("123456789", 3, 2), ("abc", 1, 0)],
)
def test_shard_of_a_key(key, shards, shard):
    assert shard_of(canonical(key), shards) == shard


@given(st.binary(min_size=1), st.integers(min_value=1, max_value=4096))
def test_a_shard_is_always_in_range_and_never_changes(raw, shards):
    shard = shard_of(raw, shards)

    assert 0 <= shard < shards
    assert shard_of(bytes(raw), shards) == shard


def test_consecutive_ids_spread_over_all_shards():
    counts = [0] * 8
    for user_id in range(10_000):
        counts[shard_of(canonical(user_id), 8)] += 1

    assert min(counts) > 1000
    assert max(counts) < 1500
