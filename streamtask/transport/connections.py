"""The connections of a session: those that its consuming goes over, and some for calls that go beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import BrokerUnavailable, ConfigError, Misconfigured
from ..redis.connection import Broker
from ..redis.link import LARGE, REPLIES, Link
from ..redis.links import Links


class Connections:
    """See the module."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self._begin()

    def _begin(self) -> None:
        self.links = Links(self.broker, self.broker.timeout_s, buffer_bytes=LARGE)
        """To the servers of the streams that are consumed; under the session's lock."""
        self._idle: list[Link] = []
        self.served = False
        """Whether a message has come, or the wait for one has ended: Redis has allowed what consuming needs."""

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """Around calls. What its ACL refuses is a wrong setting for who was never served, and nobody is to wait for it: that is
        no error of a connection. For who runs it may just be put right."""
        try:
            yield
        except Misconfigured as exc:
            if self.served:
                raise
            raise ConfigError(str(exc)) from None

    def after_fork(self) -> None:
        """In the child: closes its copies of the parent's sockets, and has none yet."""
        self.links.close()
        for link in self._idle:
            link.close()
        self._begin()

    @contextmanager
    def borrow(self, key: str = "") -> Iterator[Link]:
        """A link to the server of a key, for calls that need not wait for their session's lock."""
        if self.broker.is_cluster:
            link = self.broker.link(key)
            try:
                with self.at_start():
                    yield link
            finally:
                link.close()
            return
        try:
            link = self._idle.pop()
        except IndexError:
            link = self.broker.link()
        try:
            with self.at_start():
                yield link
        except BaseException as exc:
            if not isinstance(exc, (*REPLIES, ConfigError)):
                link.close()
            raise
        finally:
            self._idle.append(link)

    def run(self, name: str, names: Sequence[str], args: Sequence[Any]) -> Any:
        """Calls a script once more if its connection turns out to be stale: for scripts that may be repeated."""
        return self.once_more(lambda link: link.run(name, names, args), names[0])

    def once_more(self, call: Callable[[Link], Any], key: str = "") -> Any:
        """A call over a connection that may be stale; for what may be repeated."""
        try:
            with self.borrow(key) as link:
                return call(link)
        except BrokerUnavailable:
            for idle in self._idle:
                idle.close()
            with self.borrow(key) as link:
                return call(link)
