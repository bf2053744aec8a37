"""What the control loop of a worker process shares with the threads that run bodies. Nothing else crosses between them.

Each name says who writes it. There are no locks: an operation of a list, a dict or a deque is one step, and where two look at
what the other has written, each writes before it looks.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from ..clock import mono_s
from ..coordination.shared import SharedMemory, Slot
from ..queue.backlog import Backlog, Batch
from ..queue.delivery import Delivery, Entry, Kind, Outcome

SKIPPED = Outcome(Kind.SKIPPED)
UNSTARTED = Outcome(Kind.UNSTARTED)
REVOKED = Outcome(Kind.REVOKED)
EXIT_FORKED = 70
"""Exit status of a process that a body has forked, and that came back out of the body."""

EVERY = 1 << 30
"""For ``Running.low``: each end is told."""

Work = tuple[Batch, int]
"""A message that was handed out: its batch, and its position there."""


class Running:
    """What bodies that run side by side have in common."""

    def __init__(self, memory: SharedMemory, concurrency: int, wake: Callable[[], None]) -> None:
        self.trusted = memory.trusted
        """Until when each lease is to be trusted. Written by the supervisor."""
        self.functions: deque[Work] = deque()
        """What waits for a thread. The control loop puts it there, whichever thread is free takes it."""
        self.coroutines: deque[Work] = deque()
        """What waits for the event loop."""
        self.slots: deque[Slot] = deque(memory.slot(number) for number in range(concurrency))
        """Whoever runs a body has taken one of these, and so no more run at once than are meant to."""
        self.idle: deque[threading.Lock] = deque()
        """The gates of threads that wait. Who takes one out opens it."""
        self.asleep = False
        """Whether the control loop is to be told of ends; set by it before it sleeps, taken back by who tells it."""
        self.low = EVERY
        """It is told where no more than so many wait to begin, ..."""
        self.tell_at = 0.0
        """... or after this time (monotonic)."""
        self.wake = wake
        self.freed: Callable[[], None] = lambda: None
        """Called where a slot is free again, and bodies of the other kind wait for one."""

    def waiting(self) -> int:
        """How many messages wait to begin."""
        return len(self.functions) + len(self.coroutines)

    def end(self, batch: Batch, position: int, slot: Slot, outcome: Outcome | None) -> None:
        """Says that a message has ended. In this order: whoever sees that it has ended sees its outcome, and nobody is charged
        with what has ended."""
        slot.clear()
        self.slots.append(slot)
        if outcome is not None:
            batch.odd[position] = outcome
        assert batch.ended is not None
        batch.ended.append(position)
        if self.asleep and (len(self.functions) + len(self.coroutines) <= self.low or mono_s() >= self.tell_at):
            self.asleep = False
            self.wake()

    def withdraw(self, backlog: Backlog) -> None:
        """Gives back what waits of a shard: its hand-over must not wait for bodies of others."""
        for waiting in (self.functions, self.coroutines):
            for work in [work for work in list(waiting) if work[0].backlog is backlog]:
                try:
                    waiting.remove(work)
                except ValueError:
                    continue  # it has begun meanwhile
                batch, position = work
                batch.odd[position] = UNSTARTED
                assert batch.ended is not None
                batch.ended.append(position)


def plain_call(
    item: Delivery | Entry, plain: Mapping[str, Callable[..., Any]]
) -> tuple[Callable[..., Any] | None, list[Any], dict[str, Any]]:
    """The function to call for a message directly, and with what; None where it needs more than that."""
    if type(item) is list:
        task, _, _, args, kwargs, _ = item[1]
        return plain.get(task), args, kwargs
    if item.note is None and item.headers is None:  # type: ignore[union-attr]
        return plain.get(item.task), item.args, item.kwargs  # type: ignore[union-attr]
    return None, [], {}
