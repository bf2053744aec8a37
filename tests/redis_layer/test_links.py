"""Connections that threads share."""

from __future__ import annotations

import inspect
import sys

from streamtask.redis.connection import Broker
from streamtask.redis.link import pack
from streamtask.redis.links import Pool


def test_a_pool_is_closed_while_another_thread_takes_from_it(redis_server):
    """In an outage each thread closes what lies there, and may find that another has just done so."""
    broker = Broker(redis_server.url)
    pool = Pool(broker)
    assert pool.call("k", pack("PING")) == b"PONG"
    idle = pool.idle("k")
    (link,) = idle
    lines, first = inspect.getsourcelines(Pool.close)

    def other_thread(frame, event, arg):
        """It has its turn whenever a link is about to be taken."""
        if frame.f_code is Pool.close.__code__ and event == "line" and ".pop()" in lines[frame.f_lineno - first]:
            idle.clear()
        return other_thread

    before = sys.gettrace()
    sys.settrace(other_thread)
    try:
        pool.close()
    finally:
        sys.settrace(before)
    link.close()
    broker.close()
    assert pool.idle("k") == []
