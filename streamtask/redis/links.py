"""How connections are held: by key, so that a Cluster, where each key has its server, needs no second way.

``Links`` are those of one loop; a ``Pool`` has some that threads borrow. A forked child closes its copies and makes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

from .. import fork
from ..clock import mono_s
from ..errors import BrokerUnavailable, ConfigError, Misconfigured
from .connection import Broker
from .link import REPLIES, SMALL, Link, Part, Reply, not_done

T = TypeVar("T")

Prepared = tuple[str, bytes]
"""A packed command, after a key that says which server it is for."""

IDLE_S = 1.0
"""A connection that was not used for so long may have been closed by the server: it is looked at before its next use."""


class Links:
    """One link to each server, made at its first use; used by one thread at a time. ``timeout_s`` bounds the wait for a reply,
    ``buffer_bytes`` is how much one read takes. ``idle_s``: one that was not used for so long is looked at before its next
    use; ``inf`` for one that somebody listens to, who learns of its end."""

    def __init__(
        self,
        broker: Broker,
        timeout_s: float | None = None,
        *,
        buffer_bytes: int = SMALL,
        idle_s: float = IDLE_S,
    ) -> None:
        self._broker = broker
        self._buffer_bytes = buffer_bytes
        self._timeout_s = timeout_s
        self._idle_s = idle_s
        self._links: dict[str, Link] = {}
        self._used_at: dict[str, float] = {}
        fork.in_child(fork.Turn.CONNECTIONS, self._after_fork)

    def _after_fork(self) -> None:
        self.close()
        self._links.clear()

    def at(self, key: str) -> Link:
        """The link to the server that holds a key."""
        node = self._broker.node(key)
        link = self._links.get(node)
        if link is None:
            link = self._links[node] = self._broker.link(
                key, timeout_s=self._timeout_s, buffer_bytes=self._buffer_bytes
            )
        now = mono_s()
        if now - self._used_at.get(node, now) > self._idle_s:
            link.drop_if_ended()
        self._used_at[node] = now
        return link

    def pipeline(self, calls: Sequence[Prepared]) -> list[Reply]:
        """Sends prepared commands, each to the server that holds its key, and answers their replies in this order; errors stay
        in the list as exceptions."""
        if not self._broker.is_cluster:
            return self.at("").pipeline([packed for _, packed in calls]) if calls else []
        by_link: dict[Link, list[int]] = {}
        for position, (key, _) in enumerate(calls):
            by_link.setdefault(self.at(key), []).append(position)
        for link, positions in by_link.items():
            link.send(b"".join([calls[position][1] for position in positions]))
        replies: list[Reply] = [None] * len(calls)
        for link, positions in by_link.items():
            answers = link.answers([calls[position][1] for position in positions])
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


class Pool:
    """Links that threads share: each is one thread's while it is borrowed. No lock: a signal handler may borrow one in the
    midst of all this. ``around``: what is around each call."""

    def __init__(self, broker: Broker, around: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self.broker = broker
        self._around = around
        self._idle: dict[str, list[Link]] = {}
        fork.in_child(fork.Turn.CONNECTIONS, self.close)

    def idle(self, key: str) -> list[Link]:
        """Those that nobody uses of the server that holds a key; for who takes one itself, and puts it back."""
        try:
            node = self.broker.node(key)
        except BrokerUnavailable as exc:
            raise not_done(exc) from None
        return self._idle.setdefault(node, [])

    def new(self, key: str) -> Link:
        """One to the server that holds a key, for who found none."""
        try:
            return self.broker.link(key)
        except BrokerUnavailable as exc:
            raise not_done(exc) from None

    @contextmanager
    def borrow(self, key: str) -> Iterator[Link]:
        """A link to the server that holds a key."""
        idle = self.idle(key)
        try:
            link = idle.pop()
        except IndexError:
            link = self.new(key)
        try:
            with self._around():
                yield link
        except BaseException as exc:
            if isinstance(exc, (*REPLIES, ConfigError)):
                idle.append(link)
            else:
                # It may still owe an answer, which its next user must not read; on a Cluster it may be another node's.
                link.close()
            raise
        idle.append(link)

    def once_more(self, do: Callable[[Link], T], key: str) -> T:
        """A call over a connection that may be stale; for what may be repeated."""
        try:
            with self.borrow(key) as link:
                return do(link)
        except BrokerUnavailable:
            self.close()
            with self.borrow(key) as link:
                return do(link)

    def call(self, key: str, packed: bytes) -> Reply:
        """One prepared command that may be repeated."""
        return self.once_more(lambda link: link.call(packed), key)

    def run(self, name: str, names: Sequence[str], args: Sequence[Part]) -> Any:
        """The script ``lua/NAME.lua``, where it may be repeated."""
        return self.once_more(lambda link: link.run(name, names, args), names[0])

    def close(self) -> None:
        """Closes those that nobody uses."""
        for idle in list(self._idle.values()):
            with suppress(IndexError):  # of what lay there a moment ago, another thread may have taken the last
                while True:
                    idle.pop().close()


class Admission:
    """Whether Redis has allowed what its user needs. What its ACL refuses before that is a wrong setting, for which nobody is
    to wait: no error of a connection. To who was served it may just be put right."""

    def __init__(self) -> None:
        self.granted = False

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Around calls."""
        try:
            yield
        except Misconfigured as exc:
            if self.granted:
                raise
            raise ConfigError(str(exc)) from None
