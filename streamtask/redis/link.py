"""One connection for prepared commands: the path of the messages.

redis-py connects (authentication, TLS, Sentinel, the handshake); from then on the link writes to the socket and parses
with hiredis itself, for redis-py's command layer costs several times what the round trip does. All errors of the
connection end here: callers see ``BrokerUnavailable``, ``BrokerOutOfMemory``, ``AccessRefused`` or ``ReplyError``
(``replies.py``).
"""

from __future__ import annotations

import ipaddress
import re
import select
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import hiredis
import redis
from hiredis import pack_command
from redis import exceptions as rexc

from ..errors import AccessRefused, BrokerOutOfMemory, BrokerUnavailable, Misconfigured, ReplyError, StreamTaskError
from .replies import translate_reply
from .scripts import as_text, by_sha, script

Reply = Any
Part = str | bytes | int | float
MOVED = ("MOVED", "ASK")  # how a node of a Cluster says that a slot is elsewhere
CODES = {
    rexc.AuthenticationError: "WRONGPASS",
    rexc.BusyLoadingError: "LOADING",
    rexc.NoPermissionError: "NOPERM",
    rexc.NoScriptError: "NOSCRIPT",
    rexc.OutOfMemoryError: "OOM",
    rexc.ReadOnlyError: "READONLY",
    rexc.MasterDownError: "MASTERDOWN",
    rexc.AskError: "ASK",
    rexc.MovedError: "MOVED",
    rexc.TryAgainError: "TRYAGAIN",
    rexc.ClusterDownError: "CLUSTERDOWN",  # the class of those above, too
}
"""The error replies that redis-py has classes for."""

IDENTITY = frozenset({
    "username", "password", "credential_provider", "ssl_certfile", "ssl_keyfile", "client_name", "db",
})  # fmt: skip
"""What a connection tells of itself, of the options of redis-py."""

ERRORS = (rexc.RedisError, rexc.RedisClusterException, OSError)  # the cluster's is no RedisError
SMALL, LARGE = 1 << 14, 1 << 18
"""Bytes that one read takes at most: for short answers, and for fetches of whole batches."""


REPLIES = (ReplyError, BrokerOutOfMemory, AccessRefused)
"""What Redis may answer with in place of a reply: after these a link is as good as before."""


def pack(*parts: Part) -> bytes:
    """One command as bytes for the wire."""
    packed: bytes = pack_command(tuple(as_text(parts)))  # type: ignore[arg-type]  # hiredis' stub names a 1-tuple
    return packed


def translate(exc: Exception, where: str) -> StreamTaskError:
    """An error of redis-py or of the socket as one of ours."""
    if isinstance(exc, StreamTaskError):
        return exc
    if isinstance(exc.__cause__, StreamTaskError):
        return exc.__cause__  # redis-py has wrapped ours
    text = str(exc)
    for known, code in CODES.items():
        if isinstance(exc, known):
            return translate_reply(f"{code} {text}", where)  # redis-py has taken the code away
    if isinstance(exc, rexc.InvalidResponse):
        return BrokerUnavailable(f"what answers at {where} is no Redis ({text}): is the port right?")
    if "Cluster mode is not enabled" in text:
        return Misconfigured(f"Redis at {where} is no Redis Cluster: its URL must begin with redis:// or rediss://")
    # redis-py shows its client there with all that it was made with, in some versions the password.
    text = re.sub(r"<redis\..*>", "a Sentinel", text)
    if isinstance(exc, rexc.ConnectionError | rexc.TimeoutError | rexc.RedisClusterException | OSError):
        return BrokerUnavailable(
            f"Redis at {where} can't be reached: {text.rstrip('.')}. Is it running, and is the URL right?"
        )
    return translate_reply(text, where)


E = TypeVar("E", bound=BaseException)


def not_done(error: E) -> E:
    """Says of an error that what was asked for was not done: it was not even sent, or was refused."""
    if isinstance(error, BrokerUnavailable):
        error.in_doubt = False
    return error


def too_late() -> BrokerUnavailable:
    """Of a call that would have been repeated too late."""
    return not_done(BrokerUnavailable("there was no connection to Redis in time to repeat the call"))


