"""What was handed to this process' channels and has not ended, by delivery tag: it outlives them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..clock import mono_s
from ..errors import LeaseLost, ReplyError, StreamTaskError
from ..queue.delivery import Batch
from ..text import logger
from . import hooks, publish
from .consumer import StreamConsumer
from .resting import is_of_one_key

if TYPE_CHECKING:
    from .session import Session

log = logger("streamtask.transport")

SUSPECT_S = 0.02
"""How often it is looked whether a message may start that waits for another one."""

HOLD_S = 0.1
"""The same of one that waits to be received: it is handed out anew each time."""


@dataclass(slots=True)
class Handed:
    """A delivery that was handed to a channel."""

    tag: str
    consumer: StreamConsumer
    batch: Batch
    entered: bool = False
    """Its body has begun, or a process of a pool has been given it."""
    started: bool = False
    """Its body has begun in this process: it waits for its end, also without its channel."""
    marked: bool = False
    """Its start was written down, or its receipt."""
    ran_here: bool = False
    """Its body has begun in this process, or has been told to."""

    def is_suspect(self) -> bool:
        """Whether it ran so often when its process died that it has to be told from those beside it."""
        return self.consumer.is_suspect(self.batch.deliveries[0])


class Deliveries:
    """See the module. The session's lock guards it, and is taken by what is called from without."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._handed: dict[str, Handed] = {}
        self._outlived: dict[str, bool] = {}
        """Those whose channel was closed while they were worked on; True: at the last look they no longer were."""
        self._ending = False
        self._receiving = ""  # the tag of the message that is being received

    def add(self, tag: str, consumer: StreamConsumer, batch: Batch) -> None:
        self._handed[tag] = Handed(tag, consumer, batch)

    def __getitem__(self, tag: str) -> Handed:
        return self._handed[tag]

    def trusted_until(self, tag: str) -> float:
        """Until when (monotonic) a body of a shard may start though Redis can't be asked; takes no lock."""
        handed = self._handed.get(tag)
        return 0.0 if handed is None else self._session.ownership.trusted_until(handed.consumer)

    def may_be_shown(self, tag: str) -> bool:
        """Whether a message that was fetched may go to its consumer now: of a shard, if the keeper vouches for it, or if Redis
        says that it is still this process'. If not, it goes back, or is another's. Raises ``StreamTaskError``
        where Redis does not say."""
        handed = self._handed.get(tag)
        if handed is None or handed.consumer.lease.shared:
            return True  # such a one keeps no order, or it was taken for good
        session, consumer = self._session, handed.consumer
        if not consumer.closing:
            if mono_s() < session.ownership.trusted_until(consumer):
                return True
            try:
                if session.says_owned(consumer.lease.key, consumer.lease.token):
                    return True
            except BaseException:
                self.reject(tag, requeue=True)
                raise
            with session.lock:
                session.lost(consumer, "")
        self.reject(tag, requeue=True)
        return False

    def ack(self, tag: str) -> bool:
        """A message has ended; False where this process does not hold it (any more)."""
        with self._session.lock:
            handed = self._handed.pop(tag, None)
            if handed is None:
                return False
            handed.consumer.end(handed.batch)
            return True

    def reject(self, tag: str, requeue: bool, why: str = "") -> bool:
        """A message is to be delivered again, or goes to the dead letters. False as ``ack``."""
        with self._session.lock:
            handed = self._handed.pop(tag, None)
            if handed is None:
                return False
            if requeue:
                handed.consumer.give_back(handed.batch)
            else:
                handed.consumer.reject(handed.batch, why)
            return True

    def charge(self, tag: str) -> bool:
        """A message took its process down; True if that was once too often."""
        with self._session.lock:
            handed = self._handed.get(tag)
            return handed is not None and handed.consumer.charge(handed.batch)

    def put_off(self, tag: str, due_ms: int) -> bool:
        """A message is to wait for a time of its own, which is not for its key to wait for: it is stored once more, among the
        delayed ones, and this delivery has ended. False where it is due by Redis' clock, as it is for who was delivered when it
        was due. Raises ``StreamTaskError``."""
        with self._session.lock:
            handed = self._handed.get(tag)
            if handed is None:
                return False
            consumer, delivery = handed.consumer, handed.batch.deliveries[0]
            # A retry in the place of its entry has waited there.
            if consumer.generation(delivery.entry_id) or due_ms <= consumer.redis_ms():
                return False
        publish.put_off(self._session, consumer.queue, consumer.shard, delivery, due_ms)
        return self.ack(tag) or True

    def receive(self, tag: str) -> bool:
        """The framework is about to look at a message, before any body: if the process dies of that, this message is charged,
        by the keeper; and where one comes again also by whoever has it next, for the keeper may die with its process. False
        where it is not to look now: a suspect waits for the end of all bodies that would be charged with it, and is delivered
        again then."""
        with self._session.lock:
            handed = self._handed.get(tag)
            if handed is None or self._ending:
                return True
            if handed.is_suspect() and any(other.marked for other in self._handed.values()):
                del self._handed[tag]
                handed.consumer.put_off(handed.batch, HOLD_S)
                return False
            self._receiving = tag
            delivery = handed.batch.deliveries[0]
            self._session.ownership.receives(handed.consumer.lease, delivery.entry_id)
            if not delivery.fresh:
                self._mark(handed)
            return True

    def received(self, tag: str) -> None:
        """It has: what follows is not counted so."""
        if self._receiving != tag:
            return
        with self._session.lock:
            self._end_receipt()
            handed = self._handed.get(tag)
            if handed is not None and handed.marked and not handed.ran_here:
                handed.marked = False
                handed.consumer.unmark(handed.batch)

    def _end_receipt(self) -> None:
        self._receiving = ""
        self._session.ownership.received()

    def restore(self, tags: Iterable[str]) -> None:
        """A channel closes: what it was given and has not acknowledged is delivered again, but for what is worked on."""
        with self._session.lock:
            left = [tag for tag in tags if tag in self._handed]
            kept = {tag for tag in left if self._handed[tag].started}
            for ask in hooks.keep_on_close:
                kept.update(ask(left))
            self._outlived.update(dict.fromkeys(kept.intersection(left), False))
            for tag in left:
                handed = None if tag in kept else self._handed.pop(tag, None)  # the asking may have acknowledged it
                if handed is not None:
                    handed.consumer.give_back(handed.batch)

    def withdraw(self, consumer: StreamConsumer | None = None) -> None:
        """A shard, or all, are to go to other processes: what was handed out and has not begun goes with them."""
        with self._session.lock:
            tags = [
                tag
                for tag, handed in self._handed.items()
                if not handed.entered and not handed.consumer.lease.shared and consumer in (None, handed.consumer)
            ]
            waiting = {tag for ask in hooks.not_begun for tag in ask(tags)} if tags else ()
            for tag in waiting:
                handed = self._handed.pop(tag)
                handed.consumer.give_back(handed.batch)

    def start(self, tag: str, hold: bool, here: bool) -> bool:
        """A body starts, or a pool gets it: False if its message was given back before. ``hold``: closing its channel does not
        give it back any more. ``here``: it starts in this process."""
        self._session.stand_in()  # bodies may follow each other in the thread that does so else
        while True:
            # Under the lock: not between the look at what is worked on and the giving back of the rest.
            with self._session.lock:
                handed = self._handed.get(tag)
                if handed is None:
                    return False
                handed.entered = True
                handed.started |= hold
                handed.ran_here |= here
                if here and tag == self._receiving:
                    self._end_receipt()  # the rules of bodies hold from here on
                if not here or self._ending:
                    return True
                if handed.batch.deliveries[0].fresh:
                    if not self._receives_suspect():
                        return True
                elif not self._waits(handed):
                    return self._mark(handed)
            time.sleep(SUSPECT_S)
            if self._told_to_end():
                return False

    def _waits(self, handed: Handed) -> bool:
        """Whether a message whose process died when it ran waits for the end of another such one: one of them is suspected to
        be the cause, and those that merely run beside it must not be counted as often."""
        others = [other for other in self._handed.values() if other.marked and other is not handed]
        return bool(others) and (handed.is_suspect() or any(other.is_suspect() for other in others))

    def _receives_suspect(self) -> bool:
        """Whether a suspect is being received: nothing starts beside it. It takes no time unless the process dies of it."""
        receiving = self._handed.get(self._receiving)
        return receiving is not None and receiving.is_suspect()

    def _told_to_end(self) -> bool:
        return self._ending  # which another thread may have set meanwhile

    def shutting_down(self) -> None:
        """The process was told to end: whatever runs is not to blame for it. May be called from any thread."""
        self._ending = True
        with self._session.lock:
            self._end_receipt()
            for handed in self._handed.values():
                handed.consumer.unmark(handed.batch)
        try:
            self._session.flush()
        except StreamTaskError as exc:
            log.info("bodies that run may be counted as crashes: %s", exc)

    def _mark(self, handed: Handed) -> bool:
        """Writes down that the body of a message that comes again starts here: it may be what has ended the process before.
        False if the message is another's."""
        session, consumer = self._session, handed.consumer
        handed.marked = True
        try:
            session.flush()  # what ended before it must not be counted with it
            with session.guarded():
                try:
                    consumer.mark(session.link(consumer), handed.batch)
                except LeaseLost as exc:
                    session.lost(consumer, str(exc))
                    return False
                except ReplyError as exc:
                    if not is_of_one_key(exc):
                        raise
                    session.rest(consumer, exc)
        except StreamTaskError as exc:
            log.info("the start of a body was not written down: %s", exc)
        return True

    def look_after_outlived(self) -> None:
        """Gives back what nobody works on any more, and nobody has acknowledged: its end was lost with its connection. Seen
        twice, for an end and its acknowledgement are two steps."""
        self._outlived = {tag: ended for tag, ended in self._outlived.items() if tag in self._handed}
        if not self._outlived:
            return
        working: set[str] = set()
        for ask in hooks.worked_on:
            working.update(ask(self._outlived))
        for tag, ended in list(self._outlived.items()):
            self._outlived[tag] = tag not in working
            if ended and tag not in working:
                del self._outlived[tag]
                handed = self._handed.pop(tag)
                log.warning("the end of a message was lost, it is delivered again queue=%s", handed.consumer.queue)
                handed.consumer.give_back(handed.batch)

    def forget(self, consumer: StreamConsumer) -> None:
        for tag in [tag for tag, handed in self._handed.items() if handed.consumer is consumer]:
            del self._handed[tag]
