"""The wire format of a message (``docs/protocol.md``, ``docs/vectors.json``).

A stream entry has one field: its name says the format, its value is the envelope.

======  =========================================================================================
``m``   msgpack array ``[task, key, id, args, kwargs, headers]``
``j``   JSON object with those names, for producers without msgpack; ``id`` and ``key`` are text
======  =========================================================================================

``key`` is the canonical shard key (bytes) or nil; ``id`` 16 raw bytes (a UUID) or text; ``headers`` a map or nil.
Another version of the format will have another field name, and what this version does not know becomes a dead letter.
Values that msgpack lacks travel as extension types, see ``_default``.

Whoever may append to a stream may append anything. So decoding gives an envelope whose elements and headers are of the right
types, or raises ``DecodeError``, in a time and memory that the message's length bounds; msgpack itself (1.2.4 and later)
allocates no more than it has read, and nests 1,024 deep at most.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import operator
import re
import threading
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import msgpack

from ..errors import ConfigError, DecodeError, EncodeError
from ..text import said

MSGPACK = b"m"
JSON = b"j"

H_EXPIRES = "expires"  # instant in ms since the epoch after which the body does not run
H_PRODUCED = "at"  # instant in ms when the produce call was made, where the entry id does not tell it
H_CONTENT = "content"  # content type of args, which then is bytes: another serializer of kombu's registry
H_ETA = "eta"  # instant in ms that was asked for

JSON_CONTENT = "application/json"
SAFE_CONTENT = frozenset((JSON_CONTENT, "application/x-msgpack"))
"""Content types that are loaded whoever has sent them."""


def only_safe(task: str) -> Collection[str]:
    """The content types that messages of a task may have: no others than these."""
    return SAFE_CONTENT


def content_types(serializers: Iterable[str]) -> set[str]:
    """Those of serializers that are registered with kombu. Raises ``ConfigError`` for another."""
    from kombu.serialization import registry

    found = set()
    for name in serializers:
        try:
            found.add(registry.name_to_type[name])
        except KeyError:
            raise ConfigError(
                f"no serializer {name!r} is registered with kombu: known are {', '.join(sorted(registry.name_to_type))}"
            ) from None
    return found


_INSTANTS = frozenset((H_EXPIRES, H_PRODUCED, H_ETA))
FIRST_MS, LAST_MS = -62_135_596_800_000, 253_402_300_799_999  # the years 1 to 9999

MOST_NESTED_SETS = 4
"""A set in a set in ...: each level is a call of msgpack inside a call of msgpack, on the C stack of a thread."""
MOST_HASHED = 10_000
"""Elements of a set, or keys of a map, that are neither text nor bytes: their hashes are known to whoever sends them."""
MOST_ALIKE = 64
"""Of these, such as have one and the same hash."""

_EXT_DATETIME, _EXT_DATE, _EXT_TIME, _EXT_UUID, _EXT_DECIMAL, _EXT_TIMEDELTA, _EXT_SET = range(1, 8)


def _default(value: object) -> msgpack.ExtType:
    """Types beyond msgpack's own: 1 datetime, 2 date, 3 time (ISO 8601 text), 4 UUID (16 bytes), 5 Decimal (text),
    6 timedelta (whole microseconds as text), 7 set (a msgpack array)."""
    if isinstance(value, dt.datetime):
        return msgpack.ExtType(_EXT_DATETIME, value.isoformat().encode())
    if isinstance(value, dt.date):
        return msgpack.ExtType(_EXT_DATE, value.isoformat().encode())
    if isinstance(value, dt.time):
        return msgpack.ExtType(_EXT_TIME, value.isoformat().encode())
    if isinstance(value, uuid.UUID):
        return msgpack.ExtType(_EXT_UUID, value.bytes)
    if isinstance(value, Decimal):
        return msgpack.ExtType(_EXT_DECIMAL, str(value).encode())
    if isinstance(value, dt.timedelta):
        micros = (value.days * 86400 + value.seconds) * 1_000_000 + value.microseconds
        return msgpack.ExtType(_EXT_TIMEDELTA, str(micros).encode())
    if isinstance(value, set | frozenset):
        return msgpack.ExtType(_EXT_SET, _pack_set(value))
    raise TypeError(f"{type(value).__name__} can't be serialised")


class _Depth(threading.local):
    sets = 0


_depth = _Depth()


def _pack_set(value: set[Any] | frozenset[Any]) -> bytes:
    _check_hashes(value)
    if _depth.sets == MOST_NESTED_SETS:
        raise DecodeError(TOO_DEEP)
    _depth.sets += 1
    try:
        return pack_body(list(value))
    finally:
        _depth.sets -= 1


TOO_DEEP = f"sets are nested more than {MOST_NESTED_SETS} deep"


def _check_hashes(values: Collection[Any]) -> None:
    """Raises ``DecodeError`` for elements or keys that a hash table may need quadratic time for. The hashes of text and bytes
    are random in each process; all others can be chosen by a sender, who sends thousands of one hash, or of one way through the
    table. So none is made of these: their hashes are counted first."""
    if len(values) <= MOST_ALIKE:
        return
    hashes = [hash(value) for value in values if type(value) is not str and type(value) is not bytes]
    if len(hashes) > MOST_HASHED:
        raise DecodeError(
            f"a set, or the keys of a map, has {len(hashes)} values that are neither text nor bytes, and at most "
            f"{MOST_HASHED} are taken: a list may be longer"
        )
    hashes.sort()
    if any(map(operator.eq, hashes, hashes[MOST_ALIKE:])):
        raise DecodeError(f"more than {MOST_ALIKE} elements of a set, or keys of a map, have the same hash")


def ext_hook(code: int, data: bytes) -> object:
    if code == _EXT_SET:
        return set(_elements(data, 1))
    if code == _EXT_DATETIME:
        return dt.datetime.fromisoformat(data.decode())
    if code == _EXT_DATE:
        return dt.date.fromisoformat(data.decode())
    if code == _EXT_TIME:
        return dt.time.fromisoformat(data.decode())
    if code == _EXT_UUID:
        return uuid.UUID(bytes=data)
    if code == _EXT_DECIMAL:
        return Decimal(data.decode())
    if code == _EXT_TIMEDELTA:
        return dt.timedelta(microseconds=int(data))
    raise DecodeError(f"extension type {code} is unknown to this version")


def _elements(data: bytes, depth: int) -> Any:
    """The elements of a set, the ``depth``-th of nested ones. They can be hashed: arrays become tuples, sets frozensets."""
    if depth > MOST_NESTED_SETS:
        raise DecodeError(TOO_DEEP)
    found = msgpack.unpackb(data, ext_hook=_HOOKS[depth], use_list=False)
    if type(found) is not tuple:
        raise DecodeError("a set is made of an array")
    _check_hashes(found)
    return found


def _hook_at(depth: int) -> Callable[[int, bytes], object]:
    def hook(code: int, data: bytes) -> object:
        return frozenset(_elements(data, depth + 1)) if code == _EXT_SET else ext_hook(code, data)

    return hook


_HOOKS = [_hook_at(depth) for depth in range(MOST_NESTED_SETS + 1)]

unpackb = msgpack.unpackb

MAY_HAVE_MOST = 3 * MOST_HASHED
"""Bytes that a map of so many keys takes at least."""
PACKER_KEEPS = 1 << 20
"""Bytes: a packer's buffer never shrinks, so one that packed more is thrown away."""

