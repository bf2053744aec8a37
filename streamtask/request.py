"""``self.request``: what a running body may know of its message."""

from __future__ import annotations

import datetime as dt
import logging
import threading
from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from .redis import wire
from .redis.wire import id_order
from .text import ADDED

if TYPE_CHECKING:
    from .queue.backlog import Batch
    from .queue.delivery import Delivery
    from .worker.ports import Place


class Request:
    """The message that runs now. Attributes are read from the delivery when they are asked for."""

    __slots__ = ("_delivery", "_place")

    def __init__(self, delivery: Delivery, place: Place) -> None:
        self._delivery = delivery
        self._place = place

    @property
    def id(self) -> str:
        """The task id."""
        return wire.id_text(self._delivery.id)

    @property
    def task(self) -> str:
        return str(self._delivery.task)

    @property
    def args(self) -> list[Any]:
        args: list[Any] = self._delivery.args
        return args

    @property
    def kwargs(self) -> dict[str, Any]:
        kwargs: dict[str, Any] = self._delivery.kwargs
        return kwargs

    @property
    def headers(self) -> dict[str, Any]:
        headers: dict[str, Any] | None = self._delivery.headers
        return headers or {}

    @property
    def queue(self) -> str:
        return self._place.queue

    @property
    def shard(self) -> int | str:
        """The shard's number, or ``shared``."""
        return self._place.shard

    @property
    def shard_key(self) -> str | None:
        """The canonical shard key as text."""
        key = self._delivery.key
        return None if key is None else key.decode("utf-8", "surrogateescape")

    @property
    def attempt(self) -> int:
        """Failed runs before this one: 0 in the first."""
        note = self._delivery.note
        return 0 if note is None else note.attempt

    retries = attempt

    @property
    def fencing_token(self) -> int:
        """Grows with each new owner of the shard, and never falls: hand it to what must refuse a late writer."""
        return self._place.token

    @property
    def eta(self) -> dt.datetime | None:
        eta = self.headers.get(wire.H_ETA)
        return None if eta is None else _instant(eta)

    @property
    def expires(self) -> dt.datetime | None:
        expires = self.headers.get(wire.H_EXPIRES)
        return None if expires is None else _instant(expires)

    @property
    def produced_at(self) -> dt.datetime:
        """When the produce call was made (Redis' clock; the producer's for a delayed message)."""
        return _instant(self.headers.get(wire.H_PRODUCED) or id_order(self._delivery.entry_id)[0])

    @property
    def entry_id(self) -> str:
        return self._delivery.entry_id.decode()

    def __repr__(self) -> str:
        return f"<Request {self.task} {self.id} attempt={self.attempt} shard={self.shard}>"


def _instant(ms: float) -> dt.datetime:
    # An entry's id, which its producer may have chosen, can be of any year.
    return dt.datetime.fromtimestamp(min(ms, wire.LAST_MS) / 1000, dt.timezone.utc)


class _Here(threading.local):
    place: Place | None = None
    delivery: Delivery | None = None
    batch: Batch | None = None
    cells: Sequence[int] = ()


here = _Here()
"""What runs in this thread: a delivery, or the one of a batch that ``cells[0]`` names, which is set once a batch."""

in_coroutine: ContextVar[tuple[Any, ...] | None] = ContextVar("streamtask_request", default=None)
"""What runs in this coroutine: a delivery and its place, or a batch, its place, and a position there."""


def current() -> Request | None:
    """The request of the body that runs here, or None outside of one."""
    found = in_coroutine.get()
    if found is not None:
        return Request(found[0] if len(found) == 2 else found[0].delivery(found[2]), found[1])
    if here.place is None:
        return None
    if here.batch is not None:
        return Request(here.batch.delivery(here.cells[0]), here.place)
    return None if here.delivery is None else Request(here.delivery, here.place)


class TaskFilter(logging.Filter):
    """Gives each record that is made within a body the fields ``task``, ``id``, ``key`` and ``attempt`` of the message that
    runs; elsewhere, and where the record has them, it changes nothing. Workers give it to all handlers that there are once
    the app is imported."""

    def filter(self, record: logging.LogRecord) -> bool:
        # What we log around a body says by itself which message it is of, if any.
        request = None if ADDED in record.__dict__ or record.name.startswith("streamtask.") else current()
        if request is not None:
            fields = {"task": request.task, "id": request.id, "key": request.shard_key, "attempt": request.attempt}
            added = {name: value for name, value in fields.items() if name not in record.__dict__}
            record.__dict__.update(added, **{ADDED: tuple(added)})
        return True
