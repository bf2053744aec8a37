"""The socket between a process and the one that keeps its leases: JSON lines both ways. Its end of file says that the other
has died."""

from __future__ import annotations

import json
import selectors
import socket
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any


class Closed(Exception):
    """The other side is gone."""


class Wire:
    """The end of the process whose leases are kept: the other one always reads."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = b""

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, op: str, **fields: Any) -> None:
        """Sends a message; says nothing if the other side is gone, which its end of file will tell."""
        try:
            self._sock.sendall(_line(op, fields))
        except OSError:
            pass

    def receive(self) -> Iterator[dict[str, Any]]:
        """The messages that have arrived as a whole. Raises ``Closed``."""
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


class PatientWire(Wire):
    """The end of the process that keeps leases: the other one may read nothing for hours, and nothing here waits for it.

    Call ``flush`` when the selector, where it is registered with ``data``, says that it is writable. What waits is bounded
    by what there is to own: a "resume" takes back a "release" that was not read yet, and what ``send_late`` was given waits
    once.
    """

    def __init__(self, sock: socket.socket, selector: selectors.BaseSelector, data: Any) -> None:
        super().__init__(sock)
        sock.setblocking(False)
        self._selector = selector
        self._data = data
        self._unsent: deque[tuple[str, Hashable, bytes | Callable[[], Mapping[str, Any]]]] = deque()
        selector.register(self, selectors.EVENT_READ, data)

    def send(self, op: str, **fields: Any) -> None:
        number = fields.get("number")
        if op == "resume" and ("release", number) in ((one[0], one[1]) for one in self._unsent):
            self._unsent = deque(one for one in self._unsent if one[:2] != ("release", number))
        else:
            self._unsent.append((op, number, _line(op, fields)))
        self.flush()

    def send_late(self, op: str, about: Hashable, fields: Callable[[], Mapping[str, Any]]) -> None:
        """Sends what ``fields`` answers when it is this message's turn."""
        if (op, about) not in ((one[0], one[1]) for one in self._unsent):
            self._unsent.append((op, about, fields))
        self.flush()

    def flush(self) -> None:
        """Sends what the socket takes."""
        try:
            while self._unsent:
                op, about, data = self._unsent.popleft()
                line = data if isinstance(data, bytes) else _line(op, data())
                try:
                    sent = self._sock.send(line)
                except BlockingIOError:
                    sent = 0
                if sent == 0 and line is data:
                    self._unsent.appendleft((op, about, data))
                elif sent < len(line):
                    self._unsent.appendleft(("", None, line[sent:]))  # to be neither taken back nor changed
                if sent == 0:
                    break
        except OSError:
            self._unsent.clear()  # its end of file will tell
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)
        if self.fileno() >= 0 and self._selector.get_key(self).events != events:
            self._selector.modify(self, events, self._data)

    def close(self) -> None:
        if self.fileno() >= 0:
            self._selector.unregister(self)
        self._unsent.clear()
        super().close()


def _line(op: str, fields: Mapping[str, Any]) -> bytes:
    return json.dumps({"op": op, **fields}).encode() + b"\n"
