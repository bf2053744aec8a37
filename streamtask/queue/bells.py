"""Bells wake whoever reads many streams: for each server, on a Cluster for each slot, one call that blocks until there is
something behind the last entries that were seen. No message comes over a bell, so losing its answer loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..clock import mono_s
from ..errors import BrokerUnavailable, ReplyError
from ..redis import commands
from ..redis.connection import Broker
from ..redis.links import Links
from ..redis.misplaced import of_one_key

BLOCK_S = 5.0

Streams = dict[bytes, tuple[str, str]]
"""Streams to wait for: by key, whose each is, as the caller names them, and the id after which there is something new."""


@dataclass(frozen=True, slots=True)
class Rang:
    """``news``: the first new entry of each stream that has one. None: Redis refused to wait, for something that is wrong
    with one of these streams."""

    asked: Streams
    news: list[Any] | None


class Bell:
    """Waits for something new in some streams of one server."""

    def __init__(self, links: Links, key: str) -> None:
        self.link = links.at(key)
        self._links = links
        self.asked: Streams = {}
        self.overdue_at = 0.0
        self.refused = 0
        """How often in a row Redis refused to wait."""

    def arm(self, streams: Streams, block_s: float, grace_s: float) -> None:
        ids = [at for _, at in streams.values()]
        block_ms = max(1, int(block_s * 1000))
        now = mono_s()
        # Which looks whether it has ended, also if it rang just now: who does not look for long hears that late.
        self.link = self._links.at(next(iter(streams)).decode())
        self.link.send(commands.first_behind(dict(zip(streams, ids, strict=True)), block_ms))
        self.asked = streams
        self.overdue_at = now + block_s + grace_s

    def rang(self) -> Streams:
        """What it was asked for; it rests now."""
        asked, self.asked = self.asked, {}
        return asked

    def drop(self) -> None:
        self.asked = {}
        self._links.close()


class Bells:
    """The bells of one loop. ``dropped`` is told of a socket that is about to be closed while somebody may wait for it."""

    def __init__(self, broker: Broker, dropped: Callable[[int], None]) -> None:
        self._broker = broker
        self._dropped = dropped
        self._bells: dict[str, Bell] = {}

    def arm(self, wanted: Streams, block_s: float) -> None:
        """Sees to it that these streams are waited for."""
        broker = self._broker
        for place, streams in self._by_place(wanted).items():
            bell = self._bells.get(place)
            if bell is None:
                key = next(iter(streams)).decode()
                bell = self._bells[place] = Bell(Links(broker, BLOCK_S + broker.timeout_s), key)
            if bell.asked:
                if (
                    streams.keys() <= bell.asked.keys()
                    and bell.overdue_at - broker.timeout_s <= mono_s() + block_s + 0.05
                ):
                    continue
                self._drop(bell)  # it waits for too little, or too long
            with self._or_forgotten(bell):
                bell.arm(streams, block_s, broker.timeout_s)

    def _by_place(self, streams: Streams) -> dict[str, Streams]:
        if not self._broker.is_cluster:
            return {"": streams} if streams else {}
        places: dict[str, Streams] = {}
        for key, value in streams.items():
            slot = key[key.index(b"{") + 1 : key.index(b"}")].decode()
            places.setdefault(slot, {})[key] = value
        return places

    @contextmanager
    def _or_forgotten(self, bell: Bell) -> Iterator[None]:
        """A bell whose server is lost is not used again: on a Cluster what it waits for may be elsewhere by then."""
        try:
            yield
        except BrokerUnavailable:
            self.forget(bell)
            raise

    def forget(self, bell: Bell) -> None:
        self._drop(bell)
        self._bells = {place: other for place, other in self._bells.items() if other is not bell}

    def forget_all(self) -> None:
        for bell in list(self._bells.values()):
            self.forget(bell)

    def _drop(self, bell: Bell) -> None:
        self._dropped(bell.link.fileno())
        bell.drop()

    def armed(self) -> list[Bell]:
        return [bell for bell in self._bells.values() if bell.asked]

    def overdue(self) -> list[Bell]:
        """Those whose answer should have come by now."""
        now = mono_s()
        return [bell for bell in self.armed() if now > bell.overdue_at]

    def receive(self, fd: int) -> Rang | None:
        """Reads the answer of the bell that has this socket, if one has."""
        for bell in self.armed():
            if bell.link.fileno() == fd:
                asked = bell.rang()
                try:
                    with self._or_forgotten(bell):
                        news = bell.link.read()
                except ReplyError as exc:
                    bell.refused += 1
                    if bell.refused > 1 or not of_one_key(exc):
                        raise
                    return Rang(asked, None)
                bell.refused = 0
                return Rang(asked, news or [])
        return None

    def close(self) -> None:
        for bell in self._bells.values():
            bell.drop()
