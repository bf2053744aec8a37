"""Brings the messages of one kombu connection to its channels, in kombu's event loop or in ``drain_events``.

A *bell* wakes it (``queue/bells.py``), which brings no message itself. Fetching and settling are short calls of its source.
"""

from __future__ import annotations

import inspect
import select
import socket
import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from .. import fork
from ..clock import mono_s
from ..errors import BrokerUnavailable, LeaseLost
from ..queue.bells import BLOCK_S, Bells, Rang, Streams
from ..redis.connection import Broker
from ..redis.links import IDLE_S, Admission
from ..text import logger
from . import hooks
from .fanout import Listener

log = logger("streamtask.transport")

READ_ON_S = 2.0
"""How long an error waits at most for the rest of a message that a pool process is sending."""

ONE_WAITS_FOR_ALL = hasattr(select, "poll")
"""Whether several may wait for one socket, as all connections of a process do for its keeper's. Not with eventlet, which
takes ``poll`` away: there they look, ``LOOK_S`` apart."""

LOOK_S = 0.2
WRITE_S = 0.005
"""Longest time for which what has ended waits to be written, while messages are being delivered."""

REST_S = 0.005
"""A message that comes so long after the last one came alone."""

TURNS = 10
"""Fetches in one tick at most: others wait for the loop, too."""

MOST = 100
"""Messages that one fetch brings where there is no prefetch limit, in the event loop."""


def readable(fds: Iterable[int], timeout_s: float) -> list[int]:
    """Which of these can be read from, after at most so long. With gevent and eventlet others run meanwhile."""
    if ONE_WAITS_FOR_ALL:
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLIN)
        return [fd for fd, _ in poll.poll(max(0, int(timeout_s * 1000 + 0.999)))]
    return select.select(list(fds), [], [], timeout_s)[0]


class Source(Protocol):
    """Where messages come from, and what has ended is written: the session of this process."""

    epoch: int
    """Grows when messages that were delivered have become others'."""
    admission: Admission

    def upkeep(self) -> None: ...
    def listen(self) -> Listener: ...

    def ready(self, name: str) -> bool: ...
    def fetch(self, name: str, most: int) -> list[tuple[dict[str, Any], str]]: ...
    def may_be_shown(self, tag: str) -> bool: ...
    def give_back(self, tag: str) -> bool: ...
    def has_to_flush(self) -> bool: ...
    def flush(self) -> None: ...

    def bell(self, names: Iterable[str]) -> Streams: ...
    def rang(self, rang: Rang) -> None: ...
    def next_wake(self, names: Iterable[str]) -> float | None: ...
    def orders_fd(self) -> int: ...
    def orders_stamp(self) -> object: ...
    def receive_orders(self) -> None: ...


class Receiver(Protocol):
    """A channel, to which messages are delivered."""

    def after_fork(self) -> None: ...
    def consume_again(self) -> None: ...
    def consumed_queues(self) -> Collection[str]: ...
    def listens_to(self, queue: str) -> bool: ...
    def acknowledges(self, queue: str) -> bool: ...
    def room(self) -> int | None: ...
    def deliver(self, payload: dict[str, Any], tag: str, queue: str) -> None: ...


Fetched = tuple[Receiver, str, dict[str, Any], str]
"""A message on its way to a channel: the channel, the queue, the message, its delivery tag."""


