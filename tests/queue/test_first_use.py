"""The first call of a process may be made wherever people's code runs: in a log handler, or in a signal handler that comes
in the midst of another first call."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from streamtask import StreamTask
from tests.helpers import wait_until

TIMEOUT = pytest.mark.timeout(30)


@pytest.fixture
def apps() -> Iterator[list[StreamTask]]:
    made: list[StreamTask] = []
    yield made
    for app in made:
        app.close()


def make(server, apps):
    app = StreamTask("t", broker=server.url)
    apps.append(app)

    @app.task(name="put")
    def put(n):
        pass

    return put


def stored(server) -> int:
    return server.client().xlen("streamtask:{t.default.0.shared}:stream")


@TIMEOUT
def test_a_signal_handler_sends_in_the_midst_of_the_first_call(redis_server, apps):
    put = make(redis_server, apps)
    me = threading.get_ident()

    def handler(signum, frame):
        redis_server.resume()
        put.delay(2)

    def interrupt():
        wait_until(lambda: sys._current_frames()[me].f_code.co_filename.endswith(("hiredis.py", "socket.py")), 20)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, handler)
    redis_server.pause()
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        put.delay(1)
    finally:
        redis_server.resume()
        thread.join()
        signal.signal(signal.SIGUSR2, before)
    assert stored(redis_server) == 2


class Sends(logging.Handler):
    """Sends each record as a task, as an audit trail does."""

    def __init__(self, put, first=lambda: None):
        super().__init__()
        self.put, self.first = put, first
        self.seen: list[str] = []

    def emit(self, record):
        self.seen.append(record.name)
        self.first()
        self.put.delay(len(self.seen))


@TIMEOUT
@pytest.mark.parametrize("who", ["the caller", "another thread"])
def test_a_log_handler_sends_in_the_midst_of_the_first_call(redis_server, apps, who):
    """The first call has something to log: Redis evicts keys. The handler's own lock is held by whoever logs."""
    redis_server.config_set(maxmemory="200mb", maxmemory_policy="allkeys-lru")
    put = make(redis_server, apps)
    other = threading.Thread(target=put.delay, args=(0,), daemon=True)
    started = threading.Event()

    def first() -> None:
        # Another thread is on its way to the handler, in its own first call.
        if who == "another thread" and not started.is_set():
            started.set()
            other.start()
            wait_until(lambda: put.app.broker._eviction_checked)
            wait_until(lambda: "/logging/" in sys._current_frames()[other.ident].f_code.co_filename)

    handler = Sends(put, first)
    logging.getLogger().addHandler(handler)

    def act() -> None:
        if who == "the caller":
            put.delay(0)
        else:
            logging.getLogger("mine").warning("something")

    thread = threading.Thread(target=act, daemon=True)
    try:
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
        if who == "another thread":
            other.join(20)
            assert not other.is_alive()
    finally:
        logging.getLogger().removeHandler(handler)
    assert "streamtask.redis" in handler.seen
    wait_until(lambda: stored(redis_server) == len(handler.seen) + 1)
