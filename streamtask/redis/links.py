"""The links of one loop: one to each server, which is one in all but on a Cluster."""

from __future__ import annotations

from collections.abc import Sequence

from ..clock import mono_s
from .connection import Broker
from .link import SMALL, Link, Reply

IDLE_S = 1.0
"""A connection that was not used for so long may have been closed by the server: it is looked at before its next use."""


class Links:
    """Links that are made at their first use. ``timeout_s`` bounds the wait for a reply, ``buffer_bytes`` is how much one
    read takes."""

    def __init__(self, broker: Broker, timeout_s: float, *, buffer_bytes: int = SMALL) -> None:
        self._broker = broker
        self._buffer_bytes = buffer_bytes
        self._timeout_s = timeout_s
        self._links: dict[str, Link] = {}
        self._used_at: dict[str, float] = {}

    def at(self, key: str) -> Link:
        """The link to the server that holds a key."""
        node = self._broker.node(key)
        link = self._links.get(node)
        if link is None:
            link = self._links[node] = self._broker.link(
                key, timeout_s=self._timeout_s, buffer_bytes=self._buffer_bytes
            )
        now = mono_s()
        if now - self._used_at.get(node, now) > IDLE_S:
            link.drop_if_ended()
        self._used_at[node] = now
        return link

    def pipeline(self, commands: Sequence[tuple[str, bytes]]) -> list[Reply]:
        """Sends prepared commands, each to the server that holds its key, and answers their replies in this order."""
        by_link: dict[Link, list[int]] = {}
        for position, (key, _) in enumerate(commands):
            by_link.setdefault(self.at(key), []).append(position)
        for link, positions in by_link.items():
            link.send(b"".join([commands[position][1] for position in positions]))
        replies: list[Reply] = [None] * len(commands)
        for link, positions in by_link.items():
            answers = link.answers([commands[position][1] for position in positions])
            for position, answer in zip(positions, answers, strict=True):
                replies[position] = answer
        return replies

    @property
    def connected(self) -> bool:
        """Whether there is a connection to any server."""
        return any(link.connected for link in self._links.values())

    def close(self) -> None:
        """Closes them all; the next use connects anew, on a Cluster to where the slots are then."""
        for link in self._links.values():
            link.close()
        if self._broker.is_cluster:
            self._links.clear()