_packers: list[msgpack.Packer] = []
"""Those that nobody uses now: making one costs more than packing a message. Taking and giving back are one step each, so
threads, a packing inside a packing (a set) and signal handlers never share one."""


def pack_body(value: object) -> bytes:
    """msgpack with the extension types, no more than ``unpack_body`` takes. Raises TypeError, ValueError, OverflowError or
    ``DecodeError``."""
    try:
        packer = _packers.pop()
    except IndexError:
        packer = msgpack.Packer(default=_default)
    packed: bytes = packer.pack(value)
    if len(packed) < MAY_HAVE_MOST:
        _packers.append(packer)
        return packed
    if len(packed) < PACKER_KEEPS:
        _packers.append(packer)
    _check_keys(packed)
    return packed


def _check_keys(packed: bytes) -> None:
    """Raises ``DecodeError`` where maps have more keys than may be sent."""
    try:
        unpackb(packed, ext_hook=msgpack.ExtType)  # quick, and fine where all keys are text
    except ValueError:
        unpack_body(packed)


def unpack_body(data: bytes) -> Any:
    """The inverse of ``pack_body``. Raises what msgpack and the extension types raise, or ``DecodeError``."""
    return unpackb(data, ext_hook=ext_hook, strict_map_key=False, object_pairs_hook=_make_map)


