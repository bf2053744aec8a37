"""Stores messages. A publish that is repeated after a lost reply, by kombu or here, adds one message."""

from __future__ import annotations

from bisect import bisect
from typing import TYPE_CHECKING, Any

from ..errors import BrokerUnavailable, ReplyError, StreamTaskError
from ..queue.producer import Call
from ..redis.keys import SHARED
from . import hooks
from .message import PRODUCE_ID, REPLACES, due_ms, encode, key_of
from .queues import GROUP, shared
from .session import Session

if TYPE_CHECKING:
    from .channel import Channel


def _call(session: Session, queue_name: str, message: dict[str, Any]) -> Call:
    """The produce call of one message for one queue."""
    for hook in hooks.before_publish:
        hook(message)
    headers, properties = message["headers"], message["properties"]
    key = key_of(headers)
    queue = session.queue(queue_name)
    if key is not None:
        shard: int | str = queue.shard_for(key)
        due = due_ms(headers, 0.0)
    else:
        steps = session.options.priority_steps
        priority = properties.get("priority") or 0
        shard = shared(steps[bisect(steps, priority) - 1]) if priority else SHARED
        due = due_ms(headers, session.options.eta_hold_s)
    queue.open(shard)
    page, number = properties[PRODUCE_ID].split(" ")
    return Call(queue, shard, encode(message, key), due_ms=due, produce_id=(page, int(number)))


def put(session: Session, queue_name: str, message: dict[str, Any]) -> None:
    """Stores one message. Raises ``BrokerUnavailable``, ``QueueFull``."""
    call = _call(session, queue_name, message)
    replaces = message["headers"].get(REPLACES)
    if isinstance(replaces, dict) and replaces.get("queue") == queue_name:
        _replace(session, call, replaces)
    else:
        session.producer.send(call)


def _replace(session: Session, call: Call, replaces: dict[str, Any]) -> None:
    """Stores a retry in the place of the entry that it repeats."""
    assert call.produce_id is not None
    queue = call.queue
    shape = queue.shape()
    if call.shard != replaces["shard"] or shape.epoch != replaces["epoch"]:
        session.producer.send(call)  # its key has changed, or the queue's shards have
        return
    keys = queue.shard_keys(call.shard)
    page, number = call.produce_id
    names = [
        keys.state, keys.seen(page), keys.stream, keys.delayed, keys.wake, keys.lease(GROUP), keys.notes(GROUP),
        keys.replaced(GROUP),
    ]  # fmt: skip
    args = [
        shape.epoch, number, session.options.produce_ttl_ms, "m", call.envelope, call.due_ms or 0, GROUP,
        replaces["entry"], replaces["token"], int(replaces.get("generation", 0)) + 1,
    ]  # fmt: skip
    answer = session.producer.patiently(lambda: session.connections.run("produce_replacement", names, args))
    if answer < 0:
        session.producer.send(call)


class PublishBatch:
    """Many publishes in few round trips, for kombu's ``Producer.batch``."""

    def __init__(self, channel: Channel, max_size: int) -> None:
        self.channel = channel
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

    def add(self, session: Session, queue: str, message: dict[str, Any]) -> None:
        if REPLACES in message["headers"]:
            put(session, queue, message)
        else:
            self._calls.append(_call(session, queue, message))

    def flush(self) -> None:
        """Sends what was collected. Raises kombu's ``BatchPublishError`` where some of it may not be stored."""
        self._check()
        calls, self._calls = self._calls, []
        if not calls:
            return
        try:
            send_all(self.channel.session, calls)
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


def send_all(session: Session, calls: list[Call]) -> None:
    """Stores messages in their order; those of one server in one write."""
    producer = session.producer
    packed = [call.pack(producer.target(call.queue, call.shard)) for call in calls]
    if session.broker.is_cluster:
        for call in calls:
            producer.send(call)
        return
    # The same calls again after a lost reply: each carries its produce id.
    replies = producer.patiently(lambda: session.connections.once_more(lambda link: link.pipeline(packed)))
    for call, reply in zip(calls, replies, strict=True):
        if type(reply) is bytes or reply in (0, 1):
            continue
        if isinstance(reply, BrokerUnavailable | ReplyError):
            raise reply
        producer.send(call)
