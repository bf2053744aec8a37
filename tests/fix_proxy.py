"""A TCP proxy between a client and Redis, which loses replies, connections and whole networks when told to.

Fixture ``proxy``: ``proxy(port_or_server)`` makes one; all are closed at the end of the test.
"""

from __future__ import annotations

import contextlib
import queue
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

import pytest

from tests.fix_redis import RedisServer

T = TypeVar("T")


class _Side:
    """One of a connection's two sockets, with what waits to be written to it."""

    def __init__(self, sock: socket.socket, link: _Link) -> None:
        self.sock = sock
        self.link = link
        self.out: deque[tuple[float, bytes]] = deque()
        self.eof = False  # the other side has ended: close when all is written
        self.tail = b""  # the end of what came before, so that a match may span two chunks


class _Link:
    """One client's connection and ours to the server."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = _Side(client, self)
        self.server = _Side(server, self)
        self.lose_reply = False  # the next bytes from the server close the connection instead
        self.client_gone = False  # lost-reply close: the server may still read and answer
        self.swallowed = False
        self.closed = False


class _Rule:
    def __init__(self, match: bytes, times: int, after: bool) -> None:
        self.match, self.left, self.after = match, times, after


class Proxy:
    """One thread serves all connections; the methods may be called from any thread and have acted on return."""

    def __init__(self, target_port: int, target_host: str = "127.0.0.1") -> None:
        self._target = (target_host, target_port)
        self.connections = 0
        """Connections accepted so far."""
        self.cuts = 0
        """Connections that a ``cut_*_request`` rule has closed."""
        self.bytes_to_server = 0
        self.bytes_to_client = 0
        self._links: set[_Link] = set()
        self._rules: list[_Rule] = []
        self._delay = 0.0
        self._blackhole = False
        self._hold = False
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._listener = _bound(0)
        self.port: int = self._listener.getsockname()[1]
        self._listening = False
        self._set_listening(True)
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def open_connections(self) -> int:
        return self._call(lambda: len(self._links))

    # --- what a test tells it

    def cut(self) -> int:
        """Closes all connections now and says how many there were; new ones are accepted."""
        return self._call(self._cut)

    def refuse(self) -> None:
        """New connections are refused (ECONNREFUSED); those that are open stay."""
        self._call(lambda: self._set_listening(False))

    def accept(self) -> None:
        """Ends ``refuse``."""
        self._call(lambda: self._set_listening(True))

    def cut_after_request(self, match: bytes, times: int = 1) -> None:
        """A lost reply: the next ``times`` requests with these bytes reach the server; when it answers, the
        connection is closed instead. When the client sees the error, the server has done what was asked."""
        self._call(lambda: self._rules.append(_Rule(match, times, after=True)))

    def cut_before_request(self, match: bytes, times: int = 1) -> None:
        """A lost request: the connection is closed and the chunk with these bytes never reaches the server."""
        self._call(lambda: self._rules.append(_Rule(match, times, after=False)))

    def clear_rules(self) -> None:
        self._call(self._rules.clear)

    def blackhole(self, on: bool = True, *, hold: bool = False) -> None:
        """Half-open: nothing passes in either direction and nothing is closed; new connections look accepted.

        What is sent is lost, so switching it off resets the connections that lost something. With ``hold`` it is
        kept and delivered then, as TCP does after a short partition.
        """
        self._call(lambda: self._set_blackhole(on, hold))

    def delay(self, seconds: float) -> None:
        """Every chunk, in both directions, arrives so much later. 0 switches it off."""

        def change() -> None:
            self._delay = seconds

        self._call(change)

    def close(self) -> None:
        if self._thread.is_alive():

            def stop() -> None:
                self._stop = True

            self._call(stop)
            self._thread.join(10)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- the thread

    def _call(self, function: Callable[[], T]) -> T:
        """Runs it in the proxy's thread, which alone owns the state."""
        if threading.current_thread() is self._thread:
            return function()
        if not self._thread.is_alive():
            raise RuntimeError("the proxy is closed")
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(run)
        # It may have been busy, have found the call by itself, and have ended with it.
        with contextlib.suppress(OSError):
            self._wake.send(b"x")
        return future.result(10)

    def _run(self) -> None:
        try:
            while not self._stop:
                for key, events in self._selector.select(self._next_due()):
                    if key.fileobj is self._woken:
                        with contextlib.suppress(BlockingIOError):
                            self._woken.recv(4096)
                    elif key.fileobj is self._listener:
                        self._accept_one()
                    elif not key.data.link.closed:
                        if events & selectors.EVENT_READ:
                            self._read(key.data)
                        if events & selectors.EVENT_WRITE and not key.data.link.closed:
                            self._write(key.data)
                if self._delay or any(side.out for side in self._sides()):
                    for side in list(self._sides()):
                        if side.out and not side.link.closed:
                            self._write(side)
                while not self._calls.empty():
                    self._calls.get()()
        finally:
            self._cut()
            self._listener.close()
            self._selector.close()
            self._wake.close()
            self._woken.close()

    def _sides(self) -> Iterator[_Side]:
        for link in self._links:
            yield link.client
            yield link.server

    def _next_due(self) -> float | None:
        if self._blackhole:
            return None
        dues = [side.out[0][0] for side in self._sides() if side.out]
        now = time.monotonic()
        # What is due already waits for the socket to be writable, which the selector tells.
        later = [due - now for due in dues if due > now]
        return min(later) if later else None

    def _set_listening(self, on: bool) -> None:
        if on == self._listening:
            return
        if on:
            self._listener.listen(128)
            self._selector.register(self._listener, selectors.EVENT_READ, None)
        else:
            self._selector.unregister(self._listener)
            self._listener.close()
            # Bound but not listening: refuses, and keeps the port ours.
            self._listener = _bound(self.port)
        self._listening = on

    def _set_blackhole(self, on: bool, hold: bool) -> None:
        self._blackhole, self._hold = on, hold
        for link in list(self._links):
            if not on and link.swallowed:
                self._close(link, reset=True)
        for side in list(self._sides()):
            if not side.link.closed:
                self._watch(side)

    def _accept_one(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        self.connections += 1
        try:
            server = socket.create_connection(self._target, timeout=2)
        except OSError:
            client.close()
            return
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = _Link(client, server)
        self._links.add(link)
        for side in (link.client, link.server):
            self._selector.register(side.sock, selectors.EVENT_READ, side)
            self._watch(side)

    def _watch(self, side: _Side) -> None:
        if side.link.client_gone and side is side.link.client:
            return
        events = 0
        other = side.link.client if _is_server(side) else side.link.server
        if not (self._blackhole and self._hold) and not other.eof:
            events |= selectors.EVENT_READ
        if side.out and not self._blackhole and side.out[0][0] <= time.monotonic():
            events |= selectors.EVENT_WRITE
        registered = side.sock.fileno() in self._selector.get_map()
        if events and registered:
            self._selector.modify(side.sock, events, side)
        elif events:
            self._selector.register(side.sock, events, side)
        elif registered:
            self._selector.unregister(side.sock)

    def _read(self, side: _Side) -> None:
        link = side.link
        try:
            data = side.sock.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if self._blackhole and self._hold:
            return
        if self._blackhole:
            link.swallowed = True
            if not data:
                # The end is not passed on either; stop watching a socket that is at its end.
                self._selector.unregister(side.sock)
            return
        from_server = _is_server(side)
        if link.client_gone:
            # The client's connection is closed; the server's stays until it has done what it was sent.
            if from_server and not data:
                self._close(link)
            return
        other = link.client if from_server else link.server
        if not data:
            other.eof = True
            if not other.out:
                self._close(link)
            else:
                self._watch(side)
            return
        if from_server:
            if link.lose_reply:
                self.cuts += 1
                self._lose_client(link)
                return
            self.bytes_to_client += len(data)
        else:
            rule = self._match(side, data)
            if rule is not None and not rule.after:
                self.cuts += 1
                self._close(link)
                return
            if rule is not None:
                link.lose_reply = True
            self.bytes_to_server += len(data)
        other.out.append((time.monotonic() + self._delay if self._delay else 0.0, data))
        self._write(other)

    def _match(self, side: _Side, data: bytes) -> _Rule | None:
        seen = side.tail + data
        side.tail = seen[-200:]
        for rule in self._rules:
            at = seen.find(rule.match, max(0, len(seen) - len(data) - len(rule.match) + 1))
            if at >= 0:
                rule.left -= 1
                if rule.left <= 0:
                    self._rules.remove(rule)
                return rule
        return None

    def _write(self, side: _Side) -> None:
        if self._blackhole:
            return
        now = time.monotonic()
        while side.out and side.out[0][0] <= now:
            due, data = side.out[0]
            try:
                sent = side.sock.send(data)
            except BlockingIOError:
                break
            except OSError:
                self._close(side.link)
                return
            if sent < len(data):
                side.out[0] = (due, data[sent:])
                break
            side.out.popleft()
        if side.eof and not side.out and side.link.client_gone:
            with contextlib.suppress(OSError):
                side.sock.shutdown(socket.SHUT_WR)
        elif side.eof and not side.out:
            self._close(side.link)
            return
        self._watch(side)

    def _lose_client(self, link: _Link) -> None:
        """Closes the client's side at once, and the server's gently: a hard close could drop what it has not read."""
        link.client_gone = True
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(link.client.sock)
        link.client.sock.close()
        link.client.out.clear()
        link.server.eof = True
        self._write(link.server)

    def _close(self, link: _Link, reset: bool = False) -> None:
        if link.closed:
            return
        link.closed = True
        self._links.discard(link)
        for side in (link.client, link.server):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(side.sock)
            with contextlib.suppress(OSError):
                if reset:
                    side.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                side.sock.close()

    def _cut(self) -> int:
        links = [link for link in self._links if not link.client_gone]
        for link in list(self._links):
            self._close(link)
        return len(links)


def _is_server(side: _Side) -> bool:
    return side is side.link.server


def _bound(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setblocking(False)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    return listener


@pytest.fixture
def proxy() -> Iterator[Callable[[int | RedisServer], Proxy]]:
    """``proxy(server)`` or ``proxy(port)`` makes a Proxy in front of it."""
    made: list[Proxy] = []

    def make(target: int | RedisServer) -> Proxy:
        made.append(Proxy(target if isinstance(target, int) else target.port))
        return made[-1]

    yield make
    for one in made:
        one.close()
