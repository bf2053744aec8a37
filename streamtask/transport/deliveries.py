"""What was handed to this process' channels and has not ended, by delivery tag: it outlives them.

A ledger: what has to be written, or asked, is its owner's to do. It knows the rules by which a message is received and its body
begins, where one of them may be what ends the process.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from ..coordination.lease import Lease
from ..queue.backlog import Batch
from ..text import logger
from . import hooks
from .consumer import StreamConsumer

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
    """See the module. ``lock`` guards it, and is held by what is called from without.

    ``receives`` is told which entry of which lease is about to be shown, and None when it was; ``mark`` writes down that the
    body of a message that comes again starts here, and answers False if the message is another's.
    """

    def __init__(
        self,
        lock: AbstractContextManager[bool],
        receives: Callable[[Lease | None, bytes], None],
        mark: Callable[[StreamConsumer, Batch], bool],
    ) -> None:
        self._lock = lock
        self._receives = receives
        self._mark = mark
        self.handed: dict[str, Handed] = {}
        self.new_tag: Callable[[], str] = _tags().__next__
        self._outlived: dict[str, bool] = {}
        """Those whose channel was closed while they were worked on; True: at the last look they no longer were."""
        self._ending = False
        self._receiving = ""  # the tag of the message that is being received

    def add(self, tag: str, consumer: StreamConsumer, batch: Batch) -> None:
        self.handed[tag] = Handed(tag, consumer, batch)

    def place(self, tag: str) -> tuple[str, bytes]:
        """The stream and the entry of what was handed out: the same each time that a message is delivered."""
        with self._lock:
            handed = self.handed[tag]
            return handed.consumer.keys.stream, handed.batch.deliveries[0].entry_id

    def ack(self, tag: str) -> bool:
        """A message has ended; False where this process does not hold it (any more)."""
        with self._lock:
            handed = self.handed.pop(tag, None)
            if handed is None:
                return False
            handed.consumer.end(handed.batch)
            return True

    def reject(self, tag: str, requeue: bool, why: str = "") -> bool:
        """A message is to be delivered again, or goes to the dead letters. False as ``ack``."""
        with self._lock:
            handed = self.handed.pop(tag, None)
            if handed is None:
                return False
            if requeue:
                handed.consumer.give_back(handed.batch)
            else:
                handed.consumer.reject(handed.batch, why)
            return True

    def charge(self, tag: str) -> bool:
        """A message took its process down; True if that was once too often."""
        with self._lock:
            handed = self.handed.get(tag)
            return handed is not None and handed.consumer.charge(handed.batch)

    def receive(self, tag: str) -> bool:
        """The framework is about to look at a message, before any body: if the process dies of that, this message is charged,
        by the keeper; and where one comes again also by whoever has it next, for the keeper may die with its process. False
        where it is not to look now: a suspect waits for the end of all bodies that would be charged with it, and is delivered
        again then."""
        with self._lock:
            handed = self.handed.get(tag)
            if handed is None or self._ending:
                return True
            if handed.is_suspect() and any(other.marked for other in self.handed.values()):
                del self.handed[tag]
                handed.consumer.put_off(handed.batch, HOLD_S)
                return False
            self._receiving = tag
            delivery = handed.batch.deliveries[0]
            self._receives(handed.consumer.lease, delivery.entry_id)
            if not delivery.fresh:
                self._mark_start(handed)
            return True

    def received(self, tag: str) -> None:
        """It has: what follows is not counted so."""
        if self._receiving != tag:
            return
        with self._lock:
            self._end_receipt()
            handed = self.handed.get(tag)
            if handed is not None and handed.marked and not handed.ran_here:
                handed.marked = False
                handed.consumer.unmark(handed.batch)

    def _end_receipt(self) -> None:
        self._receiving = ""
        self._receives(None, b"")

    def restore(self, tags: Iterable[str]) -> None:
        """A channel closes: what it was given and has not acknowledged is delivered again, but for what is worked on."""
        with self._lock:
            left = [tag for tag in tags if tag in self.handed]
            kept = {tag for tag in left if self.handed[tag].started}
            for ask in hooks.keep_on_close:
                kept.update(ask(left))
            self._outlived.update(dict.fromkeys(kept.intersection(left), False))
            for tag in left:
                handed = None if tag in kept else self.handed.pop(tag, None)  # the asking may have acknowledged it
                if handed is not None:
                    handed.consumer.give_back(handed.batch)

    def withdraw(self, consumer: StreamConsumer | None = None) -> None:
        """A shard, or all, are to go to other processes: what was handed out and has not begun goes with them."""
        with self._lock:
            tags = [
                tag
                for tag, handed in self.handed.items()
                if not handed.entered and not handed.consumer.lease.shared and consumer in (None, handed.consumer)
            ]
            waiting = {tag for ask in hooks.not_begun for tag in ask(tags)} if tags else ()
            for tag in waiting:
                handed = self.handed.pop(tag)
                handed.consumer.give_back(handed.batch)

    def start(self, tag: str, hold: bool, here: bool) -> bool:
        """A body starts, or a pool gets it: False if its message was given back before. ``hold``: closing its channel does not
        give it back any more. ``here``: it starts in this process."""
        while True:
            # Under the lock: not between the look at what is worked on and the giving back of the rest.
            with self._lock:
                handed = self.handed.get(tag)
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
                    return self._mark_start(handed)
            time.sleep(SUSPECT_S)
            if self._told_to_end():
                return False

    def _waits(self, handed: Handed) -> bool:
        """Whether a message whose process died when it ran waits for the end of another such one: one of them is suspected to
        be the cause, and those that merely run beside it must not be counted as often."""
        others = [other for other in self.handed.values() if other.marked and other is not handed]
        return bool(others) and (handed.is_suspect() or any(other.is_suspect() for other in others))

    def _receives_suspect(self) -> bool:
        """Whether a suspect is being received: nothing starts beside it. It takes no time unless the process dies of it."""
        receiving = self.handed.get(self._receiving)
        return receiving is not None and receiving.is_suspect()

    def _told_to_end(self) -> bool:
        return self._ending  # which another thread may have set meanwhile

    def shutting_down(self) -> None:
        """The process was told to end: whatever runs is not to blame for it. May be called from any thread."""
        self._ending = True
        with self._lock:
            self._end_receipt()
            for handed in self.handed.values():
                handed.consumer.unmark(handed.batch)

    def _mark_start(self, handed: Handed) -> bool:
        handed.marked = True
        return self._mark(handed.consumer, handed.batch)

    def look_after_outlived(self) -> None:
        """Gives back what nobody works on any more, and nobody has acknowledged: its end was lost with its connection. Seen
        twice, for an end and its acknowledgement are two steps."""
        self._outlived = {tag: ended for tag, ended in self._outlived.items() if tag in self.handed}
        if not self._outlived:
            return
        working: set[str] = set()
        for ask in hooks.worked_on:
            working.update(ask(self._outlived))
        for tag, ended in list(self._outlived.items()):
            self._outlived[tag] = tag not in working
            if ended and tag not in working:
                del self._outlived[tag]
                handed = self.handed.pop(tag)
                log.warning("the end of a message was lost, it is delivered again queue=%s", handed.consumer.queue)
                handed.consumer.give_back(handed.batch)

    def forget(self, consumer: StreamConsumer) -> None:
        for tag in [tag for tag, handed in self.handed.items() if handed.consumer is consumer]:
            del self.handed[tag]


def _tags() -> Iterator[str]:
    prefix = uuid.uuid4().hex[:12]
    number = 0
    while True:
        number += 1
        yield f"{prefix}.{number}"
