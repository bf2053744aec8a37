"""A kombu message as an envelope of ours, and back.

The envelope's ``args`` hold what kombu made of the message: ``[body, content type, content encoding, headers, properties]``,
or one text, that list as JSON of kombu's, where a value is none that msgpack knows. So a dead letter shows the task's name,
its key and id like any other.
"""

from __future__ import annotations

import datetime as dt
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from kombu import compression as of_kombu
from kombu.transport.virtual import Channel
from kombu.utils.json import dumps, loads

from ..clock import wall_ms
from ..errors import DecodeError, EncodeError
from ..queue.delivery import Delivery
from ..queue.producer import new_id
from ..redis import wire
from ..redis.wire import id_order
from ..sharding import canonical
from ..text import said

KEY = "shard_key"
ORDERED = "shard_ordered"
DELIVERY = "streamtask_delivery"
REPLACES = "streamtask_replaces"
PRIVATE = (KEY, ORDERED, DELIVERY, REPLACES)
"""The headers that only this room and its plugins write: the key, whether it keeps an order; what the transport knows of a
delivery, and in a retry the same of the message that it repeats."""
PRODUCE_ID = "streamtask_produce_id"
"""In the properties, which are one dict for all attempts of a publish; never stored. ``PAGE NUMBER``, and a third word where
an earlier attempt may have stored the message: since when (our monotonic clock), or ``inf`` for an id of the caller's own."""
HEARD = "heard-"
"""How the delivery tags of a fanout exchange's messages begin: these lie in no stream, and are nobody else's."""
SENT = "streamtask_sent"
"""In a message as kombu hands it around, of which each attempt makes one: those three, once something was sent."""


def key_of(headers: dict[str, Any]) -> bytes | None:
    """The canonical shard key of a message, None where it has none. Raises ``ShardKeyError``."""
    key = headers.get(KEY)
    return None if key is None else canonical(key)


def encode(message: dict[str, Any], key: bytes | None) -> bytes:
    """The envelope of a prepared message of kombu's. Raises ``EncodeError``."""
    headers = message["headers"]
    properties = {
        name: value for name, value in message["properties"].items() if name not in (PRODUCE_ID, "delivery_tag")
    }
    if REPLACES in headers:
        headers = {name: value for name, value in headers.items() if name != REPLACES}
    task = headers.get("task")
    name = task if isinstance(task, str) and task else "kombu.message"
    parts: list[Any] = [
        message["body"], message.get("content-type"), message.get("content-encoding"), headers, properties,
    ]  # fmt: skip
    try:
        return wire.encode(name, key, new_id(), parts, {})
    except EncodeError as exc:
        return wire.encode(name, key, new_id(), [_as_json(parts, exc)], {})


def _as_json(parts: list[Any], refused: EncodeError) -> str:
    """Whatever kombu's own JSON takes (lazy texts, models with __json__, any integer) travels as that, but for what could not
    be stored or shown after it was read. Raises ``refused``."""
    body = parts[0]
    if isinstance(body, bytes):
        properties = {**parts[4], "body_encoding": "base64"}  # kombu's own way to write bytes
        parts = [Channel.codecs["base64"].encode(body), *parts[1:4], properties]
    try:
        text: str = dumps(parts)
        if "\\u" in text:
            wire.refuse_surrogates(loads(text))
    except Exception:
        raise refused from None
    return text


MOST_DECOMPRESSED = 64 << 20
"""Bytes of a body that was compressed: a message of some kilobytes may stand for gigabytes."""
_PIECE = 1 << 20


