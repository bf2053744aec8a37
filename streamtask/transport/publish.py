"""Stores messages. A publish that is repeated after a lost reply, by kombu or here, adds one message."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..errors import StreamTaskError
from ..queue.calls import Call, Target
from ..queue.delivery import Delivery
from ..queue.producer import Producer
from ..redis import wire
from ..redis.keys import SHARED
from ..redis.scripts import script
from . import hooks
from .message import PRODUCE_ID, REPLACES, SENT, due_ms, encode, key_of
from .options import Options
from .queues import GROUP, shared
from .vhost import VHost

INF = float("inf")


@dataclass(slots=True)
class KeyedCall(Call):
    """Of a message with a shard key: where the queue was made anew, it may have another number of shards."""

    key: bytes = b""

    def renew(self) -> None:
        Call.renew(self)
        self.shard = self.queue.shard_for(self.key)


@dataclass(slots=True)
class Retry(KeyedCall):
    """A retry that is stored in the place of the entry that it repeats, as its message's ``replaces`` says; like any message
    where its key has changed, or the queue's shards have."""

    replaces: Mapping[str, Any] = field(default_factory=dict)

    def pack(self, target: Target) -> bytes:
        replaces, keys = self.replaces, target.keys
        if self.produce_id is None or self.shard != replaces["shard"] or target.epoch != replaces["epoch"]:
            return Call.pack(self, target)
        page, number = self.produce_id
        names = (
            keys.state, keys.seen(page), keys.stream, keys.delayed, keys.wake, keys.lease(GROUP), keys.notes(GROUP),
            keys.replaced(GROUP),
        )  # fmt: skip
        args = (
            target.epoch, number, target.settings.produce_ttl_ms, wire.MSGPACK, self.envelope, self.due_ms or 0, GROUP,
            replaces["entry"], replaces["token"], int(replaces.get("generation", 0)) + 1,
        )  # fmt: skip
        return script("produce_replacement").pack(names, args)

    @property
    def ours(self) -> bool:
        # "Stored already" also says that another owner has the entry, and runs it again.
        return True


PUT_OFF_S = 1.0
"""How long putting off waits for Redis: it is tried again."""


class Publisher:
    """Stores messages in queues that the virtual host knows."""

    def __init__(self, producer: Producer, vhost: VHost, options: Options, *, is_cluster: bool) -> None:
        self.producer = producer
        self._vhost = vhost
        self._options = options
        self._is_cluster = is_cluster

    def put(self, queue_name: str, message: dict[str, Any]) -> None:
        """Stores one message. Raises ``BrokerUnavailable``, ``QueueFull``."""
        call = self.call_of(queue_name, message)
        try:
            self.producer.send(call)
        finally:
            since = call.sent_at or call.tried_at or (INF if call.repeated else None)
            if since is not None and SENT not in message:
                message[SENT] = (*(call.produce_id or ()), since)

    def call_of(self, queue_name: str, message: dict[str, Any]) -> Call:
        """The produce call of one message for one queue."""
        for hook in hooks.before_publish:
            hook(message)
        headers, properties = message["headers"], message["properties"]
        key = key_of(headers)
        queue = self._vhost.queue(queue_name)
        if key is not None:
            shard: int | str = queue.shard_for(key)
            due = due_ms(headers, 0.0)
        else:
            steps = self._options.priority_steps
            priority = _priority(properties.get("priority"))
            shard = shared(steps[bisect(steps, priority) - 1]) if priority else SHARED
            due = due_ms(headers, self._options.eta_hold_s)
        queue.open(shard)
        page, number, *since = properties[PRODUCE_ID].split(" ")
        replaces = headers.get(REPLACES)
        call = Call(queue, shard, encode(message, key), due_ms=due, produce_id=(page, int(number)))
        if key is not None:
            again = isinstance(replaces, dict) and replaces.get("queue") == queue_name
            kind = partial(Retry, replaces=replaces) if again else KeyedCall
            call = kind(queue, shard, call.envelope, due_ms=due, produce_id=call.produce_id, key=key)
        if since:
            call.repeated, call.sent_at = True, float(since[0])
        return call

    def put_off(self, queue_name: str, shard: int | str, delivery: Delivery, due_ms: int) -> None:
        """Stores a message that was delivered once more, to be delivered when it is due. Who repeats that adds none. Raises
        ``StreamTaskError``."""
        envelope = wire.encode(delivery.task, delivery.key, delivery.id, delivery.args, delivery.kwargs)
        produce_id = f"o{delivery.entry_id.decode()}", 0
        kind = KeyedCall if delivery.key is not None else Call
        more = {} if delivery.key is None else {"key": delivery.key}
        queue = self._vhost.queue(queue_name)
        call = kind(queue, shard, envelope, due_ms=due_ms, produce_id=produce_id, repeated=True, sent_at=INF, **more)
        self.producer.send(call, PUT_OFF_S)

    def send_all(self, calls: list[Call]) -> None:
        """Stores messages in their order; those of one server in one write."""
        if self._is_cluster:
            for call in calls:
                self.producer.send(call)
        else:
            self.producer.send_together(calls)


def _priority(stated: Any) -> int:
    """As kombu reads it."""
    try:
        return max(0, int(stated or 0))
    except (TypeError, ValueError, OverflowError):
        return 0


def keep_id(message: dict[str, Any]) -> None:
    """After an attempt of a publish that failed: the next one has its id, and knows since when that may be stored."""
    if SENT in message:
        message["properties"][PRODUCE_ID] = " ".join(map(str, message[SENT]))


class PublishBatch:
    """Many publishes in few round trips, for kombu's ``Producer.batch``."""

    def __init__(self, publisher: Publisher, channel: Any, max_size: int) -> None:
        self._publisher = publisher
        self.channel = channel  # by which kombu tells whose batch it is
        self.max_size = max_size
        self._calls: list[Call] = []
        self._usable = True

    def publish(self, message: dict[str, Any], **kwargs: Any) -> Any:
        """Takes a prepared message; full batches are sent."""
        self._check()
        result = self.channel.basic_publish(message, _publish_batch=self, **kwargs)
        if len(self._calls) >= self.max_size:
            self.flush()
        return result

    def add(self, queue: str, message: dict[str, Any]) -> None:
        call = self._publisher.call_of(queue, message)
        if isinstance(call, Retry):
            self._publisher.producer.send(call)
        else:
            self._calls.append(call)

    def flush(self) -> None:
        """Sends what was collected. Raises kombu's ``BatchPublishError`` where some of it may not be stored."""
        self._check()
        calls, self._calls = self._calls, []
        if not calls:
            return
        try:
            self._publisher.send_all(calls)
        except BaseException as exc:
            self._usable = False
            if not isinstance(exc, StreamTaskError):
                raise
            from kombu.exceptions import BatchPublishError

            raise BatchPublishError(f"a batch of {len(calls)} messages is stored in part at most: {exc}") from exc

    def discard(self) -> None:
        self._calls = []
        self._usable = False

    def close(self) -> None:
        self.discard()

    def _check(self) -> None:
        if not self._usable:
            raise RuntimeError("the publish batch is closed, or failed before")
