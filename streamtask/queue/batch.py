"""Deliveries that are handed out together, and what became of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .lanes import Delivery, Entry, deliveries_of

if TYPE_CHECKING:
    from .consumer import ShardConsumer


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
