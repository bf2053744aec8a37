"""A kombu channel: what it declares, publishes and consumes goes to the session of its process and broker."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from time import time
from typing import Any, ClassVar

from amqp.exceptions import ChannelError
from kombu.exceptions import OperationalError
from kombu.transport import virtual
from kombu.transport.virtual.base import queue_declare_ok_t
from kombu.transport.virtual.exchange import FanoutExchange
from kombu.utils.uuid import uuid

from .. import fork
from ..clock import mono_s
from ..errors import BrokerUnavailable, ConfigError, InDoubt, ReplyError, StreamTaskError
from ..redis import commands
from ..text import logger
from .fanout import channel as fanout_channel
from .message import HEARD, PRODUCE_ID, decode_body, encode
from .publish import PublishBatch, keep_id
from .resting import is_of_one_key
from .session import Session
from .vhost import FANOUT

log = logger("streamtask.transport")

FOR_EVER_MS = 10**12  # some 30 years
NEAR_S = 1.0
"""A key may wait so long for the time of a message, which the clock of its worker may see come late."""

LET_GO_S = 0.5
"""How long a channel that consumes a queue no longer waits at most until the keeper has taken its shards back."""


def _argument(arguments: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = arguments.get(name)
    if value is None:
        return None
    try:
        fraction = isinstance(value, float) and not value.is_integer()
        if isinstance(value, bool) or fraction or not least <= int(value) <= most:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(
            f"the queue argument {name} must be a whole number from {least} to {most}, not {value!r}"
        ) from None
    return int(value)


class QoS(virtual.QoS):  # type: ignore[misc]
    """The deliveries of one channel; what becomes of them the session knows, also when the channel is closed."""

    def __init__(self, channel: Channel, prefetch_count: int = 0) -> None:
        super().__init__(channel, prefetch_count)
        self.session: Session = channel.session

    def ack(self, delivery_tag: str) -> None:
        self.session.deliveries.ack(delivery_tag)
        super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        self.session.deliveries.reject(delivery_tag, requeue)
        super().ack(delivery_tag)

    def restore_unacked(self) -> list[Any]:
        self._flush()
        tags = list(self._delivered)
        self._delivered.clear()
        self.session.deliveries.restore(tags)
        return []

    def given(self) -> list[str]:
        """The tags of what was delivered and is not acknowledged, in their order."""
        return list(self._delivered)

    def forget(self) -> None:
        """In a forked child: what was delivered is its parent's."""
        self._dirty.clear()
        self._delivered.clear()


class Fanout(FanoutExchange):  # type: ignore[misc]
    """Its bindings say what they are: see ``Channel.typeof``."""

    def prepare_bind(self, queue: str, exchange: str, routing_key: str, arguments: Any) -> tuple[str, str | None, str]:
        return routing_key, FANOUT, queue


LOOK_S = 1.0
"""So long an exchange that this process has not declared is taken for what its bindings were."""


