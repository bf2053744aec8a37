"""Wrong URLs and what answers there: one line that names the URL, without its password, and says what to do."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from streamtask import BrokerUnavailable, ConfigError, StreamTask, StreamTaskError
from streamtask.redis.connection import Broker
from tests.fix_redis import RedisServer


@pytest.fixture
def web_server() -> Iterator[int]:
    """Answers whatever it is asked as a web server does."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(4096)
                    connection.sendall(
                        b"<!DOCTYPE HTML>\r\n<html><head><title>Error response</title></head></html>\r\n"
                    )

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


SAID = {
    "redis://{at}/0?protocol=3": "sets protocol, and streamtask needs '2'",
    "redis://{at}/0?decode_responses=true": "sets decode_responses, and streamtask needs 'false'",
    "redis://{at}/0?encoding=latin-1": "sets encoding",
    "redis://{at}/0?nonsense=1": "its option nonsense is none that a connection has",
    "redis://{at}/0?ssl=true": "for TLS it begins with rediss://",
    "redis://{at}/0?socket_timeout=soon": "can't be used: Invalid value for 'socket_timeout'",
    "redis://{at}/99": "has no database of that number",
    "redis://{at}?db=99": "has no database of that number",
    "redis://{at}/0?client_name=a%20b": "refuses the connection: Client names cannot contain spaces",
    "redis+sentinel://{at}/mymaster/0": "is no Sentinel",
    "redis+cluster://{at}/0": "is no Redis Cluster",
}


@pytest.mark.parametrize("url", SAID)
def test_a_wrong_url(redis_server_all: RedisServer, url: str) -> None:
    redis_server_all.client().execute_command("ACL", "SETUSER", "ann", "on", ">hunter2", "~*", "&*", "+@all")
    full = url.format(at=f"ann:hunter2@127.0.0.1:{redis_server_all.port}")
    for ask in (lambda broker: broker.link().command("PING"), Broker.check_version):
        if "client_name" in url and ask is Broker.check_version:
            continue  # redis-py's own client does not say what it was about
        with pytest.raises(ConfigError) as found:
            ask(Broker(full, timeout_s=2))
        text = str(found.value)
        assert SAID[url] in text
        assert "127.0.0.1:" in text
        assert "hunter2" not in text
        assert "\n" not in text


def test_what_may_be_said_twice(redis_server: RedisServer) -> None:
    broker = Broker(f"{redis_server.url}?protocol=2&decode_responses=False&encoding=utf-8", timeout_s=2)
    assert broker.link().command("PING") == b"PONG"


def test_a_web_server_at_the_port(web_server: int) -> None:
    app = StreamTask("a", broker=f"redis://:hunter2@127.0.0.1:{web_server}/0", send_timeout=0.2)
    task = app.task(lambda: None, name="t")
    for ask in (task.delay, app.broker.check_version, app.broker.link().connect):
        with pytest.raises(BrokerUnavailable) as found:
            ask()
        assert "is no Redis" in str(found.value)
        assert "hunter2" not in str(found.value)
    app.close()


def test_a_call_that_waits_says_so_at_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """And not by the error at its end, nor once for each of many calls."""
    monkeypatch.setattr("streamtask.queue.calls._said", {})
    app = StreamTask("a", broker="redis://:hunter2@127.0.0.1:1/0", send_timeout=1.2)
    task = app.task(lambda: None, name="t")
    for _ in range(2):
        with pytest.raises(StreamTaskError):
            task.delay()
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("streamtask.producer", "WARNING")
    assert "a produce call waits, for up to 1." in record.getMessage()
    assert "redis://***@127.0.0.1:1/0 can't be reached" in record.getMessage()