def check(args: Any) -> None:
    """Raises ``DecodeError``, or what kombu's JSON raises, for what is no message of kombu's: whatever it would raise on, when
    it has been given the message and nobody can refuse it any more."""
    parts = args
    if isinstance(args, list) and len(args) == 1 and isinstance(args[0], str):
        parts = loads(args[0])
        if "\\u" in args[0]:
            wire.refuse_surrogates(parts)
    if not (isinstance(parts, list) and len(parts) == 5 and isinstance(parts[3], dict) and isinstance(parts[4], dict)):
        raise DecodeError("it is no message of kombu's: body, content type, content encoding, headers and properties")
    body, content_type, content_encoding, headers, properties = parts
    if not (body is None or isinstance(body, str | bytes)):
        raise DecodeError(f"its body is neither text nor bytes, but {_shown(body)}")
    for name, value in (("content type", content_type), ("content encoding", content_encoding)):
        if not (value is None or isinstance(value, str)):
            raise DecodeError(f"its {name} is no text, but {_shown(value)}")
    if not isinstance(properties.get("delivery_info") or {}, dict):
        raise DecodeError("the delivery_info in its properties is no dict")
    encoding, compression = properties.get("body_encoding"), headers.get("compression")
    if body and encoding:
        try:
            body = decode_body(body, encoding)
        except ValueError as exc:
            raise DecodeError(f"its body is no {encoding}: {said(exc)}") from None
    if compression:
        if not (isinstance(compression, str) and _is_known(compression)):
            raise DecodeError(f"its body is compressed by what is not known here: {_shown(compression)}")
        check_compressed(body.encode() if isinstance(body, str) else body or b"", compression)


def decode_body(body: Any, encoding: Any) -> Any:
    """A body without kombu's encoding of it. Raises ``DecodeError`` for an unknown one, ValueError where it isn't of it."""
    if not encoding or (isinstance(encoding, str) and encoding.lower() == "utf-8"):
        return body
    codec = Channel.codecs.get(encoding) if isinstance(encoding, str) else None
    if codec is None:
        raise DecodeError(f"its body_encoding is not known: {_shown(encoding)}")
    return codec.decode(body)


def _is_known(name: str) -> bool:
    try:
        of_kombu.get_decoder(name)
    except KeyError:
        return False
    return True


def _shown(value: Any) -> str:
    return ascii(value)[:60]


def check_compressed(body: bytes, compression: Any) -> None:
    """Raises ``DecodeError`` for a body that would have more than ``MOST_DECOMPRESSED`` bytes. It is decompressed here, piece
    by piece, and later by kombu. Methods that are none of kombu's own are their owner's to bound."""
    pieces = _PIECES.get(compression) if isinstance(compression, str) else None
    size = 0
    try:
        for piece in pieces(body) if pieces else ():
            size += piece
            if size > MOST_DECOMPRESSED:
                raise DecodeError(f"its body is more than {MOST_DECOMPRESSED} bytes when it is decompressed")
    except DecodeError:
        raise
    except Exception as exc:
        raise DecodeError(f"its body can't be decompressed: {said(exc)}") from None


Pieces = Callable[[bytes], Iterable[int]]
"""The sizes of the pieces of a decompressed body."""


def _by_steps(opener: Callable[[], Any], body: bytes) -> Iterator[int]:
    decompressor, data = opener(), body
    while not decompressor.eof:
        piece = decompressor.decompress(data, _PIECE)
        data = getattr(decompressor, "unconsumed_tail", b"")  # zlib's alone doesn't keep it
        yield len(piece)
        if not piece and not data:
            break
    if not decompressor.eof or decompressor.unused_data:
        raise DecodeError("its compressed body is cut off, or more than one")


def _by_steps_of_brotli(opener: Callable[[], Any], body: bytes) -> Iterator[int]:
    decompressor = opener()
    try:
        decompressor.process(b"", output_buffer_limit=_PIECE)
    except TypeError:
        # Before 1.2 it gives what its input makes, and a few bytes make no more than some MB.
        for i in range(0, len(body), 8):
            yield len(decompressor.process(body[i : i + 8]))
    else:
        yield len(decompressor.process(body, output_buffer_limit=_PIECE))
        while not decompressor.is_finished():
            piece = decompressor.process(b"", output_buffer_limit=_PIECE)
            yield len(piece)
            if not piece and decompressor.can_accept_more_data():
                break
    if not decompressor.is_finished():
        raise DecodeError("its compressed body is cut off")


