"""Lanes: one shard key's FIFO inside a shard. Pure data, no Redis.

Only keys that can't run at once have a lane here: one of their messages runs elsewhere, waits for its retry, or is held.
A key without a lane is free. Order in a lane is the order of entry ids, which is the order of the stream.

Bound on memory: of a closed lane at most ``KEEP_BODIES`` bodies are kept; beyond that only entry ids (about 100 bytes
each), which are read again when the lane opens, ``KEEP_BODIES`` at a time. A shard stops reading at ``MAX_WAITING``
waiting messages. What an operation costs does not depend on how many wait: see ``put_in_place``.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from ..redis.wire import id_order
from .delivery import Delivery, Entry, entry_id_of, lacks_body

KEEP_BODIES = 16
MAX_WAITING = 1_000_000


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
