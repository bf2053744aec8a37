"""The connection on which a worker process acknowledges: a call for each of its shards may be on its way, and its answer is
taken when it comes. On a Cluster it serves the shards of one server.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from math import inf

from ..errors import BrokerUnavailable, LeaseLost, ReplyError, StreamTaskError
from ..redis.connection import Broker
from ..redis.link import Link
from ..redis.links import Links
from ..redis.scripts import script
from .consumer import ShardConsumer


class Acknowledger:
    """See the module. Used by one thread."""

    def __init__(self, broker: Broker) -> None:
        self._links = Links(broker, idle_s=inf)
        self.link: Link
        """The connection, after the first call was sent."""
        self._where = broker.safe_url
        self._asked: deque[ShardConsumer] = deque()  # whose calls are on their way, in order
        self._unsent: list[bytes] = []

    def ask(self, consumer: ShardConsumer) -> None:
        """Makes the call that settles the first of what a shard has finished; none of its calls is on its way. It is sent with
        those of others."""
        link = self._links.at(consumer.fence.keys.stream)
        if self._unsent and link is not self.link:
            self.send()
        self.link = link
        packed = consumer.settler.begin()
        self._asked.append(consumer)
        self._unsent.append(packed)

    def send(self) -> bool:
        """Sends the calls. False if there are none."""
        if not self._unsent:
            return False
        packed = b"".join(self._unsent)
        self._unsent = []
        self.link.send(packed)
        return True

    def receive(self) -> Iterator[tuple[ShardConsumer, LeaseLost | ReplyError]]:
        """Takes the answers that have come; waits for one. Shows what was refused: that is sent again. Raises
        ``BrokerUnavailable``."""
        self.send()
        if not self._asked:
            raise BrokerUnavailable(f"Redis at {self._where} closed the connection")
        while self._asked:
            answer = self.link.read_quietly()
            consumer = self._asked.popleft()
            settler = consumer.settler
            try:
                if not isinstance(answer, StreamTaskError):
                    settler.end(answer)
                elif isinstance(answer, ReplyError) and answer.code == "NOSCRIPT":
                    settler.lost()
                    consumer.fence.link.call(script("settle").pack_load())
                else:
                    raise answer
            except (LeaseLost, ReplyError) as exc:
                settler.lost()
                yield consumer, exc
            except StreamTaskError:
                settler.lost()
                raise
            if not self.link.buffered():
                return

    def drop(self) -> None:
        """Closes the connection. What was not answered is sent again, before anything later."""
        self._links.close()
        self._unsent = []
        for consumer in self._asked:
            consumer.settler.lost()
        self._asked.clear()
