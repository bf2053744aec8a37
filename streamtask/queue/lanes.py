"""Lanes: one shard key's FIFO inside a shard. Pure data, no Redis.

Only keys that can't run at once have a lane here: one of their messages runs elsewhere, waits for its retry, or is held.
A key without a lane is free. Order in a lane is the order of entry ids, which is the order of the stream.

Bound on memory: of a closed lane at most ``KEEP_BODIES`` bodies are kept; beyond that only entry ids (about 100 bytes
each), which are read again when the lane opens, ``KEEP_BODIES`` at a time. A shard stops reading at ``MAX_WAITING``
waiting messages. What an operation costs does not depend on how many wait: see ``put_in_place``.
"""

from __future__ import annotations

import heapq
import re
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

KEEP_BODIES = 16
MAX_WAITING = 1_000_000


def id_order(entry_id: bytes) -> tuple[int, int]:
    """An entry id as numbers: text order is not the order of the stream."""
    ms, _, seq = entry_id.partition(b"-")
    return int(ms), int(seq)


_NOTE = re.compile(rb"\d{1,19}(?: \d{1,19}){0,5}")


OVERRAN = 3


@dataclass(slots=True)
class Note:
    """What is stored beside a pending entry, because it must survive its owner (``lua/note.lua``).

    ``attempt`` failed runs so far; ``due_ms`` when the next may start (Redis' clock); ``crashes`` processes that died
    while the body ran; ``mark`` the token of an owner that wrote down the start; ``charged`` the token whose death was
    counted last; ``held`` 1: dead-lettered, the lane stays closed; 2: to be dropped; 3: no lane is held, but the last run
    was ended at its ``time_limit``, and is still to be judged as a failed one.
    """

    attempt: int = 0
    due_ms: int = 0
    crashes: int = 0
    mark: int = 0
    charged: int = 0
    held: int = 0

    @property
    def overran(self) -> bool:
        return self.held == OVERRAN

    @classmethod
    def parse(cls, text: bytes) -> Note:
        """What stands there; an empty note for what no script has written."""
        if _NOTE.fullmatch(text) is None:
            return cls()
        return cls(*map(int, text.split()))

    def is_ahead_of(self, text: bytes | None) -> bool:
        """Whether it knows of attempts or crashes that Redis has lost, of which this is there."""
        there = Note.parse(text) if text else Note()
        if not text or there.held:
            return not text
        return (self.attempt, self.crashes) != (there.attempt, there.crashes) and (
            self.attempt >= there.attempt and self.crashes >= there.crashes
        )

    def format(self) -> str:
        return f"{self.attempt} {self.due_ms} {self.crashes} {self.mark} {self.charged} {self.held}"


class Delivery:
    """One reading of a message. ``lane`` is its shard key, or None where no order must hold.

    ``lane_key`` is what its retry waits under: the key, or the entry itself. ``fresh`` is False for an entry that was
    delivered to another owner before. ``spent``: its body has run, which may have changed the arguments, so they are read
    again before the next run. ``given_back``: how often its body has given it back.
    """

    __slots__ = (
        "args", "entry_id", "fresh", "given_back", "headers", "id", "key", "kwargs", "lane", "note", "replayed", "spent",
        "task",
    )  # fmt: skip

    def __init__(self, entry_id: bytes, envelope: list[Any]) -> None:
        self.entry_id = entry_id
        self.task, self.key, self.id, self.args, self.kwargs, self.headers = envelope
        self.lane: Hashable | None = self.key
        self.note: Note | None = None
        self.fresh = True
        self.replayed = False
        self.spent = False
        self.given_back = 0

    @property
    def lane_key(self) -> Hashable:
        return ("", self.entry_id) if self.lane is None else self.lane

    def __repr__(self) -> str:
        return f"<Delivery {self.task} {self.entry_id.decode()} key={self.key!r}>"


def lacks_body(item: Delivery | bytes) -> bool:
    """Whether a message that waits has to be read again before it is handed out."""
    return isinstance(item, bytes) or item.spent


Entry = list[Any]
"""A new message with nothing special about it, as ``[entry id, envelope]``: what its reading has made anyway. Making a
``Delivery`` of each would cost a fifth of what handling it does."""


def deliveries_of(items: Iterable[Delivery | Entry]) -> list[Delivery]:
    """The items, with a ``Delivery`` in place of each plain entry."""
    return [Delivery(*item) if isinstance(item, list) else item for item in items]


def entry_id_of(item: Delivery | Entry | bytes) -> bytes:
    if type(item) is bytes:
        return item
    return item[0] if type(item) is list else item.entry_id  # type: ignore[union-attr]


def put_in_place(items: deque[Any], item: Delivery | Entry | bytes) -> None:
    """Inserts by entry id. The place is looked for from both ends at once, in growing steps: what comes in order goes to
    the end, what comes back goes near the front, and either costs the same however much lies between."""
    order = id_order(entry_id_of(item))
    count = len(items)
    if not count or id_order(entry_id_of(items[-1])) < order:
        items.append(item)
        return
    if order < id_order(entry_id_of(items[0])):
        items.appendleft(item)
        return
    low, high, step = 0, count - 1, 1  # items[low] is before the place, items[high] after it
    while high - low > 2 * step:
        if order < id_order(entry_id_of(items[low + step])):
            high = low + step
        elif id_order(entry_id_of(items[high - step])) < order:
            low = high - step
        else:
            low, high, step = low + step, high - step, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        if id_order(entry_id_of(items[middle])) < order:
            low = middle
        else:
            high = middle
    items.insert(high, item)


