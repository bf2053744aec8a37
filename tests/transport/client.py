"""A keeper's client under test: in the test's own process, or, to be killed and stopped, in one of its own.

``python -m tests.transport.client URL NAME LEASE_MS`` consumes the queue "q", and writes the keeper's pid and each of its
orders as a line. With ``fork`` as the last word it has a child that holds its end of the socket.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Iterable

from streamtask.coordination.keeper import Keeper
from streamtask.coordination.lease import Lease, join_shared
from streamtask.coordination.orders import Lost, Order, Own, Release, Resume, Up, to_line
from streamtask.redis.connection import Broker
from streamtask.redis.keys import SHARED, QueueKeys
from streamtask.redis.link import pack

APP, GROUP = "kombu", "workers"


def queue_keys(queue: str = "q") -> QueueKeys:
    return QueueKeys("streamtask", APP, queue)


def make_keyed(broker: Broker, shards: int = 8, epoch: int = 0, queue: str = "q") -> None:
    """Records the queue's shards as its first keyed message does, and tells it."""
    keys = queue_keys(queue)
    link = broker.link(keys.meta)
    link.command("HSET", keys.meta, "epoch", epoch, "shards", shards)
    link.command("PUBLISH", keys.channel(GROUP), "keyed")
    link.close()


class Client:
    """Starts a keeper, and does what it says when ``pump`` is called. While ``busy`` it releases nothing."""

    def __init__(
        self, broker: Broker, name: str, lease_ms: int = 1000, handover_timeout_s: float = 5.0, queue: str = "q"
    ) -> None:
        self.broker = broker
        self.name = name
        self.lease_ms = lease_ms
        self.handover_timeout_s = handover_timeout_s
        self.queue = queue
        self.busy = False
        self.owned: dict[int, Own] = {}
        self.asked: set[int] = set()
        self.seen: list[Order] = []
        self.lost: list[int] = []
        self.shared: Lease | None = None
        self.start()

    def start(self) -> None:
        self.keeper = Keeper(
            self.broker,
            namespace="streamtask",
            app=APP,
            group=GROUP,
            incarnation=self.name,
            lease_ms=self.lease_ms,
            handover_timeout_s=self.handover_timeout_s,
            last=max(self.owned, default=0),
        )

    def consume(self, owned: Iterable[Own] = ()) -> Client:
        self.keeper.consume(self.queue, owned)
        return self

    def join(self) -> Lease:
        """Becomes a consumer of the shared stream, with an entry of its own to be seen as one."""
        keys = queue_keys(self.queue).shard(0, SHARED)
        link = self.broker.link(keys.stream)
        link.pipeline([pack("XGROUP", "CREATE", keys.stream, GROUP, "0", "MKSTREAM")])
        alive = queue_keys().alive(GROUP, keys, cluster=self.broker.is_cluster)
        self.shared = join_shared(link, keys, GROUP, self.name, self.lease_ms, alive=alive)
        link.command("XGROUP", "CREATECONSUMER", keys.stream, GROUP, self.name)
        link.close()
        self.keeper.keep(self.shared)
        return self.shared

    def pump(self) -> list[Order]:
        orders = self.keeper.orders()
        for order in orders:
            match order:
                case Own(number):
                    self.owned = {n: one for n, one in self.owned.items() if one.shard != order.shard}
                    self.owned[number] = order
                case Release(number):
                    self.asked.add(number)
                case Resume(number):
                    self.asked.discard(number)
                case Lost(number):
                    self.lost.append(self.owned.pop(number).shard)
        self.seen += [order for order in orders if not isinstance(order, Up)]
        if not self.busy:
            for number in self.asked & self.owned.keys():
                del self.owned[number]
                self.keeper.released(number)
            self.asked.clear()
        return orders

    def said(self) -> list[type]:
        return [type(order) for order in self.seen]

    @property
    def shards(self) -> list[int]:
        return sorted(order.shard for order in self.owned.values())

    def trusted(self) -> dict[int, float]:
        """Until when the keeper vouches for each shard."""
        return {order.shard: self.keeper.trusted[number] for number, order in self.owned.items()}

    @property
    def tokens(self) -> dict[int, int]:
        return {order.shard: order.token for order in self.owned.values()}


def main(url: str, name: str, lease_ms: str, *words: str) -> None:
    client = Client(Broker(url), name, int(lease_ms)).consume()
    client.join()
    if "fork" in words and os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    print("keeper", client.keeper.pid, flush=True)
    while True:
        select.select([client.keeper], [], [])
        for order in client.pump():
            print(to_line(order).decode(), end="", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