def _make_map(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    try:
        if len(pairs) > MOST_ALIKE:
            _check_hashes([key for key, _ in pairs])
        return dict(pairs)
    except TypeError:
        # Keys that were tuples or frozensets, which msgpack answers as lists and sets.
        hashable = [(_hashable(key), value) for key, value in pairs]
    _check_hashes([key for key, _ in hashable])
    return dict(hashable)


def _hashable(key: Any) -> Any:
    if type(key) is list:
        return tuple(map(_hashable, key))
    return frozenset(key) if type(key) is set else key


def encode(
    task: str,
    key: bytes | None,
    message_id: bytes | str,
    args: object,
    kwargs: object,
    headers: dict[str, Any] | None = None,
) -> bytes:
    """A msgpack envelope. Raises ``EncodeError`` naming the task and what can't be serialised."""
    try:
        if headers is not None:
            _check_headers(headers, args)
        return pack_body((task, key, message_id, args, kwargs, headers))
    except (TypeError, ValueError, OverflowError, DecodeError) as exc:
        raise EncodeError(
            f"the arguments of task {task!r} can't be serialised: {said(exc)}. Pass plain values (numbers, text, bytes, "
            "lists, dicts, dates, UUIDs), or name another serializer"
        ) from None


def encode_as(
    serializer: str,
    task: str,
    key: bytes | None,
    message_id: bytes | str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    headers: dict[str, Any] | None,
) -> bytes:
    """As ``encode``, with arguments as a serializer of kombu's registry writes them. Raises ``EncodeError``."""
    from kombu.serialization import dumps, loads

    try:
        content_type, encoding, body = dumps((list(args), dict(kwargs)), serializer)
        raw = body.encode(encoding or "utf-8") if isinstance(body, str) else bytes(body)
        if content_type == JSON_CONTENT:
            check_json_keys((args, kwargs))
            if b"\\u" in raw:
                refuse_surrogates(loads(raw, content_type, "utf-8", accept={content_type}))
    except Exception as exc:
        raise EncodeError(f"the arguments of task {task!r} can't be serialised as {serializer}: {said(exc)}") from None
    return encode(task, key, message_id, raw, None, {**(headers or {}), H_CONTENT: content_type})


def _check_headers(headers: dict[Any, Any], args: object) -> None:
    """Raises ``DecodeError`` unless names are text, and what workers understand is of its type."""
    for name, value in headers.items():
        if name in _INSTANTS:
            if value is not None and not (type(value) in (int, float) and FIRST_MS <= value <= LAST_MS):
                raise DecodeError(f"the header {name!r} is an instant in ms since the epoch, not {ascii(value)[:60]}")
        elif type(name) is not str:
            raise DecodeError(f"the name of a header is text, not {ascii(name)[:60]}")
    content = headers.get(H_CONTENT)
    if (content is not None and type(content) is not str) or (type(content) is str) != (type(args) is bytes):
        raise DecodeError(
            f"the header {H_CONTENT!r} is the content type of arguments that are bytes, not {ascii(content)[:60]}"
        )


def check_json_keys(value: object) -> None:
    """Raises TypeError for a map's keys that JSON would make other values of: true of True, "1.5" of 1.5. (Of whole numbers it
    makes text, as everybody knows.)"""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            for key in one:
                if not isinstance(key, str | int) or isinstance(key, bool):
                    raise TypeError(f"a key of a map is {ascii(key)[:60]}, and JSON has no keys but text")
            left += one.values()
        elif isinstance(one, list | tuple):
            left += one


def whole(fields: list[bytes]) -> list[bytes]:
    """An entry's fields as they were produced: a script packs very many into one (``lua/include/narrow.lua``)."""
    if len(fields) < 2 or fields[0] != b"packed":
        return fields
    try:
        found = unpackb(fields[1], raw=True)
    except Exception:
        return fields  # a foreign producer's field of that name
    packed = isinstance(found, list) and all(isinstance(part, bytes) for part in found)
    return [*found, *fields[2:]] if packed else fields


def replayed_for(fields: list[bytes]) -> bytes | None:
    """The group whose dead letter an entry was, b"1" for one that an earlier version replayed, None for none."""
    for name, value in zip(fields[2::2], fields[3::2], strict=False):
        if name == b"replayed":
            return value
    return None


def decode(
    fields: list[bytes], envelope: Any = None, accepts: Callable[[str], Collection[str]] = only_safe
) -> list[Any]:
    """The envelope of an entry's fields: ``[task, key, id, args, kwargs, headers]``. ``envelope``: what ``unpackb`` has made of
    them already, to be looked at no second time. ``accepts``: which content types a task's messages may have.

    Raises ``DecodeError``, and nothing else, for anything that is no message of this version.
    """
    try:
        fields = whole(fields)
        if fields[0] == MSGPACK:
            return _check(unpack_body(fields[1]) if envelope is None else envelope, accepts)
        if fields[0] == JSON:
            return _decode_json(fields[1])
    except DecodeError:
        raise
    except Exception as exc:
        raise DecodeError(f"the entry can't be decoded: {said(exc)[:500]}") from exc
    raise DecodeError(f"the entry's field is {fields[0][:40]!r}: a message has the field m or j")


def _check(envelope: Any, accepts: Callable[[str], Collection[str]]) -> list[Any]:
    task, key, message_id, args, kwargs, headers = envelope
    if not (
        type(envelope) is list
        and type(task) is str
        and (type(key) is bytes or key is None)
        and type(message_id) in (bytes, str)
        and type(args) in (list, bytes)
        and (type(kwargs) is dict or kwargs is None)
        and (headers is None or type(headers) is dict)
    ):
        raise DecodeError("the envelope's elements are of wrong types")
    _check_headers(headers or {}, args)
    if type(args) is bytes:
        _decode_content(envelope, accepts(task))
    elif kwargs is None:
        envelope[4] = {}
    return envelope


def _decode_content(envelope: list[Any], accepted: Collection[str]) -> None:
    from kombu import serialization

    content_type = envelope[5][H_CONTENT]
    # What the sender names is not proof that it may be loaded: kombu refuses pickle and yaml unless accepted by name.
    body = serialization.loads(envelope[3], content_type, "utf-8", accept=accepted)
    args, kwargs = body
    if not (isinstance(args, list | tuple) and isinstance(kwargs, dict)):
        raise DecodeError("the arguments are no array and map")
    if content_type == JSON_CONTENT and b"\\u" in envelope[3]:
        refuse_surrogates(body)
    envelope[3], envelope[4] = list(args), kwargs


def _decode_json(data: bytes) -> list[Any]:
    from kombu.utils.json import loads

    body = loads(data)
    if b"\\u" in data:
        refuse_surrogates(body)
    if not isinstance(body, dict) or not isinstance(body.get("task"), str):
        raise DecodeError("a JSON envelope is an object with at least a task name")
    unknown = set(body) - {"task", "key", "id", "args", "kwargs", "headers"}
    if unknown:
        raise DecodeError(f"the JSON envelope has unknown names: {', '.join(sorted(unknown))[:200]}")
    key = body.get("key")
    message_id = body.get("id")
    if not isinstance(message_id, str):
        raise DecodeError("the JSON envelope has no id")
    args, kwargs, headers = body.get("args") or [], body.get("kwargs") or {}, body.get("headers")
    if not (isinstance(args, list) and isinstance(kwargs, dict) and (headers is None or isinstance(headers, dict))):
        raise DecodeError("args must be an array, kwargs and headers objects")
    if not (key is None or isinstance(key, str | int)) or isinstance(key, bool) or key == "":
        raise DecodeError("key must be text, a whole number or null")
    _check_headers(headers or {}, args)
    return [body["task"], None if key is None else str(key).encode(), id_bytes(message_id), args, kwargs, headers]


def refuse_surrogates(loaded: Any) -> None:
    """Raises UnicodeEncodeError where what was loaded from JSON holds a lone surrogate, which JSON can write and nothing else
    can store, send or print."""
    json.dumps(loaded, ensure_ascii=False, default=str).encode()


def id_text(message_id: bytes | str) -> str:
    """A message's id as people see it: a UUID where it is one."""
    if isinstance(message_id, bytes):
        return str(uuid.UUID(bytes=message_id)) if len(message_id) == 16 else message_id.hex()
    return message_id


def id_bytes(message_id: str) -> bytes | str:
    """The inverse of ``id_text``: 16 bytes for a UUID in its usual form, else the text."""
    try:
        parsed = uuid.UUID(message_id)
    except ValueError:
        return message_id
    return parsed.bytes if str(parsed) == message_id else message_id


def pack_id(message_id: bytes | str) -> bytes:
    """An id as the 16 bytes that id sets hold: as it is, or a 128-bit hash (BLAKE2b) of a longer one."""
    if isinstance(message_id, bytes) and len(message_id) == 16:
        return message_id
    raw = message_id.encode() if isinstance(message_id, str) else message_id
    return hashlib.blake2b(raw, digest_size=16).digest()


def id_order(entry_id: bytes) -> tuple[int, int]:
    """An entry id as numbers: text order is not the order of the stream."""
    ms, _, seq = entry_id.partition(b"-")
    return int(ms), int(seq)


_NOTE = re.compile(rb"\d{1,19}(?: \d{1,19}){0,5}")


OVERRAN = 3


@dataclass(slots=True)
class Note:
    """What is stored beside a pending entry, because it must survive its owner (``lua/note.lua``).

    ``attempt`` failed runs so far; ``due_ms`` when the next may start (Redis' clock); ``crashes`` processes that died
    while the body ran; ``mark`` the token of an owner that wrote down the start; ``charged`` the token whose death was
    counted last; ``held`` 1: dead-lettered, the lane stays closed; 2: to be dropped; 3: no lane is held, but the last run
    was ended at its ``time_limit``, and is still to be judged as a failed one.
    """

    attempt: int = 0
    due_ms: int = 0
    crashes: int = 0
    mark: int = 0
    charged: int = 0
    held: int = 0

    @property
    def overran(self) -> bool:
        return self.held == OVERRAN

    @classmethod
    def parse(cls, text: bytes) -> Note:
        """What stands there; an empty note for what no script has written."""
        if _NOTE.fullmatch(text) is None:
            return cls()
        return cls(*map(int, text.split()))

    def is_ahead_of(self, text: bytes | None) -> bool:
        """Whether it knows of attempts or crashes that Redis has lost, of which this is there."""
        there = Note.parse(text) if text else Note()
        if not text or there.held:
            return not text
        return (self.attempt, self.crashes) != (there.attempt, there.crashes) and (
            self.attempt >= there.attempt and self.crashes >= there.crashes
        )

    def format(self) -> str:
        return f"{self.attempt} {self.due_ms} {self.crashes} {self.mark} {self.charged} {self.held}"
