"""Bytes near valid messages, for all that is decoded. ``tests/unit/test_fuzz.py`` tries some, ``make fuzz`` goes on.

What a case is follows from a random generator alone, so that hypothesis can make it smaller, and a number repeats it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import sys
import time
import traceback
import zlib
from functools import cache
from typing import Any
from unittest.mock import MagicMock

import msgpack
from celery import Celery
from celery.exceptions import InvalidTaskError, TaskRevokedError
from celery.worker import state
from celery.worker.strategy import default as strategy
from kombu.exceptions import ContentDisallowed
from kombu.transport.virtual import Message
from kombu.utils.json import dumps

from streamtask.celery.receipt import fault_of
from streamtask.errors import DecodeError
from streamtask.queue.delivery import Delivery
from streamtask.redis import wire
from streamtask.redis.wire import Note
from streamtask.transport import message

ID = bytes(range(16))
NUMBERS = [0, 1, -1, 127, 128, 2**31, 2**53 + 1, 2**61 - 1, 2**63 - 1, 2**64 - 1, -(2**63)]
FLOATS = [0.0, -0.0, 1.5, 1e308, float("nan"), float("inf"), float("-inf")]
TEXTS = ["", "a", "é", "\x00", "\x1b[2J", "\u202e", "put", "x" * 300, "2026-01-01T00:00:00+00:00", "application/json"]
DATES = [
    b"2026-01-01",
    b"2026-01-01T00:00:00+23:59",
    b"0001-01-01T00:00:00+10:00",
    b"24:00",
    b"9999-12-31T23:59:59-10:00",
]
DECIMALS = [b"1E+999999999999999999", b"1E-999999999999999999", b"sNaN", b"NaN", b"-Infinity", b"9" * 500, b"0.1"]
BODIES = ["[[], {}, {}]", b"[[], {}, {}]", zlib.compress(b"x" * 100), zlib.compress(b"\x00" * 3_000_000)]
ALIKE = [msgpack.ExtType(5, str((2**61 - 1) * n).encode()) for n in range(2000)]
STATED = [
    "task",
    "id",
    "shadow",
    "eta",
    "expires",
    "timelimit",
    "stamped_headers",
    "stamps",
    "headers",
    "retries",
    "utc",
]
"""What a message of Celery's says of its task."""
HEADERS = ["expires", "eta", "at", "content", "trace", "compression", "timelimit", "expiration", "delivery_info"]


def value(chance: random.Random, depth: int = 4) -> Any:
    """Any value that msgpack can write, of the extension types too."""
    kind = chance.randrange(14 if depth else 8)
    if kind == 0:
        return None
    if kind == 1:
        return chance.random() < 0.5
    if kind == 2:
        return chance.choice(NUMBERS)
    if kind == 3:
        return chance.choice(FLOATS)
    if kind in (4, 5):
        return chance.choice(TEXTS)
    if kind == 6:
        return chance.randbytes(chance.choice([0, 1, 15, 16, 17, 40]))
    if kind == 7:
        return scalar_extension(chance)
    if kind in (8, 9):
        return [value(chance, depth - 1) for _ in range(chance.randrange(5))]
    if kind == 10:
        return Pairs([(value(chance, depth - 1), value(chance, depth - 1)) for _ in range(chance.randrange(4))])
    if kind == 11:
        return {chance.choice(TEXTS): value(chance, depth - 1) for _ in range(chance.randrange(4))}
    if kind == 12:
        inner: Any = [value(chance, depth - 1) for _ in range(chance.randrange(4))]
        for _ in range(chance.choice([1, 1, 2, 4, 5, 300])):
            inner = [msgpack.ExtType(7, pack(inner))]
        return inner[0]
    return msgpack.ExtType(7, pack(ALIKE[: chance.choice([3, 3, 3, 70, 2000])]))


def scalar_extension(chance: random.Random) -> msgpack.ExtType:
    code = chance.choice([*range(9), 100, 127])
    kind = chance.randrange(4)
    if kind == 0:
        return msgpack.ExtType(code, chance.randbytes(chance.choice([0, 4, 8, 12, 16])))
    if kind == 1:
        return msgpack.ExtType(code, chance.choice(DATES))
    if kind == 2:
        return msgpack.ExtType(code, chance.choice(DECIMALS))
    return msgpack.ExtType(code, str(chance.choice([*NUMBERS, "9" * 5000])).encode())


class Pairs(list[tuple[Any, Any]]):
    """A map whose keys may be of any type, and the same."""


