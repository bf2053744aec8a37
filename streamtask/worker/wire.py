"""The socket between a supervisor and a child: JSON lines both ways. Its end of file says that the other has died."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any


class Closed(Exception):
    """The other side is gone."""


class Wire:
    """One end of the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = b""

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, op: str, **fields: Any) -> None:
        """Sends a message; says nothing if the other side is gone, which its end of file will tell."""
        try:
            self._sock.sendall(json.dumps({"op": op, **fields}).encode() + b"\n")
        except OSError:
            pass

    def receive(self) -> Iterator[dict[str, Any]]:
        """The messages that have arrived; waits for the rest of one that has begun. Raises ``Closed``."""
        try:
            data = self._sock.recv(65536)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            raise Closed
        self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            yield json.loads(line)

    def close(self) -> None:
        self._sock.close()