def _as_stated(size_of: Callable[[bytes], int], body: bytes) -> tuple[int]:
    """Of a decompressor that gives no more than the body's head says, and nothing where that says nothing."""
    return (max(0, size_of(body)),)


def _pieces() -> dict[str, Pieces]:
    """By the names that kombu has for them. Which libraries it takes depends on its version."""
    methods: dict[tuple[str, ...], Pieces] = {
        ("application/x-gzip", "gzip", "zlib"): partial(_by_steps, zlib.decompressobj)
    }
    library = getattr(of_kombu, "bz2", None)
    if library is not None:
        methods["application/x-bz2", "bzip2", "bzip"] = partial(_by_steps, library.BZ2Decompressor)
    library = getattr(of_kombu, "lzma", None)
    if library is not None:
        opener = partial(library.LZMADecompressor, memlimit=2 * MOST_DECOMPRESSED)
        methods["application/x-lzma", "lzma", "xz"] = partial(_by_steps, opener)
    library = getattr(of_kombu, "brotli", None)
    if library is not None:
        methods["application/x-brotli", "brotli"] = partial(_by_steps_of_brotli, library.Decompressor)
    library = getattr(of_kombu, "zstd", None)
    if library is not None:
        sized = getattr(library, "frame_content_size", None)  # the package zstandard, before kombu 5.6
        found: Pieces = partial(_as_stated, sized) if sized else partial(_by_steps, library.ZstdDecompressor)
        methods["application/zstd", "zstd", "zstandard"] = found
    return {name: pieces for names, pieces in methods.items() for name in names}


_PIECES = _pieces()


def decode(delivery: Delivery) -> dict[str, Any]:
    """A message as kombu's virtual transports hand it around."""
    args = delivery.args
    if len(args) == 1:
        args = loads(args[0])
    body, content_type, content_encoding, headers, properties = args
    headers.pop(DELIVERY, None)  # who fetches it writes that
    return {
        "body": body,
        "content-type": content_type,
        "content-encoding": content_encoding,
        "headers": headers,
        "properties": properties,
    }


def address(payload: dict[str, Any], tag: str, *, again: bool) -> None:
    """Writes into a message what is true of this delivery alone. ``again``: it was, or may have been, delivered before."""
    properties = payload["properties"]
    properties["delivery_tag"] = tag
    info = properties["delivery_info"] = properties.get("delivery_info") or {}
    if again:
        payload["headers"]["redelivered"] = info["redelivered"] = True


def expired(payload: dict[str, Any], entry_id: bytes, now_ms: int) -> bool:
    """Whether a message's time to live is over. One that says ``expires`` itself, as a Celery task does, is for its worker
    to judge, which stores that it was revoked."""
    expiration = payload["properties"].get("expiration")
    if not expiration or payload["headers"].get("expires"):
        return False
    try:
        return id_order(entry_id)[0] + float(expiration) <= now_ms
    except (TypeError, ValueError, OverflowError):
        return False


def due_ms(headers: dict[str, Any], hold_s: float) -> int | None:
    """When a message is due (ms since the epoch), if its ``eta`` lies further ahead than ``hold_s`` seconds."""
    eta = headers.get("eta")
    if not eta:
        return None
    try:
        when = eta if isinstance(eta, dt.datetime) else dt.datetime.fromisoformat(str(eta).replace("Z", "+00:00"))
        if when.tzinfo is None:
            when = when.replace(tzinfo=dt.timezone.utc)
        due = int(when.timestamp() * 1000)
    except (ValueError, OverflowError):
        return None  # whoever consumes it says what is wrong with it
    return due if due > wall_ms() + hold_s * 1000 else None
