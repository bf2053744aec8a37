"""Our transport as a migration's source or target, through kombu."""

from __future__ import annotations

import base64
import time
import uuid
from typing import Any

from ..clock import mono_s
from ..errors import QueueFull
from ..queue.seen import PAGE
from ..transport.message import DELIVERY, PRODUCE_ID
from ..transport.vhost import VHost
from .messages import NotMoved
from .side import Outcome, Side

WAIT_S = 15.0
"""How long a queue of streams is waited for that holds messages and gives none: longer than a lease."""


class Streams(Side):
    """Our transport, through kombu."""

    finds_queues = False

    # --- as the source

    def move(self, names: list[str], unacked: bool, target: Side, outcome: Outcome) -> None:
        from kombu.utils.encoding import str_to_bytes
        from kombu.utils.json import dumps

        for queue in dict.fromkeys(names):
            # What waits in the broker for its eta is to be had now; its eta stays in its headers, for the worker.
            self.vhost.make_due(queue)
            while (message := self.next(queue)) is not None:
                payload, identity = self.plain(message._raw), self.identity(message.delivery_tag)
                # If we die before the acknowledgement, or give up here, it comes back to its queue by itself.
                target.store(queue, payload, str_to_bytes(dumps(payload)), identity)
                self.channel.basic_ack(message.delivery_tag)
                outcome.moved[queue][self.channel._get_message_priority(payload)] += 1
            if left := self.left(queue):
                outcome.left[queue] = left

    @property
    def vhost(self) -> VHost:
        vhost: VHost = self.channel.session.vhost
        return vhost

    def left(self, queue: str) -> int:
        """Messages that wait, or that somebody holds."""
        return self.vhost.size(queue) + self.vhost.held(queue)

    def next(self, queue: str) -> Any:
        """The next message; None if there is none, or none that live workers leave to us."""
        end = mono_s() + WAIT_S
        while (message := self.channel.basic_get(queue)) is None:
            # A shard is ours some moments after we asked for it, and what a dead process held when its lease has expired.
            if not self.left(queue) or mono_s() > end:
                return None
            self.keep_alive()
            time.sleep(0.05)
        return message

    def identity(self, tag: str) -> str:
        """What is the same in each delivery of a message: its entry in its stream."""
        place = self.channel.session.deliveries.place(tag)
        return f"{uuid.uuid5(uuid.NAMESPACE_OID, repr(place)).hex} 0"

    def plain(self, delivered: dict[str, Any]) -> dict[str, Any]:
        """The message without what its delivery added, and as JSON can hold it."""
        from kombu.utils.encoding import bytes_to_str, str_to_bytes

        headers, properties = dict(delivered["headers"] or {}), dict(delivered["properties"])
        headers.pop(DELIVERY, None)
        properties.pop(PRODUCE_ID, None)
        properties["delivery_tag"] = str(uuid.uuid4())
        body = delivered["body"]
        if not properties.get("body_encoding"):
            body = bytes_to_str(base64.b64encode(str_to_bytes(body)))
            properties["body_encoding"] = "base64"
        return {**delivered, "body": body, "headers": headers, "properties": properties}

    def count(self, names: list[str], outcome: Outcome) -> None:
        for queue in dict.fromkeys(names):
            if number := self.vhost.size(queue):
                outcome.moved[queue][0] = number

    # --- as the target

    def put(self, queue: str, payload: dict[str, Any], raw: bytes, identity: str | None) -> None:
        payload["headers"] = payload.get("headers") or {}
        if identity is None:
            identity = f"{uuid.uuid4().hex} 0"
        # A page, and a number in it; "inf": a run of this command that was ended may have stored it, whenever that was.
        batch, _, number = identity.partition(" ")
        page, place = divmod(int(number), PAGE)
        payload["properties"][PRODUCE_ID] = f"m{batch}.{page:x} {place} inf"
        try:
            self.channel._put(queue, payload)
        except QueueFull:
            raise
        except (TypeError, ValueError) as exc:
            raise NotMoved(f"refused by {self.url}: {exc}") from None