class Lane:
    """The waiting messages of one key, in order; those beyond ``KEEP_BODIES`` as bare entry ids."""

    __slots__ = ("closed", "closed_by", "due", "key", "listed", "running", "waiting")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.waiting: deque[Delivery | bytes] = deque()
        self.running = False  # one of its messages runs beside those of other lanes
        self.closed = False  # until ``open`` is called: its head is held, or on its way to the dead letters
        self.due: float | None = None  # monotonic: when it opens by itself
        self.closed_by = 0  # number of the last batch that may hold messages of this key
        self.listed = False  # among the ready ones

    @property
    def is_ready(self) -> bool:
        return not self.running and not self.closed and self.due is None


def _loaded(item: Delivery | bytes, bodies: Mapping[bytes, Delivery]) -> Delivery | None:
    body = bodies.get(entry_id_of(item))
    if body is None or isinstance(item, bytes):
        return body
    item.args, item.kwargs, item.headers = body.args, body.kwargs, body.headers
    item.spent = False
    return item


class LaneSet:
    """All lanes of a shard that are not free."""

    __slots__ = ("_due", "_ready", "_serial", "lanes", "waiting")

    def __init__(self) -> None:
        self.lanes: dict[Hashable, Lane] = {}
        self.waiting = 0
        self._due: list[tuple[float, int, Lane]] = []
        self._ready: deque[Lane] = deque()
        self._serial = 0

    def __len__(self) -> int:
        return len(self.lanes)

    def get(self, key: Hashable) -> Lane | None:
        return self.lanes.get(key)

    def start(self, key: Hashable) -> Lane:
        """Closes a free key because one of its messages runs now."""
        lane = self.lanes[key] = Lane(key)
        lane.running = True
        return lane

    def add(self, lane: Lane, item: Delivery | bytes) -> None:
        """Puts a message into its place, by entry id; nearly always that is the end."""
        if len(lane.waiting) >= KEEP_BODIES and isinstance(item, Delivery) and item.note is None:
            item = item.entry_id
        self.waiting += 1
        put_in_place(lane.waiting, item)

    def close(self, key: Hashable, head: Delivery | bytes | None, due: float | None, closed_by: int = 0) -> Lane:
        """Closes a lane, with ``head`` back in its place, until ``due`` (monotonic), or None: until it is opened."""
        lane = self.lanes.get(key)
        if lane is None:
            lane = self.lanes[key] = Lane(key)
        lane.running = False
        lane.closed_by = max(lane.closed_by, closed_by)
        if head is not None:
            # Whole, however long the lane: it is the next to run, and knows that it was handed out before.
            self.waiting += 1
            put_in_place(lane.waiting, head)
        lane.due = due
        lane.closed = due is None
        if due is not None:
            self._serial += 1
            heapq.heappush(self._due, (due, self._serial, lane))
        return lane

    def open(self, lane: Lane) -> None:
        """Lets a lane's head run as soon as there is room. An empty lane goes as well, once ``ready`` has shown it:
        until then its key is not free."""
        lane.due = None
        lane.running = lane.closed = False
        if not lane.listed:
            lane.listed = True
            self._ready.append(lane)

    def open_due(self, now: float) -> None:
        """Opens the lanes whose time has come."""
        while self._due and self._due[0][0] <= now:
            due, _, lane = heapq.heappop(self._due)
            if lane.due == due and self.lanes.get(lane.key) is lane:
                self.open(lane)

    def next_due(self) -> float | None:
        while self._due and (self._due[0][2].due != self._due[0][0]):
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else None

    def has_ready(self) -> bool:
        return bool(self._ready)

    def ready(self) -> Iterator[Lane]:
        """The lanes that may hand out, each once; whoever takes one hands out or opens it again. Those that are not asked
        for stay in their places."""
        for _ in range(len(self._ready)):
            lane = self._ready.popleft()
            lane.listed = False
            if self.lanes.get(lane.key) is lane and lane.is_ready:
                yield lane

    def peek_ready(self) -> Iterator[Lane]:
        """The lanes that ``ready`` would show, which stay in their places."""
        return (lane for lane in self._ready if self.lanes.get(lane.key) is lane and lane.is_ready)

    def pop(self, lane: Lane) -> Delivery | bytes:
        self.waiting -= 1
        return lane.waiting.popleft()

    def load(self, lane: Lane, count: int, bodies: Mapping[bytes, Delivery]) -> None:
        """Gives bodies to those that lack one among a lane's first ``count`` messages. Those without are gone."""
        waiting = lane.waiting
        first = [waiting.popleft() for _ in range(min(count, len(waiting)))]
        loaded = [_loaded(item, bodies) if lacks_body(item) else item for item in first]
        kept = [item for item in loaded if item is not None]
        self.waiting -= len(first) - len(kept)
        waiting.extendleft(reversed(kept))

    def finish(self, key: Hashable) -> None:
        """The running message of a lane has ended well: the next may run, or the key is free."""
        lane = self.lanes.get(key)
        if lane is not None and lane.running:
            if lane.waiting:
                self.open(lane)
            else:
                del self.lanes[key]

    def drop(self, lane: Lane) -> None:
        """Removes an empty lane: its key is free."""
        if not lane.waiting and self.lanes.get(lane.key) is lane:
            del self.lanes[lane.key]

    def entry_ids(self) -> Iterator[bytes]:
        for lane in self.lanes.values():
            for item in lane.waiting:
                yield entry_id_of(item)
