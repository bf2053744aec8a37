"""The generic classes of kombu's ``t/integration/common.py`` on a broker that the environment names.

Collected by ``python -m tests.conformance`` only, with kombu's ``t`` package on the path. The priorities are those of
kombu's redis suite: a low number comes first, and ``drain_events`` hands out one message.
"""

from __future__ import annotations

import os

import kombu
import pytest
from t.integration import common, test_redis  # type: ignore[import-not-found]

BROKER = os.environ["TEST_BROKER"]
NOBODY = os.environ["TEST_NOBODY"]  # the same scheme, a port on which nobody listens


@pytest.fixture(params=[None, {"global_keyprefix": "_prefixed_"}], ids=["plain", "prefixed"])
def connection(request: pytest.FixtureRequest) -> kombu.Connection:
    return kombu.Connection(BROKER, transport_options=request.param)


@pytest.fixture
def invalid_connection() -> kombu.Connection:
    return kombu.Connection(NOBODY)


@pytest.fixture
def failover_connection() -> kombu.Connection:
    return kombu.Connection(f"{NOBODY};{BROKER}")


class TestBasicFunctionality(common.BasicFunctionality):
    pass


class TestExchangeTypes(common.BaseExchangeTypes):
    pass


class TestTimeToLive(common.BaseTimeToLive):
    pass


class TestPriority(test_redis.test_RedisPriority):
    pass


class TestMessage(common.BaseMessage):
    pass


class TestEventLoop(common.BaseEventLoop):
    pass


class TestFailover(common.BaseFailover):
    pass
