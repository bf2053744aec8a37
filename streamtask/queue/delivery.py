"""A message in the hands of its owner: how it was delivered, and what becomes of it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ..redis.wire import Note


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


class Kind(Enum):
    """What can become of a message that did not simply succeed."""

    RETRY = "retry"
    """Its body failed: it runs again after a delay, and this counts as an attempt."""
    LATER = "later"
    """It has not run (its task's rate), or a Celery worker has given it back: it runs after a delay, if any; not counted."""
    AGAIN = "again"
    """Its body gave it back (``Reject(requeue=True)``): it runs again after a pause that grows; not counted."""
    DEAD = "dead"
    SKIPPED = "skipped"
    """Its lane is closed."""
    UNSTARTED = "unstarted"
    """The owner stopped handing out."""
    IGNORED = "ignored"
    REVOKED = "revoked"


CLOSES = frozenset((Kind.RETRY, Kind.LATER, Kind.AGAIN, Kind.DEAD))
"""After these the message's key waits."""


@dataclass(slots=True)
class Outcome:
    """What becomes of a message that did not simply succeed."""

    kind: Kind
    delay_s: float = 0.0
    reason: str = ""
    message: str = ""
    traceback: str | None = None


@dataclass(slots=True)
class Dead:
    """What is to go to the dead letters, or has gone there: a message, or the id of an entry that can't be read."""

    item: Delivery | bytes
    outcome: Outcome
    in_doubt: bool = False
    """Its dead letter may be stored: the reply was lost."""

    @property
    def entry_id(self) -> bytes:
        return self.item if isinstance(self.item, bytes) else self.item.entry_id

    @property
    def delivery(self) -> Delivery | None:
        return None if isinstance(self.item, bytes) else self.item
