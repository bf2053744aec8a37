"""What the transport's tests share: connections, publishing, a consumer that keeps what it got."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Iterator
from typing import Any

import redis
from kombu import Connection, Consumer, Exchange, Message, Queue

import streamtask.transport  # noqa: F401  (registers the schemes)
from streamtask.transport import sessions
from tests.fix_proxy import Proxy
from tests.fix_redis import RedisServer
from tests.helpers import wait_until

LEASE_S = 2.0
"""Short, so that a test of a lost lease is short; long enough for a slow machine."""


class Kit:
    """A namespace on a server, and kombu connections to it."""

    def __init__(self, server: RedisServer | Proxy, *, namespace: str | None = None, **options: Any) -> None:
        self.server = server
        self.namespace = namespace or f"t{uuid.uuid4().hex[:8]}"
        self.options = {"namespace": self.namespace, "lease": LEASE_S, **options}
        self._open: list[Connection] = []

    @property
    def url(self) -> str:
        return f"streamtask://127.0.0.1:{self.server.port}/0"

    def connect(self, url: Any = None, transport_options: dict[str, Any] | None = None, **more: Any) -> Connection:
        """A kombu connection, closed at the end of the test."""
        options = {**self.options, **(transport_options or {})}
        connection = Connection(url or self.url, transport_options=options, **more)
        self._open.append(connection)
        return connection

    def clone(self, connection: Connection) -> Connection:
        """A copy, closed at the end of the test."""
        self._open.append(connection.clone())
        return self._open[-1]

    def close(self) -> None:
        while self._open:
            with contextlib.suppress(Exception):
                self._open.pop().release()
        # What should have ended with its last connection, and has tests of its own (test_leaving.py).
        for session in sessions.every():
            if session.options.namespace == self.namespace and session.ownership.fileno() >= 0:
                session.ownership.close()

    def channel(self, **more: Any) -> Any:
        """A channel on a connection of its own."""
        return self.connect(**more).channel()

    def queue(self, channel: Any, name: str = "q", **arguments: Any) -> Queue:
        """A declared queue, bound to the direct exchange of its name."""
        queue = Queue(name, Exchange(name, type="direct"), routing_key=name, **arguments)(channel)
        queue.declare()
        return queue

    def client(self) -> redis.Redis:
        """redis-py, straight to the server."""
        assert isinstance(self.server, RedisServer)
        return self.server.client()

    def keys(self, pattern: str) -> list[str]:
        return sorted(key.decode() for key in self.client().scan_iter(f"{self.namespace}:{pattern}", count=1000))

    def dead(self, queue: str = "q") -> int:
        """How many dead letters a queue has."""
        client = self.client()
        return sum(client.xlen(key) for key in self.keys(f"{{kombu.{queue}.*:dlq"))

    def pending(self, queue: str = "q") -> int:
        """How many deliveries of a queue are not acknowledged."""
        client = self.client()
        return sum(client.xpending(key, "workers")["pending"] for key in self.keys(f"{{kombu.{queue}.*:stream"))


class Inbox:
    """A consumer on a channel that keeps what it is given."""

    def __init__(self, channel: Any, *queues: Queue | str, prefetch: int | None = None, **options: Any) -> None:
        self.channel = channel
        self.connection = channel.connection.client
        self.messages: list[Message] = []
        self.times: list[float] = []
        options.setdefault("accept", ["json", "pickle", "yaml", "application/data", "text/plain"])
        self.consumer = Consumer(
            channel,
            [queue if isinstance(queue, Queue) else Queue(queue, no_declare=True) for queue in queues],
            on_message=self._receive,
            auto_declare=False,
            **options,
        )
        if prefetch is not None:
            self.consumer.qos(prefetch_count=prefetch)
        self.consumer.consume()

    def _receive(self, message: Message) -> None:
        self.times.append(time.monotonic())
        self.messages.append(message)

    @property
    def bodies(self) -> list[Any]:
        return [message.payload for message in self.messages]

    def drain(self, timeout: float = 0.3) -> bool:
        """Waits for one event; False if none came."""
        try:
            self.connection.drain_events(timeout=timeout)
        except TimeoutError:
            return False
        return True

    def drain_all(self, timeout: float = 0.3) -> list[Any]:
        """Takes until nothing more comes."""
        while self.drain(timeout):
            pass
        return self.bodies

    def take(self, count: int = 1, timeout: float = 10) -> list[Message]:
        """Waits until so many more have come, and gives these."""
        before = len(self.messages)

        def arrived() -> bool:
            self.drain(0.1)
            return len(self.messages) >= before + count

        wait_until(arrived, timeout, lambda: f"{count} messages; came: {self.bodies[before:]}", poll=0)
        return self.messages[before:]

    def cancel(self) -> None:
        self.consumer.cancel()


def publish(channel: Any, *bodies: Any, to: str = "q", **options: Any) -> None:
    """Publishes bodies to a queue (through the default exchange)."""
    from kombu import Producer

    producer = Producer(channel)
    for body in bodies:
        producer.publish(body, routing_key=to, **options)


def own_addresses(port: int) -> set[str]:
    """This process' ends of its connections to a server."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(fd))) as sock:
                if sock.family == socket.AF_INET and sock.getpeername()[1] == port:
                    found.add("{}:{}".format(*sock.getsockname()))
    return found


def wait_until_closed(client: redis.Redis, port: int) -> None:
    """Waits until a server, as its ``timeout`` says, has closed all connections that this process has to it now, but for those
    that listen."""
    client.ping()
    ours = own_addresses(port)

    def left() -> set[str]:
        return ours & {row["addr"] for row in client.client_list(_type="normal") if not row["cmd"].startswith("client")}

    assert left()
    wait_until(lambda: not left(), 15, lambda: str(client.client_list()), poll=0.1)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.suppress(Exception):
        yield
