"""An evicting Redis is said loudly by whoever uses a queue first, producer or worker."""

from __future__ import annotations

import logging

import pytest

from streamtask import StreamTask


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_an_evicting_redis_is_said_loudly_and_once(redis_server_all, caplog, policy):
    redis_server_all.config_set({"maxmemory": "500mb", "maxmemory-policy": policy})
    app = StreamTask("app", broker=redis_server_all.url)
    task = app.task(lambda: None, name="t")

    with caplog.at_level(logging.CRITICAL, "streamtask"):
        task.delay()
        app.queue("other").shape()

    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert policy in said[0]
    assert "noeviction" in said[0]
    app.close()


def test_a_policy_without_a_limit_evicts_nothing(redis_server, caplog):
    redis_server.config_set({"maxmemory": "0", "maxmemory-policy": "allkeys-lru"})
    app = StreamTask("app", broker=redis_server.url)

    with caplog.at_level(logging.CRITICAL, "streamtask"):
        app.queue("default").shape()

    assert not caplog.records
    app.close()
