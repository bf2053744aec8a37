"""What is told on a channel, for who waits for it in a thread; programs on an event loop have ``aio.News``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .connection import Broker


@contextmanager
def heard(broker: Broker, channel: str) -> Iterator[Callable[[float], bool]]:
    """Hears a channel over a connection of its own. What it gives waits for the next word, for so many seconds at most, and
    answers whether one came; the first is that from now on it is heard. Raises ``BrokerUnavailable``, ``ConfigError``."""
    with broker.wrapped():
        pubsub = broker.client().pubsub()
        try:
            pubsub.subscribe(channel)
            yield lambda timeout_s: pubsub.get_message(timeout=timeout_s) is not None
        finally:
            pubsub.close()