class Channel(virtual.Channel):  # type: ignore[misc]
    """See the module."""

    QoS = QoS
    exchange_types: ClassVar[dict[str, Any]] = {**virtual.Channel.exchange_types, "fanout": Fanout}
    supports_fanout = True
    acks_from_any_thread = True  # said to the Celery plugin, which need not hand them to the event loop
    body_encoding: str | None = None  # messages travel as msgpack, which knows bytes

    def __init__(self, connection: Any, **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        self.session: Session = connection.session
        self.poller = connection.poller
        self._no_ack: dict[str, bool] = {}
        self._receivers: dict[str, Callable[[Any], Any]] = {}
        self._got: set[str] = set()
        self._auto_delete: set[str] = set()
        self._time_to_live: dict[str, int] = {}
        self._looked: dict[str, tuple[float, bool]] = {}
        self.poller.channels.append(self)

    def after_fork(self) -> None:
        """In the child: what the parent was given or has to remove is none of its business; what the channel consumes it goes
        on to consume, if it is drained (``consume_again``)."""
        if self._qos is not None:
            self._qos.forget()
        self._got = set()
        self._auto_delete = set()

    def consume_again(self) -> None:
        """Says to the session of a forked child what this channel consumes."""
        for queue in list(self._receivers):
            self._begin_to_consume(queue, self._no_ack.get(queue, False))

    # What is declared

    def queue_declare(self, queue: str | None = None, passive: bool = False, **kwargs: Any) -> Any:
        queue = queue or f"amq.gen-{uuid()}"
        if passive:
            if not self._has_queue(queue):
                raise ChannelError(
                    f"NOT_FOUND - no queue {queue!r} in vhost {self.connection.client.virtual_host or '/'!r}",
                    (50, 10),
                    "Channel.queue_declare",
                    "404",
                )
        else:
            self._new_queue(queue, **kwargs)
        try:
            size = self._size(queue)
        except ReplyError as exc:
            if not is_of_one_key(exc):
                raise
            size = 0  # who consumes it says what is wrong
        return queue_declare_ok_t(queue, size, self.session.vhost.consumers(queue) if passive else 0)

    def _new_queue(self, queue: str, **kwargs: Any) -> None:
        arguments = kwargs.get("arguments") or {}
        shards = _argument(arguments, "x-shards", 1, 1024)
        ttl = _argument(arguments, "x-message-ttl", 0, FOR_EVER_MS)
        expires = _argument(arguments, "x-expires", 0, FOR_EVER_MS)
        if kwargs.get("auto_delete"):
            self._auto_delete.add(queue)
        if shards is not None:
            self.session.vhost.queue(queue).shards = shards
        if ttl is not None:
            self._time_to_live[queue] = ttl
        else:
            self._time_to_live.pop(queue, None)
        self.session.declare(queue, expires or None)

    def prepare_queue_arguments(self, arguments: Any, **kwargs: Any) -> Any:
        from kombu.transport.base import to_rabbitmq_queue_arguments

        return to_rabbitmq_queue_arguments(arguments, **kwargs)

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str | None, queue: str) -> None:
        if self.typeof(exchange).type == "fanout":
            self.session.vhost.fanout_queues[queue] = exchange, routing_key or ""
        self.session.vhost.bind(exchange, (routing_key, pattern, queue))

    def queue_unbind(
        self, queue: str, exchange: str | None = None, routing_key: str = "", arguments: Any = None, **kwargs: Any
    ) -> None:
        self.state.binding_delete(queue, exchange, routing_key)
        binding = self.typeof(exchange).prepare_bind(queue, exchange, routing_key, arguments)
        local = self.state.exchanges.get(exchange, {}).get("table", [])
        local[:] = [known for known in local if known != binding]
        self.session.vhost.unbind(queue, exchange or "", binding)

    def queue_delete(self, queue: str, if_unused: bool = False, if_empty: bool = False, **kwargs: Any) -> None:
        if if_empty and self._size(queue):
            return
        if if_unused and self.session.vhost.consumers(queue):
            return
        for exchange, _, _ in self.state.queue_bindings(queue):
            table = self.state.exchanges.get(exchange, {}).get("table", [])
            table[:] = [known for known in table if known[2] != queue]
        self.state.queue_bindings_delete(queue)
        self.session.vhost.fanout_queues.pop(queue, None)
        self._auto_delete.discard(queue)
        self.session.delete(queue)

    @property
    def client(self) -> Any:
        """What kombu's redis transport has. Raises ``AttributeError``."""
        raise AttributeError(
            "a streamtask channel has no Redis client: messages are in no list. How many wait in a queue says "
            "channel.queue_declare(queue, passive=True).message_count; what else there is, 'streamtask status' and redis-py"
        )

    def typeof(self, exchange: str | None, default: str = "direct") -> Any:
        """The type of an exchange. Who only publishes may not have declared it, as Celery does with a ``Broadcast`` queue: then
        its bindings say whether it is a fanout exchange, and it would be lost in the streams of queues that only listen."""
        if exchange and exchange not in self.state.exchanges:
            until, fanout = self._looked.get(exchange, (0.0, False))
            if mono_s() >= until:
                fanout = any(binding[1] == FANOUT for binding in self.session.vhost.table(exchange))
                self._looked = {exchange: (mono_s() + LOOK_S, fanout)}
            if fanout:
                return self.exchange_types["fanout"]
        return super().typeof(exchange, default)

    def get_table(self, exchange: str) -> list[Any]:
        found: list[Any] = self.session.vhost.table(exchange)
        if not found and self.session.vhost.flushed():
            # What this connection has bound is bound again.
            for binding in self.state.exchanges.get(exchange, {}).get("table", []):
                self.session.vhost.bind(exchange, binding)
                found.append(binding)
        return found

    def _has_queue(self, queue: str, **kwargs: Any) -> bool:
        return self.session.vhost.is_declared(queue)

    def _size(self, queue: str) -> int:
        return self.session.vhost.size(queue)

    def _purge(self, queue: str) -> int:
        return self.session.vhost.purge(queue)

    # Publishing

    def prepare_message(
        self,
        body: Any,
        priority: int | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        headers: dict[str, Any] | None = None,
        properties: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        # One dict for all attempts of a publish, so the id stays the same when kombu repeats it.
        fork.check()
        properties = {} if properties is None else properties
        self._give_id(properties)
        message: dict[str, Any] = super().prepare_message(
            body, priority, content_type, content_encoding, headers, properties
        )
        return message

    def _give_id(self, properties: dict[str, Any]) -> None:
        if PRODUCE_ID not in properties:
            page, number = self.session.producer.ids.take()
            properties[PRODUCE_ID] = f"{page} {number}"

    def basic_publish(self, message: dict[str, Any], exchange: str, routing_key: str, **kwargs: Any) -> Any:
        try:
            result = super().basic_publish(message, exchange, routing_key, **kwargs)
        except BaseException as exc:
            keep_id(message)
            if isinstance(exc, InDoubt):
                raise OperationalError(str(exc)) from exc  # which kombu does not try again
            raise
        # It is stored: who publishes these properties again means another message.
        message["properties"].pop(PRODUCE_ID, None)
        return result

    def _inplace_augment_message(self, message: dict[str, Any], exchange: str, routing_key: str) -> None:
        properties = message["properties"]
        self._give_id(properties)
        if self.body_encoding and "body_encoding" not in properties:
            message["body"], properties["body_encoding"] = self.encode_body(message["body"], self.body_encoding)
        properties["delivery_tag"] = self._next_delivery_tag()
        properties["delivery_info"] = {
            **properties.get("delivery_info", {}), "exchange": exchange, "routing_key": routing_key,
        }  # fmt: skip

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        ttl = self._time_to_live.get(queue)
        if ttl is not None:
            message["properties"]["expiration"] = str(min(ttl, int(message["properties"].get("expiration") or ttl)))
        self.session.keep(queue)
        batch: PublishBatch | None = kwargs.get("_publish_batch")
        if batch is not None:
            batch.add(queue, message)
        else:
            self.session.publisher.put(queue, message)

    def _put_fanout(self, exchange: str, message: dict[str, Any], routing_key: str, **kwargs: Any) -> None:
        name = fanout_channel(self.session.options, exchange, routing_key)
        packed = commands.publish(name, encode(message, None))
        self.session.pool.call(name, packed)

    def create_publish_batch(self, max_size: int) -> PublishBatch:
        """For kombu's ``Producer.batch``."""
        return PublishBatch(self.session.publisher, self, max_size)

    # Consuming

    def consumed_queues(self) -> Collection[str]:
        """The queues with streams that this channel consumes."""
        return self._no_ack

    @property
    def _in_poll(self) -> bool:
        """Whether a wait for messages is under way, by the name that kombu's redis transport has for it."""
        return bool(self.poller.waits())

    def room(self) -> int | None:
        """How many more messages this channel may be given; None: as many as there are."""
        if not self.qos.can_consume():
            return 0
        if "can_consume" in vars(self.qos):
            return 1  # whoever has wrapped it (Celery's worker_disable_prefetch) may say no after each message
        room: int | None = self.qos.can_consume_max_estimate()
        return room

    def acknowledges(self, queue: str) -> bool:
        """Whether what it is given of a queue is to be acknowledged."""
        return not self._no_ack.get(queue, False)

    def listens_to(self, queue: str) -> bool:
        return queue in self._receivers and queue not in self._no_ack

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Callable[[Any], Any], consumer_tag: str, **kwargs: Any
    ) -> None:
        self._tag_to_queue[consumer_tag] = queue
        self._active_queues.append(queue)
        self._consumers.add(consumer_tag)

        def receive(payload: dict[str, Any]) -> Any:
            message = self.Message(payload, channel=self)
            if not no_ack:
                self.qos.append(message, message.delivery_tag)
            return callback(message)

        self._receivers[queue] = receive
        self.connection.set_callback(queue, receive)
        self._begin_to_consume(queue, bool(no_ack))

    def _begin_to_consume(self, queue: str, no_ack: bool) -> None:
        fanout = self.session.vhost.fanout_queues.get(queue)
        if fanout is not None:
            self.poller.listener.subscribe(queue, *fanout)
            self.session.listened.add(queue)
        else:
            self._consume(queue, no_ack)
            self._no_ack[queue] = no_ack

    def _consume(self, queue: str, no_ack: bool) -> None:
        if not self.session.uses(queue):
            self.session.drop_expired(queue)
        self.session.consume(queue, self, no_ack=no_ack)

    def basic_cancel(self, consumer_tag: str) -> None:
        if consumer_tag not in self._consumers:
            return
        self._consumers.remove(consumer_tag)
        queue = self._tag_to_queue.pop(consumer_tag)
        self._active_queues.remove(queue)
        if queue in self._active_queues:
            return
        self._receivers.pop(queue, None)
        self.connection.set_callback(queue, None)
        if self._no_ack.pop(queue, None) is not None:
            self._auto_delete.discard(queue)
            self.poller.forget(self, queue)
            self.session.cancel(queue, self)
            self.session.let_go(LET_GO_S)
        else:
            self.poller.listener.unsubscribe(queue)
            self.session.listened.discard(queue)

    def deliver(self, payload: dict[str, Any], tag: str, queue: str) -> None:
        """Gives a message to its consumer."""
        if self._no_ack.get(queue):
            self.session.deliveries.ack(tag)
        self._receivers[queue](payload)

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        session = self.session
        session.receive_orders()
        self.poller.check_epoch()  # who only gets is told, too
        if queue not in self._got and queue not in self._no_ack:
            self._got.add(queue)
            self._consume(queue, no_ack)
        if session.has_to_flush():
            session.flush()
        found = session.fetch(queue, 1)
        if not found or not session.may_be_shown(found[0][1]):
            # Without a loop that looks for it, something else than a message may have come.
            session.look_again(queue)
            return None
        payload, tag = found[0]
        message = self.Message(payload, channel=self)
        if no_ack:
            session.deliveries.ack(tag)
        else:
            self.qos.append(message, tag)
        return message

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        if multiple:
            given = self.qos.given()
            # One that is not known, or was acknowledged before, is an error in AMQP: what it would stand for is not known.
            for tag in given[: given.index(delivery_tag) + 1] if delivery_tag in given else ():
                self.qos.ack(tag)
        else:
            self.qos.ack(delivery_tag)
        self._written()

    def basic_reject(self, delivery_tag: str, requeue: bool = False) -> None:
        self.qos.reject(delivery_tag, requeue=requeue)
        self._written()

    def charge(self, delivery_tag: str) -> bool:
        """The process that worked on a message died of it: True if that was once too often. It is to be rejected then."""
        return self.session.deliveries.charge(delivery_tag)

    def refuse(self, delivery_tag: str, why: str) -> None:
        """A message goes to the dead letters, which say why."""
        self.session.deliveries.reject(delivery_tag, False, why)
        self.qos.ack(delivery_tag)
        self._written()

    def holds_until(self, keyed: bool, delivery_tag: str = "") -> float:
        """The last time (of the epoch) that messages wait for in the hands of who was given them; not the keyed ones."""
        if delivery_tag.startswith(HEARD):
            return float("inf")
        return time() + (0.0 if keyed else self.session.options.eta_hold_s) + NEAR_S

    def put_off(self, delivery_tag: str, due: float) -> bool:
        """Stores a message anew, for a time of the epoch: this delivery has ended. False where it is due already."""
        if not self.session.put_off(delivery_tag, int(due * 1000)):
            return False
        self.qos.ack(delivery_tag)
        self._written()
        return True

    def decode_body(self, body: Any, encoding: Any = None) -> Any:
        return decode_body(body, encoding)

    def receive(self, delivery_tag: str) -> bool:
        """The framework is about to look at a message that it was given; False if it is not to, for it comes again: see
        ``Deliveries.receive``."""
        if self.session.deliveries.receive(delivery_tag):
            return True
        self.qos.ack(delivery_tag)
        return False

    def received(self, delivery_tag: str) -> None:
        self.session.deliveries.received(delivery_tag)

    def basic_recover(self, requeue: bool = False) -> None:
        self.qos.restore_unacked()
        self._written()

    def _written(self) -> None:
        for last in (False, True):
            try:
                self.poller.ended()
                return
            except StreamTaskError as exc:
                if last or not isinstance(exc, BrokerUnavailable):
                    # It is kept, and written as soon as Redis answers.
                    log.warning("an acknowledgement waits: %s", exc)
                    return
                # Once more: the connection may only have been stale, and settling may be repeated.

    def close(self) -> None:
        if self.closed:
            return
        fork.check()
        try:
            self._close()
        except StreamTaskError as exc:
            log.warning("while a channel was closed: %s", exc)
        super().close()
        self._written()

    def _close(self) -> None:
        for tag in list(self._consumers):
            self.basic_cancel(tag)
        # Also without a consumer: a message may have been got.
        if self._qos is not None:
            self._qos.restore_unacked_once()
        for queue in self._got:
            self.session.cancel(queue, self)
        self._got = set()
        if self in self.poller.channels:
            self.poller.channels.remove(self)
        for queue in [queue for queue in self._auto_delete if queue in self.session.vhost.fanout_queues]:
            self.queue_delete(queue)