def pack(one: Any) -> bytes:
    """As ``msgpack.packb``, of values that hold ``Pairs``."""
    if isinstance(one, Pairs):
        head = msgpack.Packer().pack_map_header(len(one))
        return head + b"".join(pack(key) + pack(inner) for key, inner in one)
    if isinstance(one, list):
        return msgpack.Packer().pack_array_header(len(one)) + b"".join(map(pack, one))
    if isinstance(one, dict):
        return pack(Pairs(one.items()))
    return msgpack.packb(one)


def headers(chance: random.Random) -> Any:
    if chance.random() < 0.4:
        return None
    return {chance.choice(HEADERS): value(chance, 2) for _ in range(chance.randrange(1, 3))}


def envelope(chance: random.Random, task: str) -> list[Any]:
    key = b"k0" if task == "put" else None
    kwargs = {"n": chance.randrange(100), **({"k": "k0"} if key else {})}
    parts = [task, key, chance.choice([ID, b"short", "text", chance.randbytes(16)]), [], kwargs, headers(chance)]
    if chance.random() < 0.5:
        parts[chance.randrange(6)] = value(chance)
    if chance.random() < 0.05:
        parts.insert(chance.randrange(6), value(chance))
    return parts


def spoil(chance: random.Random, data: bytes) -> bytes:
    """Changes, cuts out or puts in some bytes."""
    if chance.random() < 0.4:
        return data
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 5])):
        at = chance.randrange(len(changed) + 1)
        kind = chance.randrange(3)
        if kind == 0:
            changed[at : at + 1] = bytes(
                [chance.choice([0xC1, 0xC7, 0xC9, 0xDD, 0xDF, 0x91, 0x81, chance.randrange(256)])]
            )
        elif kind == 1:
            del changed[at : at + chance.choice([1, 4, 1000])]
        else:
            changed[at:at] = chance.randbytes(chance.choice([1, 4])) * chance.choice([1, 1, 300])
    return bytes(changed)


def json_envelope(chance: random.Random, task: str) -> bytes:
    names = ["task", "key", "id", "args", "kwargs", "headers"]
    body = dict(zip(names, [task, "k0" if task == "put" else None, "id", [], {"n": 1, "k": "k0"}, None], strict=True))
    odd = [None, 1, 1.5, True, "", "\ud800", [], {}, [[]], {"__type__": "datetime", "__value__": 5}, 10**400, "x" * 99]
    for _ in range(chance.randrange(3)):
        body[chance.choice([*names, "other", "\udfff"])] = chance.choice(odd)
    text = json.dumps(body)
    if chance.random() < 0.1:
        text = text.replace("[]", "[" * 3000 + "]" * 3000)
    return text.encode()


def kombu_parts(chance: random.Random) -> list[Any]:
    """What the transport stores of a message of kombu's."""
    said = {chance.choice(HEADERS): value(chance, 2) for _ in range(chance.randrange(3))}
    if chance.random() < 0.5:
        said["compression"] = chance.choice(
            ["gzip", "zlib", "bz2", "bzip2", "lzma", "application/x-gzip", "nonsense", 5]
        )
    body = chance.choice(BODIES)
    properties = {chance.choice([*HEADERS, "body_encoding", "delivery_tag"]): value(chance, 2) for _ in range(2)}
    if chance.random() < 0.2:
        properties["body_encoding"] = "base64"
    parts = [body, "application/json", "utf-8", said, properties]
    if chance.random() < 0.3:
        parts[chance.randrange(5)] = value(chance, 2)
    if chance.random() < 0.2:
        plain = [str(part) if isinstance(part, bytes) else part for part in parts]
        try:
            return [dumps(plain)]
        except Exception:
            return [chance.choice(['{"a": "\\ud800"}', "[", "[" * 50_000, "5"])]
    return parts


def celery_parts(chance: random.Random) -> list[Any]:
    """As ``kombu_parts``, of a call of a task."""
    said: dict[str, Any] = {"task": "late", "id": "x"}
    for _ in range(chance.randrange(3)):
        said[chance.choice(STATED)] = value(chance, 2)
    body: Any = [[], {"n": 0}, {}]
    if chance.random() < 0.4:
        body[chance.randrange(3)] = value(chance, 2)
    kind = chance.randrange(6)
    if kind == 0:  # Celery's first protocol
        body, said = {"args": body[0], "kwargs": body[1], **said}, {}
    elif kind == 1:
        body = {"args": body[0], "kwargs": body[1], chance.choice([*STATED, "taskset"]): value(chance, 2)}
    elif kind == 2:
        body = value(chance, 2)
    elif kind == 3:
        said.pop(chance.choice(["task", "id"]), None)
    try:
        text: Any = dumps(body)
    except Exception:
        text = chance.choice(["[", "5", b"\xff"])
    return [text, "application/json", "utf-8", said, {}]


