"""Listens between a client and Redis, and tells which commands the client has sent."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import hiredis


@contextlib.contextmanager
def recording(port: int) -> Iterator[tuple[int, list[list[bytes]]]]:
    """Passes on what comes to a new port; the second value has all commands when the block has ended."""
    heard: list[bytes] = []
    commands: list[list[bytes]] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def copy(source: socket.socket, target: socket.socket, keep: bool) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    if keep:
                        heard.append(data)
                    target.sendall(data)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    near, _ = server.accept()
                    far = socket.create_connection(("127.0.0.1", port))
                    for ends in ((near, far, True), (far, near, False)):
                        threading.Thread(target=copy, args=ends, daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1], commands
    # A command of a client is in form a reply: an array of texts.
    reader = hiredis.Reader()
    reader.feed(b"".join(heard))
    while (command := reader.gets()) is not False:
        commands.append(command)
