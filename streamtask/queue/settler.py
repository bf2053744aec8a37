"""The connection on which a process acknowledges: a call for each shard may be on its way, and its answer is taken when it
comes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from ..errors import BrokerUnavailable, LeaseLost, ReplyError, StreamTaskError
from ..redis.connection import Broker
from ..redis.link import Link
from ..redis.scripts import script
from .consumer import ShardConsumer


class Settler:
    """See the module. Used by one thread."""

    def __init__(self, broker: Broker) -> None:
        self.link = broker.link()
        self._where = broker.safe_url
        self._asked: deque[ShardConsumer] = deque()  # whose calls are on their way, in order

    def send(self, consumer: ShardConsumer) -> None:
        """Sends the call that settles the first of what a shard has finished; none of its calls is on its way."""
        packed = consumer.begin_settle()
        self._asked.append(consumer)
        self.link.send(packed)

    def take(self, link: Link) -> Iterator[tuple[ShardConsumer, LeaseLost | ReplyError]]:
        """Takes the answers that have come; waits for one. Shows what was refused: that is sent again. Raises
        ``BrokerUnavailable``."""
        if not self._asked:
            raise BrokerUnavailable(f"Redis at {self._where} closed the connection")
        while self._asked:
            answer = self.link.read_quietly()
            consumer = self._asked.popleft()
            try:
                if not isinstance(answer, StreamTaskError):
                    consumer.end_settle(answer)
                elif isinstance(answer, ReplyError) and answer.code == "NOSCRIPT":
                    consumer.settle_lost()
                    link.call(script("settle").pack_load())
                else:
                    raise answer
            except (LeaseLost, ReplyError) as exc:
                consumer.settle_lost()
                yield consumer, exc
            except StreamTaskError:
                consumer.settle_lost()
                raise
            if not self.link.buffered():
                return

    def drop(self) -> None:
        """Closes the connection. What was not answered is sent again, before anything later."""
        self.link.close()
        for consumer in self._asked:
            consumer.settle_lost()
        self._asked.clear()