@cache
def celerys_own() -> Any:
    """What a worker does with a message of a task, up to the call of its pool."""
    app = Celery("fuzzed", broker="memory://", set_as_current=False)

    @app.task(name="late", shared=False)
    def late(n: int) -> None: ...

    consumer = MagicMock()
    consumer.controller.state.revoked = set()
    consumer.event_dispatcher = None
    consumer.app = app
    consumer.on_task_request = lambda request: request.execute_using_pool(MagicMock())
    return strategy(app.tasks["late"], app, consumer)


def receive(payload: dict[str, Any]) -> None:
    """A worker receives a message that has passed the checks of the transport."""
    received = Message(payload, channel=MagicMock(decode_body=message.decode_body))
    received.accept = {"application/json"}
    fault = fault_of(received)
    if fault is not None:
        fault.encode()
        return
    name = received.headers.get("task")
    body = None
    if name is None:
        body = received.payload
        if not isinstance(body, dict) or "task" not in body:
            return
        name = body["task"]
    if name == "late":
        try:
            celerys_own()(received, body, MagicMock(), MagicMock(), ())
        except (InvalidTaskError, ContentDisallowed, TaskRevokedError):
            state.revoked.clear()  # Celery's consumer expects these, and says no to the message


def near_envelope(chance: random.Random, task: str = "put") -> list[bytes]:
    """The fields of an entry: at least one."""
    if chance.random() < 0.3:
        fields = [b"j", spoil(chance, json_envelope(chance, task))]
    else:
        fields = [b"m", spoil(chance, pack(envelope(chance, task)))]
    kind = chance.randrange(12)
    if kind == 0:
        fields = [b"packed", spoil(chance, msgpack.packb(fields))]
    elif kind == 1:
        fields += [b"replayed", chance.choice([b"1", b"workers", b"another", b""])]
    elif kind == 2:
        fields[0] = chance.choice([b"", b"M", b"m2", b"j", b"m", b"packed"])
    elif kind == 3:
        fields = [chance.randbytes(3), b"", *fields]
    return fields


def check_case(chance: random.Random) -> None:
    """Decodes one case, of whichever kind. Raises AssertionError, or whatever a decoder must not raise."""
    began = time.process_time()
    kind = chance.randrange(4)
    if kind == 0:
        Note.parse(spoil(chance, chance.choice([b"0 0 0 0 0 0", b"3 1795000000000 2 17950000000000 5 1", b"1 2 3"])))
    elif kind == 1:
        parts = celery_parts(chance) if chance.random() < 0.5 else kombu_parts(chance)
        try:
            fields = [b"m", spoil(chance, pack(["t", None, ID, parts, {}, None]))]
            delivery = Delivery(b"5-1", wire.decode(fields))
            message.check(delivery.args)
        except Exception:
            return  # a dead letter, whatever it is
        payload = message.decode(delivery)
        message.expired(payload, b"5-1", 6)
        message.due_ms(payload["headers"], 1.0)
        payload["properties"]["delivery_tag"] = "tag"
        receive(payload)
    else:
        try:
            task, key, message_id, args, kwargs, said = wire.decode(near_envelope(chance))
        except DecodeError as exc:
            str(exc).encode()
        else:
            assert type(task) is str
            assert key is None or type(key) is bytes
            assert type(args) is list
            assert type(kwargs) is dict
            assert all(type(name) is str for name in said or ())
            (task + wire.id_text(message_id)).encode()
            wire.pack_id(message_id)
    assert time.process_time() - began < 5, "it took too long"


CASES = 2000  # of one process


def _run(number: int) -> None:
    for n in range(number * CASES, (number + 1) * CASES):
        try:
            check_case(random.Random(n))
        except BaseException:
            traceback.print_exc()
            sys.exit(f"case {n}: python -m tests.fuzz --case {n}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if peak > 500_000:
        sys.exit(f"cases from {number * CASES}: {peak // 1000} MB")


def main() -> int:
    parser = argparse.ArgumentParser(description="Decodes bytes near valid messages, and sees that nothing breaks.")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--case", type=int, help="this one alone")
    options = parser.parse_args()
    if options.case is not None:
        check_case(random.Random(options.case))
        return 0
    first = random.SystemRandom().randrange(10**9)
    until = time.monotonic() + options.seconds
    number = first
    while time.monotonic() < until:
        # Each some thousand in a process of their own: its death is a finding as well.
        process = multiprocessing.get_context("fork").Process(target=_run, args=(number,))
        process.start()
        process.join(300)
        if process.exitcode != 0:
            process.kill()
            print(f"cases {number * CASES} to {(number + 1) * CASES}: status {process.exitcode}", file=sys.stderr)
            return 1
        number += 1
    print(f"{(number - first) * CASES} cases, nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