class Link:
    """One connection to Redis for prepared commands; used by one thread at a time.

    A link that failed is closed and connects anew at its next use. ``send`` and ``read`` raise ``BrokerUnavailable``.
    ``timeout_s`` bounds the wait for a reply.
    """

    __slots__ = (
        "_buffer",
        "_buffer_bytes",
        "_conn",
        "_feed",
        "_gets",
        "_reader",
        "_recv_into",
        "_sendall",
        "_sock",
        "_where",
        "connects",
    )

    def __init__(self, conn: Any, where: str, buffer_bytes: int = SMALL) -> None:
        self._conn = conn
        self._where = where
        self._sock: Any = None
        self._buffer = bytearray()
        self._buffer_bytes = buffer_bytes
        self.connects = 0

    def connect(self) -> None:
        """Connects, if that is not done. Raises ``BrokerUnavailable`` or ``ConfigError``."""
        if self._sock is not None:
            return
        try:
            self._conn.connect()
            self._take_over(self._conn._sock)
        except BaseException as exc:
            # Also after an interruption: the answers of a broken handshake would be taken for others.
            error = self._failed(exc)
            if type(error) is ReplyError:
                # Nothing was asked but what the URL says: user, database, the client's name.
                error = Misconfigured(f"Redis at {self._where} refuses the connection: {error}", error.code)
            raise not_done(error) from None
        self.connects += 1

    def _take_over(self, sock: Any) -> None:
        self._reader = hiredis.Reader(protocolError=rexc.InvalidResponse, replyError=self._translate_reply)
        self._gets = self._reader.gets
        self._feed: Any = self._reader.feed  # its stub knows bytes only
        timeout = sock.gettimeout()
        # TLS sockets, and those of gevent and eventlet, need their own time limit.
        plain = type(sock) is socket.socket and type(sock).__module__ == "socket"
        if timeout is not None and plain:
            # The kernel's own time limit: Python's takes a poll() before every read and write.
            limit = struct.pack("ll", int(timeout), int(timeout % 1 * 1_000_000))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            sock.settimeout(None)
        self._sendall, self._recv_into = sock.sendall, sock.recv_into
        self._buffer = self._buffer or bytearray(self._buffer_bytes)
        self._sock = sock

    def _translate_reply(self, text: str) -> StreamTaskError:
        return translate_reply(text, self._where)

    @property
    def connected(self) -> bool:
        return self._sock is not None

    def is_local(self) -> bool:
        """Whether it leads over the loopback interface."""
        if self._sock is None or self._sock.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        return ipaddress.ip_address(self._sock.getpeername()[0]).is_loopback

    def fileno(self) -> int:
        """The socket's number, for a selector; -1 when not connected."""
        return -1 if self._sock is None else int(self._sock.fileno())

    def send(self, packed: bytes) -> None:
        """Sends prepared bytes."""
        if self._sock is None:
            self.connect()
        try:
            self._sendall(packed)
        except BaseException as exc:
            raise self._failed(exc) from None

    def read(self) -> Reply:
        """Reads one reply. An error reply raises; an error nested in a list stays in it as an exception."""
        if self._sock is None:
            raise self._failed(ConnectionError("the connection is closed"))
        gets = self._gets
        try:
            reply = gets()
            while reply is False:
                count = self._recv_into(self._buffer)
                if not count:
                    raise ConnectionError("the server closed the connection")
                self._feed(self._buffer, 0, count)
                reply = gets()
        except BaseException as exc:
            raise self._failed(exc) from None
        if isinstance(reply, Exception):
            raise self._refused(reply)
        return reply

    def read_many(self, count: int) -> list[Reply]:
        """Reads so many replies; error replies stay in the list as exceptions."""
        if self._sock is None:
            raise self._failed(ConnectionError("the connection is closed"))
        replies: list[Reply] = []
        gets = self._gets
        try:
            while len(replies) < count:
                reply = gets()
                if reply is False:
                    received = self._recv_into(self._buffer)
                    if not received:
                        raise ConnectionError("the server closed the connection")
                    self._feed(self._buffer, 0, received)
                else:
                    replies.append(reply)
        except BaseException as exc:
            raise self._failed(exc) from None
        for reply in replies:
            if isinstance(reply, BrokerUnavailable):
                raise self._refused(reply)
        return replies

    def _refused(self, error: Exception) -> Exception:
        """Of an error reply: a server that is not ready, or no longer the master, is to be connected to anew."""
        if isinstance(error, BrokerUnavailable):
            self.close()
        return error

    def _failed(self, exc: BaseException) -> BaseException:
        """Closes: after an error, or an interruption, nobody knows which reply is whose."""
        self.close()
        if isinstance(exc, BlockingIOError | socket.timeout):
            exc = TimeoutError("no answer within the time limit")
        return translate(exc, self._where) if isinstance(exc, ERRORS) else exc

    def buffered(self) -> bool:
        """Whether a reply, or a part of it, has been received that was not read yet."""
        sock = self._sock
        return sock is not None and (self._reader.has_data() or (hasattr(sock, "pending") and sock.pending() > 0))

    def drop_if_ended(self) -> None:
        """Between two calls: closes a connection that the server has closed, as its ``timeout`` setting says of idle ones.
        The next use connects anew, where it would have failed."""
        if self._sock is not None and not self.buffered() and _is_readable(self.fileno()):
            self.close()

    def call(self, packed: bytes) -> Reply:
        """Sends one prepared command and reads its reply; an unknown script is loaded and called again."""
        if self._sock is None:
            self.connect()
        try:
            self._sendall(packed)
            reply: Reply = False
            while reply is False:
                count = self._recv_into(self._buffer)
                if not count:
                    raise ConnectionError("the server closed the connection")
                self._feed(self._buffer, 0, count)
                reply = self._gets()
        except BaseException as exc:
            raise self._failed(exc) from None
        if isinstance(reply, Exception):
            if not (isinstance(reply, ReplyError) and reply.code == "NOSCRIPT"):
                raise self._refused(reply)
            self.load_script_of(packed)
            self.send(packed)
            return self.read()
        return reply

    def command(self, *parts: Part) -> Reply:
        """Packs, sends and reads one command."""
        return self.call(pack(*parts))

    def run(self, name: str, keys: Sequence[str | bytes], args: Sequence[Part]) -> Reply:
        """Calls the script ``lua/NAME.lua``."""
        return self.call(script(name).pack(tuple(keys), tuple(args)))

    def pipeline(self, packed: Sequence[bytes]) -> list[Reply]:
        """Sends many prepared commands at once; errors stay in the list as exceptions. Unknown scripts are loaded and
        their calls repeated, so calls that are sent together must not depend on each other's order then."""
        self.send(b"".join(packed))
        return self.answers(packed)

    def answers(self, packed: Sequence[bytes]) -> list[Reply]:
        """The second half of ``pipeline``: reads the replies to what was sent."""
        replies = self.read_many(len(packed))
        for i, reply in enumerate(replies):
            if isinstance(reply, ReplyError) and reply.code == "NOSCRIPT":
                try:
                    replies[i] = self.call(packed[i])
                except REPLIES as exc:
                    replies[i] = exc
        return replies

    def read_quietly(self) -> Reply:
        """As ``read``, but an error reply is returned."""
        try:
            return self.read()
        except REPLIES as exc:
            return exc

    def load_script_of(self, packed: bytes) -> None:
        """Loads the script that a packed EVALSHA names."""
        sha = packed.split(b"\r\n", 5)[4]
        self.command("SCRIPT", "LOAD", by_sha()[sha].source)

    def close(self) -> None:
        self._sock = None
        self._conn.disconnect()


