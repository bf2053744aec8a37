"""A Redis Cluster: its nodes, and where its slots are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from .. import fork
from ..clock import mono_s
from .address import Address

SLOTS_S = 0.1
"""A Cluster is asked where its slots are at most so often, in seconds."""

_nodes: dict[str, list[tuple[str, int]]] = {}
"""By URL, as this process saw them last: they answer when those that the URL names do not."""


class Cluster:
    """What one broker knows of its Cluster. redis-py's client keeps where the slots are, and asks for it here alone."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._stale = False
        self._asked_at = float("-inf")
        self._asking = threading.Lock()
        fork.in_child(fork.Turn.LOCKS, self._after_fork)

    def _after_fork(self) -> None:
        self._asking = threading.Lock()  # a thread that was asking did not come along

    @property
    def nodes(self) -> list[tuple[str, int]]:
        """Host and port of each node, as this process saw them last."""
        return _nodes.get(self._address.url, [])

    @nodes.setter
    def nodes(self, nodes: list[tuple[str, int]]) -> None:
        _nodes[self._address.url] = nodes

    def _remember(self, client: Any) -> None:
        self.nodes = [(node.host, node.port) for node in client.get_nodes()]

    def open(self, options: dict[str, Any]) -> Any:
        """redis-py's client, connected to all nodes."""
        from redis.cluster import ClusterNode, RedisCluster

        named = [(host or "localhost", port or 6379) for host, port in self._address.nodes[1:]]
        client = RedisCluster.from_url(
            self._address.first_url,
            startup_nodes=[ClusterNode(host, port) for host, port in dict.fromkeys([*named, *self.nodes])],
            **options,
        )
        self._remember(client)
        return client

    def forget(self) -> None:
        """It is asked anew, at the next use, where its slots are. Links do this when they fail."""
        self._stale = True

    def up_to_date(self, client: Any, reopen: Callable[[Any], Any]) -> Any:
        """The client, with what it knows of the slots: one thread asks, which may take long; the others go on with what is
        known. ``reopen`` puts another in the place of a client none of whose nodes is there any more."""
        if not self._stale or mono_s() - self._asked_at < SLOTS_S or not self._asking.acquire(blocking=False):
            return client
        try:
            self._stale = False
            try:
                client.nodes_manager.initialize()
                self._remember(client)
            except Exception:
                client = reopen(client)  # the URL's name may stand for others by now
            return client
        finally:
            self._asked_at = mono_s()
            self._asking.release()


def node_of(client: Any, key: str) -> tuple[str, Any]:
    """The node that holds a key: its name, and redis-py's client of it."""
    node = client.get_node_from_key(key)
    return node.name, client.get_redis_connection(node)
