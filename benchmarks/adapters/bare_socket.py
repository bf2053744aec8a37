"""The yardstick of what Redis and Python allow: prepared commands over a plain socket, parsed by hiredis.

Options: ``calls`` is a file of prepared commands to send instead of XADDs: those of streamtask's ``delay``.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import bare
import hiredis
import msgpack
from common import BODIES, OPTIONS, URL, Adapter, Calls, main

FETCH = 200


class Connection:
    """Sends bytes, and reads one reply at a time."""

    def __init__(self) -> None:
        self._socket = socket.create_connection(("127.0.0.1", urlsplit(URL).port or 6379))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = hiredis.Reader()
        self.send = self._socket.sendall

    def read(self) -> Any:
        reader = self._reader
        while (reply := reader.gets()) is False:
            data = self._socket.recv(1 << 16)
            if not data:
                raise ConnectionError("Redis closed the connection")
            reader.feed(data)
        if isinstance(reply, Exception):
            raise reply
        return reply


def prepare(task: str, calls: Calls) -> Calls:
    if path := OPTIONS.get("calls"):
        return saved_calls(path, len(calls))
    pack = hiredis.pack_command
    return [(pack(("XADD", bare.STREAM, "*", "m", bare.envelope(task, args))),) for args in calls]


_taken = 0


def saved_calls(path: str, n: int) -> Calls:
    """The next N of the file. Each is used once: its id would be known the second time."""
    global _taken
    found: list[tuple[bytes]] = []
    with open(path, "rb") as file:
        while size := file.read(4):
            found.append((file.read(int.from_bytes(size, "big")),))
    first, _taken = _taken, _taken + n
    if _taken > len(found):
        raise ValueError(f"{_taken} calls are wanted of a file with {len(found)}")
    return found[first:_taken]


def sender(task: str) -> Callable[..., object]:
    connection = Connection()
    send, read = connection.send, connection.read

    def send_one(packed: bytes) -> None:
        send(packed)
        read()

    return send_one


def bulk_sender(task: str) -> Callable[[Calls], object]:
    connection = Connection()

    def send(calls: Calls) -> None:
        for start in range(0, len(calls), bare.PIPELINE):
            batch = calls[start : start + bare.PIPELINE]
            connection.send(b"".join([packed for (packed,) in batch]))
            for _ in batch:
                connection.read()

    return send


def consume() -> None:
    """Sends the next fetch together with the last acknowledgement, before it runs what it has."""
    bare.open_group()
    connection = Connection()
    send, read, pack = connection.send, connection.read, hiredis.pack_command
    unpack, tasks = msgpack.unpackb, BODIES
    group = ("GROUP", bare.GROUP, str(os.getpid()))
    fetch = pack(("XREADGROUP", *group, "COUNT", FETCH, "BLOCK", 1000, "STREAMS", bare.STREAM, ">"))
    send(fetch)
    done: list[bytes] = []
    while True:
        reply = read()
        entries = reply[0][1] if reply else []
        if done:
            send(pack(("XACK", bare.STREAM, bare.GROUP, *done)) + fetch)
        else:
            send(fetch)
        acknowledged = bool(done)
        done = []
        for entry_id, (_, body) in entries:
            task, _, _, args, kwargs, _ = unpack(body)
            tasks[task](*args, **kwargs)
            done.append(entry_id)
        if acknowledged:
            read()


if __name__ == "__main__":
    main(
        Adapter(
            packages=("hiredis", "msgpack"),
            settings={
                "producer": "prepared commands (hiredis.pack_command), one sendall and one reply each",
                "worker": "XREADGROUP COUNT 200; the next one is sent with the XACK of the last, before the bodies run",
            },
            consume=consume,
            sender=sender,
            bulk_sender=bulk_sender,
            prepare=prepare,
        )
    )
