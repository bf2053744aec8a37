"""What this process holds of a broker's queues: its leases, what was delivered to it, and what of that has ended.

One session per process and broker, shared by all of its kombu connections: deliveries belong to the process' lease and not
to a channel, so an ack on a closed channel still settles, and a message that is worked on while the connection breaks is
not delivered again. All methods may be called from any thread.

The keeper, a process beside this one, renews the leases, also while a body holds Python's lock, and gives them back at once
when this process dies.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ..clock import mono_s
from ..errors import BrokerUnavailable, LeaseLost, QueueFull, ReplyError, StreamTaskError
from ..queue.backlog import Batch
from ..queue.bells import Rang, Streams
from ..queue.producer import Producer
from ..redis import commands, keys
from ..redis.connection import Broker
from ..redis.keys import SHARED
from ..redis.link import LARGE
from ..redis.links import Admission, Links, Pool
from ..text import logger
from .consumed import Consumed, Fetched
from .consumer import StreamConsumer
from .deliveries import Deliveries
from .fanout import Listener
from .options import Options
from .ownership import Ownership
from .publish import Publisher
from .queues import GROUP
from .resting import is_of_one_key
from .vhost import Touched, VHost

log = logger("streamtask.transport")

UPKEEP_S = 1.0


class Waker(Protocol):
    """Who waits for messages."""

    def wake(self) -> None: ...


class Session:
    """See the module."""

    def __init__(self, broker: Broker, options: Options) -> None:
        self.broker = broker
        self.address = broker.safe_url
        self.options = options
        self.admission = Admission()
        self.pool = Pool(broker, self.admission.asked)
        """For calls that need not wait for the lock."""
        self.links = Links(broker, buffer_bytes=LARGE)
        """To the servers of the streams that are consumed; under the lock."""
        self.producer = Producer(options.producer_settings(), self.pool)
        self.vhost = VHost(options, self.pool, self._is_kept)
        self.publisher = Publisher(self.producer, self.vhost, options, is_cluster=broker.is_cluster)
        self.wakers: weakref.WeakSet[Waker] = weakref.WeakSet()
        """Who may sleep while there is something for them: pollers."""
        self._begin()

    def _begin(self) -> None:
        """Holds nothing yet: at first, and in a forked child, which must neither write on its parent's sockets nor settle
        what was delivered to its parent."""
        self.lock = threading.RLock()
        self.admission.granted = False
        self.consumed: dict[str, Consumed] = {}
        touched = self.vhost.touched
        self.ownership = Ownership(self.broker, self.options, self.links, self.consumed, touched, self._is_lost)
        self.deliveries = Deliveries(self.lock, self.ownership.receives, self._mark)
        self.epoch = getattr(self, "epoch", 0) + 1
        """Grows when leases were lost: what was delivered before is others' now."""
        self.listened: set[str] = set()
        """Queues of fanout exchanges that somebody here listens to."""
        self._upkeep_at = self._renew_at = 0.0

    def after_fork(self) -> None:
        """In the child: begins anew."""
        self.ownership.close()
        self._begin()
        self.vhost.after_fork()

    def look(self) -> None:
        """Looks whether Redis serves. Connections that are kept may be stale, which says nothing about the server: a new
        kombu connection must not find that out. Raises ``BrokerUnavailable``."""
        # By a write of nothing: kombu waits only where it can't connect, and does not where the calls are refused after that.
        name = keys.expiring(self.options.namespace, self.options.app)
        self.pool.call(name, commands.remove_scored(name, ""))
        with self.lock:
            if self.consumed:
                self._outage()

    # Queues

    def declare(self, name: str, expires_ms: int | None) -> None:
        """A channel declares a queue. ``expires_ms``: how long it is kept unused, None for ever."""
        while not self.vhost.declare(name, expires_ms):
            self.drop_expired(name)
        self._declared(name)
        touched = self.vhost.touched.get(name)
        if touched is not None:
            self._upkeep_at = min(self._upkeep_at, touched.again_at)
        for expired in self.vhost.expired():
            self.drop_expired(expired)

    def _declared(self, name: str) -> None:
        consumed = self.consumed.get(name)
        if consumed is not None and consumed.gone:
            consumed.gone = False
            self.wake()

    def keep(self, name: str) -> None:
        """Who has declared a queue with ``x-expires`` uses it by publishing to it, too."""
        touched = self.vhost.touched.get(name)
        if touched is not None and mono_s() >= touched.again_at:
            self.declare(name, touched.expires_ms)

    def delete(self, name: str) -> None:
        """Removes a queue with its messages and bindings."""
        self._remove(name, self.vhost.end(name))

    def drop_expired(self, name: str) -> None:
        """The same of one whose time is over."""
        ended = self.vhost.end(name, if_expired=True)
        if ended:
            log.info("queue %s has expired, unused", name)
            self._remove(name, ended)

    def _remove(self, name: str, ended: int) -> None:
        self._drop_queue(name)
        self.vhost.remove(name, ended)

    def consume(self, name: str, user: Any, *, no_ack: bool = False) -> None:
        """A channel begins to consume a queue. ``no_ack``: it will not acknowledge any."""
        with self.lock, self._guarded(name):
            consumed = self.consumed.get(name) or self._make(name)
            self.consumed[name] = consumed
            consumed.gone = False
            consumed.users[user] = no_ack
            try:
                self._consumed(name)
            except ReplyError as exc:
                self.consumed[name].rest_all(exc)

    def cancel(self, name: str, user: Any) -> None:
        """A channel consumes a queue no longer; what it was given stays its own until it is acknowledged."""
        with self.lock:
            consumed = self.consumed.get(name)
            if consumed is None:
                return
            consumed.users.pop(user, None)
            if not consumed.users:
                self._leave(consumed)

    def _consumed(self, name: str) -> Consumed:
        consumed = self.consumed.get(name)
        if consumed is None:
            consumed = self.consumed[name] = self._make(name)
        if consumed.gone:
            return consumed
        if consumed.no_ack():
            consumed.queue.open(SHARED)
        elif not consumed.streams or not consumed.in_keeper:
            self.ownership.join(consumed)
        return consumed

    def _make(self, name: str) -> Consumed:
        queue, links = self.vhost.queue(name), self.links
        return Consumed(queue, links, self.address, self.deliveries, self.lost, self.ownership.join)

    def _leave(self, consumed: Consumed) -> None:
        """Ends the leases of a queue that nobody here consumes, as far as nothing of it is still worked on."""
        self.ownership.leave(consumed)
        for consumer in consumed.streams.values():
            consumer.give_back_all()
        try:
            self.flush()
        except StreamTaskError as exc:
            log.info("a consumer could not be ended now: %s", exc)
            for consumer in consumed.streams.values():
                if consumer.settler.idle():
                    self.ownership.forget(consumer.lease)  # which runs out

    def _end_idle(self, consumed: Consumed) -> None:
        """Of a queue that nobody here consumes any more: ends the leases of what has been acknowledged."""
        if consumed.in_keeper:
            self.ownership.leave(consumed)  # its channels were never closed
        for priority, consumer in list(consumed.streams.items()):
            if not consumer.settler.idle() or consumer.has_to_flush():
                continue
            self.ownership.end(consumed, priority)
        if not consumed.streams and not consumed.shards:
            self.consumed.pop(consumed.queue.name, None)

    def _drop_queue(self, name: str) -> None:
        """The queue was deleted: what was read of it is no longer there. Who consumes it goes on when it is declared again."""
        with self.lock:
            self.vhost.queues.pop(name, None)
            if not self.uses(name):
                self.vhost.forget_lifetime(name)
            consumed = self.consumed.pop(name, None)
            if consumed is None:
                return
            for consumer in consumed.consumers():
                self.deliveries.forget(consumer)
                if consumer.lease.shared:
                    self.ownership.forget(consumer.lease)
            self.ownership.leave(consumed)
            if consumed.users:
                waiting = self.consumed[name] = self._make(name)
                waiting.users = consumed.users
                waiting.gone = True

    # Errors

    @contextmanager
    def _guarded(self, name: str = "") -> Iterator[None]:
        """What follows from an error of a call: a lost connection may have lost replies, a lost lease (of queue ``name``) all
        deliveries."""
        try:
            with self.admission.asked():
                yield
        except (BrokerUnavailable, QueueFull):
            self._outage()
            raise
        except LeaseLost as exc:
            self._lost_streams(str(exc), name)
            raise
        except ReplyError as exc:
            if exc.code != "NOGROUP":  # a flush, or the queue was deleted
                self._outage()
                raise
            self._lost_streams(f"a stream is gone: {exc}", name)
            raise LeaseLost(f"a stream of {self.broker.safe_url} is gone: {exc}") from None

    def _outage(self) -> None:
        """Replies may have been lost with messages in them."""
        self.links.close()
        for consumed in self.consumed.values():
            consumed.notified = True
            for consumer in consumed.consumers():
                consumer.claimer.connection_lost()

    def _lost_streams(self, why: str, name: str) -> None:
        """The leases of a queue's shared streams ran out, or their records are gone: what was delivered is others'. Begins
        anew, also with other queues that have met the same. Those whose leases are still ours have lost nothing."""
        lost = self._lost_beside(name)
        for consumed in self.consumed.values():
            if consumed.queue.name != name and consumed.queue.name not in lost:
                continue
            for consumer in consumed.streams.values():
                self.deliveries.forget(consumer)
                self.ownership.forget(consumer.lease)
            consumed.streams = {}
            consumed.queue.forget()
        self._say_lost(why)

    def _lost_beside(self, name: str) -> set[str]:
        """The other queues of whose shared streams Redis says that a lease is another's; where it can't be asked, the next use
        tells."""
        asked = [c for one in self.consumed.values() if one.queue.name != name for c in one.streams.values()]
        try:
            answers = self.links.pipeline([(c.keys.stream, c.fence.guard_command) for c in asked])
        except StreamTaskError:
            return set()
        pairs = zip(asked, answers, strict=True)
        return {c.queue for c, answer in pairs if not (isinstance(answer, Exception) or c.fence.owns(answer))}

    def lost(self, consumer: StreamConsumer, why: str) -> None:
        """A call was refused: a stream is another's."""
        if consumer.lease.shared:
            self._lost_streams(why, consumer.queue)
        else:
            self.ownership.lost(consumer)

    def _is_lost(self, consumer: StreamConsumer, why: str | None) -> None:
        """What the keeper tells of a stream; see ``Ownership``."""
        if consumer.lease.shared:
            self._lost_streams(why or "", consumer.queue)
            return
        self.deliveries.forget(consumer)
        if why is not None:
            self._say_lost(why)

    def _say_lost(self, why: str) -> None:
        self.epoch += 1
        self.wake()
        log.error("messages that were delivered to this process are others' now: %s", why)

    def receive_orders(self) -> None:
        """Does what the keeper has told."""
        with self.lock:
            told = self.ownership.receive_orders()
            if told is None:
                return
            if told.going:
                for consumer in told.going:
                    self.deliveries.withdraw(consumer)
                self.ownership.end_releases()
            if told.came:
                self.wake()

    # Fetching messages

    def fetch(self, name: str, most: int) -> list[Fetched]:
        """Up to ``most`` messages of a queue. Raises ``BrokerUnavailable``, ``LeaseLost``."""
        with self.lock, self._guarded(name):
            known = self.consumed.get(name)
            if known is not None and known.rest:
                return []
            try:
                found = self._consumed(name).fetch(most)
                self.admission.granted |= bool(found)
                return found
            except ReplyError as exc:
                self.consumed[name].rest_all(exc)
                return []

    def look_again(self, name: str) -> None:
        """The next fetch asks Redis, whatever is known here."""
        consumed = self.consumed.get(name)
        if consumed is not None:
            consumed.notified = True

    def ready(self, name: str) -> bool:
        """Whether there may be something to fetch of a queue."""
        consumed = self.consumed.get(name)
        return consumed is None or consumed.ready()

    def next_wake(self, names: Iterable[str]) -> float | None:
        """When (monotonic) the next message of these queues falls due, as far as is known here, or ``upkeep`` is due."""
        with self.lock:
            found = [self.consumed[name] for name in names if name in self.consumed]
            times = [at for consumed in found for at in consumed.due_times()]
            times += [touched.again_at for _, touched in self._touched_here()]
            if self.ownership.starting:
                times.append(self._renew_at)
            return min(times, default=None)

    def uses(self, name: str) -> bool:
        """Whether a channel of this process consumes a queue."""
        consumed = self.consumed.get(name)
        return (consumed is not None and bool(consumed.users)) or name in self.listened

    def listen(self) -> Listener:
        """For the fanout exchanges that one kombu connection listens to."""
        return Listener(self.broker, self.options, self.admission, self.deliveries.new_tag)

    def orders_fd(self) -> int:
        """The socket that the keeper's orders come by, -1 without a keeper."""
        return self.ownership.fileno()

    def orders_stamp(self) -> object:
        """Tells it from a later one of its number."""
        return self.ownership.stamp()

    def _is_kept(self, name: str) -> bool:
        """Whether what is known of a queue is not to be forgotten: something of it is held here, or heard."""
        return name in self.consumed or name in self.listened

    def bell(self, names: Iterable[str]) -> Streams:
        """The streams to wait for, as {key: (queue, id after which something is new)}."""
        with self.lock:
            found = [(name, self.consumed[name]) for name in names if name in self.consumed]
            return {key: (name, at) for name, consumed in found for key, at in consumed.bell().items()}

    def rang(self, rang: Rang) -> None:
        """A bell has rung. Where Redis refused to wait for its streams, one of them is to blame: its own call tells which."""
        with self.lock:
            if rang.news is None:
                for name in {name for name, _ in rang.asked.values()}:
                    consumed = self.consumed.get(name)
                    if consumed is not None:
                        consumed.notified = True
                        for shard in consumed.shards.values():
                            shard.read_at, shard.woken = 0.0, True
                return
            self.admission.granted = True
            for key, entries in rang.news:
                consumed = self.consumed.get(rang.asked.get(bytes(key), ("", ""))[0])
                if consumed is not None:
                    consumed.rang(bytes(key), entries[-1][0])

    # What was handed out

    def may_be_shown(self, tag: str) -> bool:
        """Whether a message that was fetched may go to its consumer now: of a shard, if the keeper vouches for it, or if Redis
        says that it is still this process'. If not, it goes back, or is another's. Raises ``StreamTaskError``
        where Redis does not say."""
        handed = self.deliveries.handed.get(tag)
        if handed is None or handed.consumer.lease.shared:
            return True  # such a one keeps no order, or it was fetched for good
        consumer = handed.consumer
        if not consumer.backlog.closing:
            if mono_s() < self.ownership.trusted_until(consumer):
                return True
            try:
                if self.says_owned(consumer.lease.key, consumer.lease.token):
                    return True
            except BaseException:
                self.deliveries.reject(tag, requeue=True)
                raise
            with self.lock:
                self.lost(consumer, "")
        self.deliveries.reject(tag, requeue=True)
        return False

    def give_back(self, tag: str) -> bool:
        """A message is to be delivered again; False where it is another's, or was fetched for good."""
        return self.deliveries.reject(tag, requeue=True)

    def trusted_until(self, tag: str) -> float:
        """Until when (monotonic) a body of a shard may start though Redis can't be asked; takes no lock."""
        handed = self.deliveries.handed.get(tag)
        return 0.0 if handed is None else self.ownership.trusted_until(handed.consumer)

    def start(self, tag: str, hold: bool, here: bool) -> bool:
        """See ``Deliveries.start``."""
        self._stand_in()  # bodies may follow each other in the thread that does so else
        return self.deliveries.start(tag, hold, here)

    def shutting_down(self) -> None:
        """The process was told to end. May be called from any thread."""
        self.deliveries.shutting_down()
        try:
            self.flush()
        except StreamTaskError as exc:
            log.info("bodies that run may be counted as crashes: %s", exc)

    def put_off(self, tag: str, due_ms: int) -> bool:
        """A message is to wait for a time of its own, which is not for its key to wait for: it is stored once more, among the
        delayed ones, and this delivery has ended. False where it is due by Redis' clock, as it is for who was delivered when it
        was due. Raises ``StreamTaskError``."""
        with self.lock:
            handed = self.deliveries.handed.get(tag)
            if handed is None:
                return False
            consumer, delivery = handed.consumer, handed.batch.deliveries[0]
            # A retry in the place of its entry has waited there.
            if consumer.generation(delivery.entry_id) or due_ms <= consumer.backlog.redis_ms():
                return False
        self.publisher.put_off(consumer.queue, consumer.shard, delivery, due_ms)
        return self.deliveries.ack(tag) or True

    def _mark(self, consumer: StreamConsumer, batch: Batch) -> bool:
        """Writes down that the body of a message that comes again starts here: it may be what has ended the process before.
        False if the message is another's."""
        try:
            self.flush()  # what ended before it must not be counted with it
            with self._guarded():
                try:
                    consumer.mark(batch)
                except LeaseLost as exc:
                    self.lost(consumer, str(exc))
                    return False
                except ReplyError as exc:
                    if not is_of_one_key(exc):
                        raise
                    consumed = self.consumed.get(consumer.queue)
                    if consumed is not None:
                        consumed.rest_stream(consumer, exc)
        except StreamTaskError as exc:
            log.info("the start of a body was not written down: %s", exc)
        return True

    # What has ended

    def still_owned(self, delivery: dict[str, Any]) -> bool:
        """Whether Redis says that the shard of a keyed delivery is still its receiver's. False where Redis can't be asked: this
        is for those that the keeper does not vouch for (any more)."""
        names = self.vhost.queue(delivery["queue"]).keys.shard(delivery["epoch"], delivery["shard"])
        lease = names.lease(GROUP)
        try:
            return self.says_owned(lease, delivery["token"])
        except StreamTaskError as exc:
            log.info("who owns a shard can't be asked: %s", exc)
            return False

    def says_owned(self, lease: str, token: int) -> bool:
        """Whether Redis says that nobody has taken a lease over since. Raises ``StreamTaskError`` where it does not say."""
        found = self.pool.call(lease, commands.field(lease, "token"))
        return found is None or int(found) == token

    def has_to_flush(self) -> bool:
        return any(c.has_to_flush() for consumed in self.consumed.values() for c in consumed.consumers())

    def flush(self) -> None:
        """Writes what has ended. Raises ``BrokerUnavailable``: then it is written later."""
        with self.lock, self._guarded():
            self.receive_orders()
            for consumed in list(self.consumed.values()):
                for consumer in list(consumed.consumers()):
                    if consumer.has_to_flush():
                        self._flush(consumed, consumer)
            self.ownership.end_releases()
            for consumed in list(self.consumed.values()):
                if not consumed.users:
                    self._end_idle(consumed)

    def _flush(self, consumed: Consumed, consumer: StreamConsumer) -> None:
        try:
            consumer.flush()
        except (LeaseLost, ReplyError) as exc:
            if isinstance(exc, ReplyError) and is_of_one_key(exc):
                consumed.rest_stream(consumer, exc)
                return
            if isinstance(exc, ReplyError) and exc.code != "NOGROUP":
                raise
            self.lost(consumer, str(exc))
        if consumer.backlog.lanes.has_ready() or consumer.backlog.lanes.next_due() is not None:
            consumed.notified = True

    # Upkeep

    def upkeep(self) -> None:
        """What is to be done from time to time: to be called often, costs next to nothing."""
        self._stand_in()
        now = mono_s()
        if now < self._upkeep_at:
            return
        self._upkeep_at = now + UPKEEP_S
        with self.lock:
            self.ownership.restart_keeper()
            self.deliveries.look_after_outlived()
            gone = [name for name, consumed in self.consumed.items() if consumed.gone]
        for name in gone:
            if self.vhost.is_declared(name):
                self._declared(name)
        for name, touched in self._touched_here():
            if now >= touched.again_at:
                touched.put_off(now)
                self.vhost.touch(name, touched.expires_ms)
            self._upkeep_at = min(self._upkeep_at, touched.again_at)

    def _stand_in(self) -> None:
        """Renews the leases while the keeper is not there: on a busy machine its start takes longer than a lease lasts. To be
        called often."""
        if not self.ownership.starting or mono_s() < self._renew_at:
            return
        try:
            with self.lock, self._guarded():
                self._renew_at = mono_s() + self.options.lease_ms / 3000
                leases = [c.lease for consumed in self.consumed.values() for c in consumed.consumers()]
                self.links.pipeline([(lease.key, lease.pack_renew()) for lease in leases])
        except StreamTaskError as exc:
            log.info("leases are not renewed before the keeper is there: %s", exc)

    def _touched_here(self) -> list[tuple[str, Touched]]:
        """Queues that this process uses, and that would expire else. The keeper does not know all of them."""
        return [(name, touched) for name, touched in list(self.vhost.touched.items()) if self.uses(name)]

    def wake(self) -> None:
        for waker in list(self.wakers):
            waker.wake()

    def let_go(self, most_s: float) -> None:
        """Waits a moment for the keeper to take back the shards of queues that nobody consumes any more."""
        until = mono_s() + most_s
        while mono_s() < until:
            with self.lock:
                if not any(
                    not consumer.backlog.handed
                    for consumed in self.consumed.values()
                    if not consumed.users
                    for consumer in consumed.shards.values()
                ):
                    return
            try:
                self.flush()
            except StreamTaskError:
                return
            time.sleep(0.005)

    def close_if_idle(self) -> None:
        """Ends the keeper of a process that consumes nothing more."""
        with self.lock:
            if not self.consumed:
                self.ownership.close()


__all__ = ["Session"]