def _is_readable(fd: int) -> bool:
    if hasattr(select, "poll"):
        waiting = select.poll()
        waiting.register(fd, select.POLLIN)
        return bool(waiting.poll(0))
    return bool(select.select([fd], [], [], 0)[0])  # with eventlet


class ClusterLink(Link):
    """A link to one node of a Cluster. ``astray`` is called when the node fails, or does not have what it is asked for
    any more."""

    __slots__ = ("_astray",)

    def __init__(self, conn: redis.Connection, where: str, buffer_bytes: int, astray: Callable[[], None]) -> None:
        super().__init__(conn, where, buffer_bytes)
        self._astray = astray

    def _translate_reply(self, text: str) -> StreamTaskError:
        if text.partition(" ")[0] in MOVED:
            return not_done(BrokerUnavailable(f"the Redis Cluster at {self._where} has moved a slot: {text}"))
        return super()._translate_reply(text)

    def _refused(self, error: Exception) -> Exception:
        if isinstance(error, BrokerUnavailable):
            self._astray()
        return super()._refused(error)

    def _failed(self, exc: BaseException) -> BaseException:
        self._astray()
        return super()._failed(exc)


class MemoryLink(Link):
    """A link to fakeredis, which has no socket: everything goes through its connection object."""

    __slots__ = ()

    def connect(self) -> None:
        if self._sock is None:
            self._conn.connect()
            self.connects += 1
            self._sock = self._conn

    def fileno(self) -> int:
        return -1

    def send(self, packed: bytes) -> None:
        self.connect()
        try:
            self._conn.send_packed_command((packed,), check_health=False)
        except ERRORS as exc:
            raise translate(exc, self._where) from None

    def read(self) -> Reply:
        try:
            return self._conn.read_response(disable_decoding=True)
        except ERRORS as exc:
            raise translate(exc, self._where) from None

    def read_many(self, count: int) -> list[Reply]:
        return [self.read_quietly() for _ in range(count)]

    def buffered(self) -> bool:
        return False

    def call(self, packed: bytes) -> Reply:
        self.send(packed)
        try:
            return self.read()
        except ReplyError as exc:
            if exc.code != "NOSCRIPT":
                raise
        self.load_script_of(packed)
        self.send(packed)
        return self.read()


def open_link(
    client: Any,
    where: str,
    *,
    timeout_s: float | None = None,
    buffer_bytes: int = SMALL,
    memory: bool = False,
    astray: Callable[[], None] | None = None,
    anonymous: bool = False,
) -> Link:
    """A new, unconnected link to the server of a redis-py client; with ``astray`` one to a node of a Cluster; ``anonymous``:
    as of one who has nothing but the address."""
    pool = client.connection_pool
    options = {name: value for name, value in pool.connection_kwargs.items() if not (anonymous and name in IDENTITY)}
    # Not by the pool's make_connection: the pool counts these, and nobody would give them back to it.
    conn: redis.Connection = pool.connection_class(**options)
    if timeout_s is not None:
        conn.socket_timeout = timeout_s
    if astray is not None:
        return ClusterLink(conn, where, buffer_bytes, astray)
    return (MemoryLink if memory else Link)(conn, where, buffer_bytes)
