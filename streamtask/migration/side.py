"""What both sides of a migration have in common."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..clock import mono_s
from ..errors import BrokerUnavailable, StreamTaskError
from ..redis.address import safe_url

RETRY_S = 10.0


class Outcome:
    """What was done, for the report."""

    def __init__(self) -> None:
        self.moved: dict[str, Counter[int]] = defaultdict(Counter)
        self.restored: Counter[str] = Counter()
        self.held: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self.not_moved: list[dict[str, Any]] = []
        self.maybe_twice: list[dict[str, Any]] = []
        self.skipped: list[str] = []

    def as_json(self) -> dict[str, Any]:
        return {
            "moved": {queue: sum(counts.values()) for queue, counts in self.moved.items()},
            "priorities": {queue: dict(sorted(counts.items())) for queue, counts in self.moved.items()},
            "restored": dict(self.restored),
            "held": dict(self.held),
            "left": dict(self.left),
            "not_moved": self.not_moved,
            "maybe_twice": self.maybe_twice,
            "skipped": self.skipped,
        }


class Side(ABC):
    """One of the two brokers, which messages leave or come to; ``OldRedis`` and ``Streams`` know how they lie there.

    ``tell`` is called with what a person should know at once: a wait, a warning.
    """

    def __init__(self, url: str, options: dict[str, Any], connection: Any, tell: Callable[[str], None]) -> None:
        self.url = safe_url(url)
        self.options = options
        self.connection = connection
        self.tell = tell
        self.channel = connection.channel()
        self.keep_alive: Callable[[], None] = lambda: None
        """Called while something is waited for."""
        self.lost = lost_errors(connection)
        self.refused: tuple[type[Exception], ...] = tuple(connection.channel_errors)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turns kombu's and redis-py's errors inside the block into ours."""
        try:
            yield
        except StreamTaskError:
            raise
        except self.lost as exc:
            raise BrokerUnavailable(
                f"the connection to {self.url} was lost: {exc}. Run the command again: it goes on"
            ) from None
        except self.refused as exc:
            raise StreamTaskError(f"{self.url} refuses what was asked of it: {exc}") from None

    def reconnect(self) -> None:
        with suppress(Exception):
            self.connection.collapse()
        self.connection.connect()
        self.channel = self.connection.channel()

    def is_target_of(self, other: Side) -> bool:
        """Whether both are the same place, under whatever names."""
        return False

    @abstractmethod
    def count(self, names: list[str], outcome: Outcome) -> None: ...

    @abstractmethod
    def move(self, names: list[str], unacked: bool, target: Side, outcome: Outcome) -> None: ...

    def store(self, queue: str, payload: dict[str, Any], raw: bytes, identity: str | None) -> None:
        """Stores one message, and returns when it is stored. ``identity``: of this message, the same in every try.

        Raises ``NotMoved`` where the broker will never take it, ``BrokerUnavailable`` where that is not known.
        """
        end = mono_s() + RETRY_S
        again = False
        while True:
            try:
                if again:
                    self.reconnect()
                if not (again and self.has(identity)):
                    self.put(queue, payload, raw, identity)
                return
            except self.lost as exc:
                if mono_s() >= end:
                    raise BrokerUnavailable(
                        f"{self.url} did not answer for {RETRY_S:g} s: {exc}. Run the command again: it goes on"
                    ) from None
                again = True
                self.keep_alive()
                time.sleep(0.2)
            except self.refused as exc:
                raise StreamTaskError(f"{self.url} refuses the message: {exc}") from None

    @abstractmethod
    def put(self, queue: str, payload: dict[str, Any], raw: bytes, identity: str | None) -> None: ...

    def has(self, identity: str | None) -> bool:
        """Whether a message of that identity was stored here lately, where this can be known."""
        return False

    finds_queues = True
    """Whether a source knows which queues hold an app's messages; else they have to be named."""

    remembers = False
    """Whether ``put`` recognises a message of a run before, however long ago that was (up to a day)."""

    def close(self) -> None:
        with suppress(Exception):
            self.connection.release()


def lost_errors(connection: Any) -> tuple[type[Exception], ...]:
    # KeyError is among kombu's: a bug of ours should not look like a lost connection.
    return tuple(one for one in connection.connection_errors if one is not KeyError)
