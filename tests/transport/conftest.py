"""Fixtures of the transport's tests: kombu connections that are closed at the end, each test with a namespace of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.fix_proxy import Proxy
from tests.fix_redis import RedisServer
from tests.transport.fix_servers import certificates, redis_cluster, sentinels, tls_server  # noqa: F401
from tests.transport.kit import Kit


@pytest.fixture
def make_kit() -> Iterator[Any]:
    """``make_kit(server_or_proxy)`` gives a Kit; all connections are closed at the end."""
    made: list[Kit] = []

    def make(server: RedisServer | Proxy, **options: Any) -> Kit:
        made.append(Kit(server, **options))
        return made[-1]

    yield make
    for kit in made:
        kit.close()


@pytest.fixture
def kit(make_kit: Any, redis_server: RedisServer) -> Kit:
    """On the newest server."""
    kit: Kit = make_kit(redis_server)
    return kit


@pytest.fixture
def kit_all(make_kit: Any, redis_server_all: RedisServer) -> Kit:
    """On each version."""
    kit: Kit = make_kit(redis_server_all)
    return kit
