"""Fanout exchanges by pub/sub: events, remote control, mingle and gossip. At most once: who does not listen misses it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

from ..clock import mono_s
from ..errors import BrokerUnavailable
from ..queue.delivery import Delivery
from ..redis import commands, keys, wire
from ..redis.connection import Broker
from ..redis.link import Link
from ..redis.links import Admission, Links
from ..text import logger
from .message import HEARD, check, decode
from .options import Options

log = logger("streamtask.transport")

PING_S = 25.0


def channels(options: Options, exchange: str, routing_key: str) -> list[str]:
    """The patterns to subscribe to for a binding. A binding without a routing key hears everything, and what has none is heard
    by all: Celery sends that to a ``Broadcast`` queue that its routes name together with its exchange."""
    plain = _escape(keys.fanout(options.namespace, options.app, options.db, exchange))
    if not options.fanout_patterns:
        return [plain]
    if not routing_key:
        return [plain, f"{plain}/*"]
    return [plain, f"{plain}/{routing_key.replace('#', '*')}"]


def channel(options: Options, exchange: str, routing_key: str) -> str:
    """The channel that a message is published to."""
    return keys.fanout(
        options.namespace, options.app, options.db, exchange, routing_key if options.fanout_patterns else ""
    )


def _escape(text: str) -> str:
    for special in "\\[]*?":
        text = text.replace(special, "\\" + special)
    return text


class Listener:
    """The subscriptions of one kombu connection. Used by the thread that drains it."""

    def __init__(self, broker: Broker, options: Options, admission: Admission, new_tag: Callable[[], str]) -> None:
        self._broker = broker
        self._options = options
        self._admission = admission
        self._new_tag = new_tag
        self._links = Links(broker, idle_s=math.inf)
        self._opened: Link | None = None  # most connections listen to nothing
        self._confirmed = False
        self._queues: dict[bytes, set[str]] = {}  # by pattern
        self._arrived: deque[tuple[str, bytes]] = deque()
        self._heard_at = mono_s()
        self._pinged = False

    def fileno(self) -> int:
        return self._link.fileno() if self._queues else -1

    @property
    def _link(self) -> Link:
        if self._opened is None:
            self._opened = self._links.at("")  # any server of a Cluster hears all
        return self._opened

    @property
    def stamp(self) -> object:
        return None if self._opened is None else (id(self._opened), self._opened.connects)

    def subscribe(self, queue: str, exchange: str, routing_key: str) -> None:
        """Returns when Redis has answered: what is published from then on is heard."""
        wanted = [pattern.encode() for pattern in channels(self._options, exchange, routing_key)]
        new = [pattern for pattern in wanted if pattern not in self._queues]
        for pattern in wanted:
            self._queues.setdefault(pattern, set()).add(queue)
        if new:
            self._link.send(commands.subscribe_patterns(new))
            with self._admission.asked():
                self._await(b"psubscribe", len(new))
            self._confirmed = True

    def unsubscribe(self, queue: str) -> None:
        gone = []
        for pattern, queues in list(self._queues.items()):
            queues.discard(queue)
            if not queues:
                del self._queues[pattern]
                gone.append(pattern)
        if not self._queues:
            self.close()
        elif gone and self._link.connected:
            self._link.send(commands.unsubscribe_patterns(gone))

    def _await(self, kind: bytes, count: int) -> None:
        while count:
            reply = self._link.read()
            if reply[0] == kind:
                count -= 1
            else:
                self._received(reply)

    def _received(self, reply: Any) -> None:
        self._heard_at, self._pinged = mono_s(), False
        if reply[0] == b"pmessage":
            for queue in self._queues.get(reply[1], ()):
                self._arrived.append((queue, reply[3]))

    def receive(self) -> None:
        """Reads what has come; to be called when the socket is readable."""
        self._received(self._link.read())
        while self._link.buffered():
            self._received(self._link.read())

    def pop(self) -> tuple[str, dict[str, Any]] | None:
        """The next message, with the queue that it is for."""
        while self._arrived:
            queue, data = self._arrived.popleft()
            try:
                delivery = Delivery(b"0-0", wire.decode([wire.MSGPACK, data]))
                check(delivery.args)
                payload = decode(delivery)
            except Exception as exc:
                log.warning("junk on a fanout exchange of queue %s: %s", queue, exc)
                continue
            payload["properties"]["delivery_tag"] = HEARD + self._new_tag()
            return queue, payload
        return None

    def confirmed(self) -> bool:
        """Whether a subscription has begun since the last call: an event like others to who drains, as with kombu's redis."""
        confirmed, self._confirmed = self._confirmed, False
        return confirmed

    def overdue(self) -> bool:
        """Whether Redis was asked for a sign and has given none; asks where it was quiet for long."""
        if not self._queues:
            return False
        quiet_s = mono_s() - self._heard_at
        if quiet_s > PING_S and not self._pinged:
            self._pinged = True
            self._heard_at = mono_s()
            self._link.send(commands.PING)
            return False
        return self._pinged and quiet_s > self._broker.timeout_s

    def fail(self) -> None:
        """The other end is gone. Raises ``BrokerUnavailable``."""
        self._link.close()
        raise BrokerUnavailable(f"Redis at {self._broker.safe_url} does not answer on its pub/sub connection")

    def close(self) -> None:
        self._queues = {}
        if self._opened is not None:
            self._opened.close()  # by itself: on a Cluster ``_links`` knows it no longer once it was closed