class Poller:
    """See the module."""

    def __init__(self, source: Source, broker: Broker, queue_order: str) -> None:
        self._source = source
        self._broker = broker
        self._queue_order = queue_order
        self.channels: list[Receiver] = []
        self.closed = False
        self._begin()
        fork.in_child(fork.Turn.POLLERS, self._after_fork)

    def _begin(self) -> None:
        """Waits for nothing yet: at first, and in a forked child, whose parent goes on with its sockets."""
        self.listener = self._source.listen()
        self.loop: Any = None
        self._inherited = False  # its channels have consumers that the source does not know of
        self._thread = 0
        self._bells = Bells(self._broker, self._dropped)
        self._waiting: deque[Fetched] = deque()  # for ``drain``, which delivers one a call
        self._epoch = self._source.epoch
        self._checked_at = mono_s()
        self._turn = 0
        self._fds: dict[int, object] = {}
        self._wakers: tuple[socket.socket, socket.socket] | None = None  # made when somebody waits: most only publish
        self._asleep = False
        self._soon = False  # the loop was asked to pump
        self._delivered = False  # something was delivered since the last wait of the loop began
        self._delivered_at = 0.0
        self._put_off = False  # the bell was not armed at the last turn
        self._failed: Exception | None = None
        self._broken = False  # an error has ended the loop: a new connection comes, and nothing is taken over this one

    def _after_fork(self) -> None:
        """In the child: closes its copies of the sockets. While they are open, the parent's epoll goes on to report those that
        the parent has closed, and the number of such a one may be another's by then."""
        self.listener.close()
        self._bells.close()
        for end in self._wakers or ():
            end.close()
        self._begin()
        self._inherited = True
        for channel in self.channels:
            channel.after_fork()

    def wake(self) -> None:
        """Ends the current wait; from any thread."""
        if self._wakers is not None:
            try:
                self._wakers[1].send(b".")
            except OSError:
                pass  # it is awake already, or closed

    def _wake_fd(self) -> int:
        if self._wakers is None:
            self._wakers = socket.socketpair()
            for end in self._wakers:
                end.setblocking(False)
        return self._wakers[0].fileno()

    # What to fetch

    def _wanted(self) -> list[tuple[Receiver, str]]:
        """Channel and queue of all that may be given messages now, each queue in its turn."""
        pairs = [
            (channel, queue)
            for channel in self.channels
            if self._room(channel) > 0
            for queue in channel.consumed_queues()
        ]
        order = self._queue_order
        if order == "sorted":
            pairs.sort(key=lambda pair: pair[1])
        elif order == "round_robin" and len(pairs) > 1:
            self._turn += 1
            at = self._turn % len(pairs)
            pairs = pairs[at:] + pairs[:at]
        return pairs

    def _room(self, channel: Receiver) -> int:
        """How many messages a channel may be given. Without a prefetch limit: many in the event loop; elsewhere one at a
        time, for what lies here can't be fetched by another process."""
        room = channel.room()
        if room is None:
            room = 1 if self.loop is None else MOST
        if self._waiting:
            room -= sum(1 for item in self._waiting if item[0] is channel)
        return room

    def _check(self) -> None:
        self._source.upkeep()
        if self._inherited:
            for channel in self.channels:
                channel.consume_again()
            self._inherited = False
        self.check_epoch()
        # Who did not look for a while has to look before judging.
        if self.listener.overdue() and not self._look(self.listener.fileno()):
            self.listener.fail()
        now = mono_s()
        rested = now - self._checked_at > BLOCK_S + self._broker.timeout_s + IDLE_S
        self._checked_at = now
        for bell in self._bells.overdue():
            try:
                if self._look(bell.link.fileno()):
                    continue
                self._bells.forget(bell)
                raise BrokerUnavailable(f"Redis at {self._broker.safe_url} does not answer")
            except BrokerUnavailable:
                # Where nobody has looked for so long, its end says nothing of now: another is armed, and tells.
                if not rested:
                    raise

    def check_epoch(self) -> None:
        """Raises ``LeaseLost``, once, where messages that were delivered to this process have become others'."""
        if self._source.epoch != self._epoch:
            self._epoch = self._source.epoch
            self._give_back()
            raise LeaseLost("messages that were delivered to this process are others' now; it begins anew")

    def _give_back(self) -> None:
        """What waits here goes back, as far as it is still this process'; what was fetched for good is delivered yet."""
        waiting, self._waiting = self._waiting, deque()
        for item in waiting:
            if not self._source.give_back(item[3]) and not item[0].acknowledges(item[1]):
                self._waiting.append(item)

    def _look(self, fd: int) -> bool:
        """Reads from a socket if there is something to read."""
        if fd < 0 or not readable([fd], 0.0):
            return False
        self._receive(fd)
        return True

    def waits(self) -> bool:
        return bool(self._bells.armed())

    def _fetch(self) -> Iterator[Fetched]:
        """Fetches for all queues with room; what is not taken from this iterator goes back."""
        source = self._source
        for channel, queue in self._wanted():
            while source.ready(queue):
                room = self._room(channel)
                if not channel.acknowledges(queue):
                    # What is fetched for good would be gone with its consumer: no more than is delivered at once.
                    room = min(room, 1 - sum(not waiting[0].acknowledges(waiting[1]) for waiting in self._waiting))
                if room <= 0:
                    break
                found = deque(source.fetch(queue, room))
                if not found:
                    break
                try:
                    while found:
                        payload, tag = found.popleft()
                        yield channel, queue, payload, tag
                finally:
                    for _, tag in found:
                        source.give_back(tag)
                if self.loop is not None and channel.room() is None:
                    break  # without a limit all that there is would come before others have their turn

    def deliver(self, channel: Receiver, queue: str, payload: dict[str, Any], tag: str) -> bool:
        """False where a message goes back instead, or is another's. Time may have gone by since it was fetched."""
        source = self._source
        if source.epoch != self._epoch and (source.give_back(tag) or channel.acknowledges(queue)):
            self.check_epoch()
        if not source.may_be_shown(tag):
            return False
        if queue not in channel.consumed_queues():
            # It was cancelled meanwhile.
            channel = next((other for other in self.channels if queue in other.consumed_queues()), channel)
        if queue not in channel.consumed_queues():
            source.give_back(tag)
            return False
        channel.deliver(payload, tag, queue)
        return True

    def _deliver_fanout(self, most: int) -> int:
        count = 0
        while count < most:
            found = self.listener.pop()
            if found is None:
                break
            queue, payload = found
            count += 1
            for channel in self.channels:
                if channel.listens_to(queue):
                    channel.deliver(payload, payload["properties"]["delivery_tag"], queue)
        return count

    # Waiting

    def _arm(self) -> None:
        """Sees to it that a bell waits for whatever may be fetched now."""
        names = dict.fromkeys(queue for _, queue in self._wanted())
        if not names:
            return
        wanted = self._source.bell(names)
        due = self._source.next_wake(names)
        block_s = BLOCK_S if due is None else min(BLOCK_S, max(0.001, due - mono_s()))
        self._bells.arm(wanted, block_s)

    def _dropped(self, fd: int) -> None:
        """A bell's socket is about to be closed."""
        if self.loop is not None and self._fds.pop(fd, None) is not None:
            self.loop.remove_reader(fd)

    def _sockets(self) -> dict[int, object]:
        """The sockets to wait for, each with what tells it from a later one of its number."""
        found: dict[int, object] = {
            bell.link.fileno(): (id(bell.link), bell.link.connects) for bell in self._bells.armed()
        }
        found[self.listener.fileno()] = self.listener.stamp
        if ONE_WAITS_FOR_ALL:
            found[self._source.orders_fd()] = self._source.orders_stamp()
        found[self._wake_fd()] = id(self._wakers)
        found.pop(-1, None)
        return found

    def _receive(self, fd: int) -> None:
        """Reads from a socket that is readable."""
        if self._wakers is not None and fd == self._wakers[0].fileno():
            try:
                while self._wakers[0].recv(4096):
                    pass
            except OSError:
                pass
        elif fd == self.listener.fileno():
            self.listener.receive()
        elif fd == self._source.orders_fd():
            self._source.receive_orders()
        else:
            with self._source.admission.asked():
                rang = self._bells.receive(fd)
            if rang is not None:
                self._source.rang(rang)

    # kombu's event loop

    def register(self, loop: Any) -> None:
        self.loop = loop
        loop.on_tick.add(self.tick)

    def tick(self) -> None:
        """Before each wait of the loop."""
        fork.check()
        if self.closed or self._broken or self.loop is None:
            return
        self._thread = threading.get_ident()
        with self._failing():
            if self._failed is not None:
                failed, self._failed = self._failed, None
                raise failed
            self._check()
            before, self._delivered = self._delivered, False
            self._pump()
            at_rest = self._was_at_rest() if before or self._delivered else False
            if self._delivered or at_rest:
                # Others that are called before each wait (a pool that has something to write now) may have had their turn.
                self._wake_fd()
                self.wake()
            self._delivered = False
            # A pool writes to its processes after this wait: a message that comes alone shall not wait for the bell.
            self._put_off = at_rest and not self._put_off
            if not self._put_off:
                self._arm()
            if self.loop is not None:
                self._watch()

    def _was_at_rest(self) -> bool:
        """Whether what was delivered just now came alone."""
        now = mono_s()
        before, self._delivered_at = self._delivered_at, now
        return now - before > REST_S

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Before an error ends the loop: what it has read of a message in part is read to its end, for the loop forgets it,
        and the rest could not be understood any more."""
        try:
            yield
        except Exception:
            self._broken = True
            loop = self.loop
            for fd, (reader, *_) in list(loop.readers.items()) if loop is not None else ():
                until = mono_s() + READ_ON_S
                try:
                    while inspect.isgenerator(reader) and mono_s() < until:
                        if readable([fd], 0.1):
                            next(reader)
                except (StopIteration, OSError):
                    pass
            for hook in hooks.before_failure:
                hook()
            raise

    def _pump(self) -> None:
        """Delivers what there is, and writes what has ended."""
        count = self._deliver_fanout(1000)
        for _ in range(TURNS):
            written_at = mono_s()
            for item in self._fetch():
                count += self.deliver(*item)
                # A pool that runs bodies in this very thread takes its time.
                if mono_s() > written_at + WRITE_S and self._source.has_to_flush():
                    self._source.flush()
                    written_at = mono_s()
            if not self._source.has_to_flush():
                break
            self._source.flush()  # which may open lanes
        self._delivered |= count > 0

    def _pump_soon(self) -> None:
        """At the begin of the loop's next turn, before anything waits: a message was acknowledged, so there is room."""
        self._soon = False
        # kombu calls this also when it cleans up after an error: what came now would be run, and given back.
        if self.closed or self._broken or self.loop is None:
            return
        try:
            self._check()
            self._pump()
        except Exception as exc:
            self._failed = exc  # for the tick that follows: from there it reaches whoever runs the loop

    def _watch(self) -> None:
        """Tells the loop which sockets to look at. A closed socket's number may have come back as another's."""
        wanted = self._sockets()
        for fd in self._fds.keys() - wanted.keys():
            self.loop.remove_reader(fd)
        for fd, stamp in wanted.items():
            if self._fds.get(fd) != stamp:
                self.loop.add_reader(fd, self._readable, fd)
        self._fds = wanted

    def _readable(self, fd: int) -> None:
        with self._failing():
            try:
                if not self._look(fd):
                    return  # it is said of a socket that had the number before, and that a child has still open
            except BaseException:
                # It is closed: its number may soon be another's.
                if self._fds.pop(fd, None) is not None and self.loop is not None:
                    self.loop.remove_reader(fd)
                raise
            self._pump()

    # drain_events

    def drain(self, timeout: float | None) -> None:
        """Delivers one message. Raises ``socket.timeout``."""
        deadline = None if timeout is None else mono_s() + timeout
        fork.check()
        while True:
            self._source.receive_orders()
            self._check()
            if self._deliver_fanout(1) or self.listener.confirmed():
                if self._source.has_to_flush():
                    self._source.flush()
                return
            if not self._waiting:
                # The room counts what lies here already, so this must grow one by one.
                for item in self._fetch():
                    if item[0].acknowledges(item[1]):
                        self._waiting.append(item)
                    else:
                        self._waiting.appendleft(item)
            if self._waiting:
                if self.deliver(*self._waiting.popleft()):
                    return
                continue
            if self._source.has_to_flush():
                self._source.flush()
                continue
            left = None if deadline is None else deadline - mono_s()
            if left is not None and left <= 0:
                raise TimeoutError("timed out")
            self._arm()
            self._wait(min(BLOCK_S, left if left is not None else BLOCK_S))

    def _wait(self, timeout_s: float) -> None:
        fds = self._sockets()
        due = self._source.next_wake(dict.fromkeys(queue for _, queue in self._wanted()))
        if due is not None:
            timeout_s = min(timeout_s, max(0.0, due - mono_s()))
        if not ONE_WAITS_FOR_ALL:
            timeout_s = min(timeout_s, LOOK_S)
        self._asleep = True
        try:
            ready = readable(fds, timeout_s)
        finally:
            self._asleep = False
        for fd in ready:
            self._receive(fd)

    # Channels

    def ended(self) -> None:
        """A message was acknowledged or rejected: in the event loop the next tick writes it, elsewhere it is written now,
        by whoever waits for messages or by the caller."""
        if self.loop is not None and not self.closed and any(channel.consumed_queues() for channel in self.channels):
            if threading.get_ident() != self._thread:
                self.wake()
            elif not self._soon:
                self._soon = True
                self.loop.call_soon(self._pump_soon)
            return
        if self._asleep:
            self.wake()  # who waits there writes it, together with what others have ended
        else:
            self._source.flush()

    def forget(self, channel: Receiver, queue: str) -> None:
        """A channel consumes a queue no longer: what waits for it here goes back."""
        waiting, self._waiting = self._waiting, deque()
        for item in waiting:
            if item[0] is channel and item[1] == queue:
                self._source.give_back(item[3])
            else:
                self._waiting.append(item)
        if self._broker.is_cluster:
            # One for each slot: that of this queue may never be waited for again, and the others are made again.
            self._bells.forget_all()

    def close(self) -> None:
        fork.check()
        if self.closed:
            return
        self.closed = True
        self._give_back()
        if self.loop is not None:
            self.loop.on_tick.discard(self.tick)
            for fd in self._fds:
                self.loop.remove_reader(fd)
        self._bells.close()
        self.listener.close()
        if self._wakers is not None:
            for end in self._wakers:
                end.close()
            self._wakers = None
