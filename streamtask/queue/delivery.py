"""A message in the hands of its owner: how it was delivered, with which others it is handed out, and what becomes of it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..redis.wire import Note

if TYPE_CHECKING:
    from .consumer import ShardConsumer


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


class Batch:
    """Deliveries handed out together, to be run one after the other.

    ``collected`` of them are known to have ended; ``outcomes`` has (position, outcome) of those that did not end well,
    ``reopened`` the keys that a sequential executor skips no longer; ``mixed``: not in the order of the stream.
    """

    __slots__ = (
        "collected", "consumer", "end", "ids", "items", "mixed", "number", "outcomes", "reopened", "results", "seen", "slot",
    )  # fmt: skip

    def __init__(
        self, consumer: ShardConsumer, number: int, items: Sequence[Delivery | Entry], reopened: list[Hashable]
    ) -> None:
        self.consumer = consumer
        self.number = number
        self.items = items
        self.ids: list[bytes] = [item[0] if type(item) is list else item.entry_id for item in items]  # type: ignore[union-attr]
        self.end = len(self.ids)  # from there on nothing begins any more
        self.reopened = reopened
        self.mixed = False
        self.collected = 0
        self.seen = 0  # outcomes that were dealt with
        self.outcomes: list[tuple[int, Outcome]] = []
        self.results: list[tuple[Delivery, Any]] = []
        self.slot: Any = None  # where its executor writes down which one runs

    def delivery(self, index: int) -> Delivery:
        item = self.items[index]
        return Delivery(*item) if type(item) is list else item  # type: ignore[return-value]

    @property
    def deliveries(self) -> list[Delivery]:
        return deliveries_of(self.items)


@dataclass(slots=True)
class Outcome:
    """What becomes of a message that did not simply succeed.

    ``kind``: ``retry`` (after ``delay_s``, counted as an attempt), ``requeue`` (after ``delay_s``, not counted: it has
    not run), ``again`` (its body gave it back: after a pause that grows, not counted), ``dead``,
    ``skipped`` (its lane is closed), ``unstarted`` (the owner stopped handing out), ``ignored`` or ``revoked``.
    """

    kind: str
    delay_s: float = 0.0
    reason: str = ""
    message: str = ""
    traceback: str | None = None
    in_doubt: bool = False  # its dead letter may be stored: the reply was lost


CLOSES = frozenset(("retry", "requeue", "again", "dead"))
"""Outcomes after which the message's key waits."""
