"""Redis is there and refuses, while somebody without an event loop asks for a message."""

from __future__ import annotations

from queue import Empty

import pytest

from tests.fix_refusals import FAULTS, refusing
from tests.parts import sampled


@pytest.mark.old_redis("BUSY", "MISCONF", "OOM")
@pytest.mark.parametrize("code", sampled([code for code in FAULTS if code != "CLUSTERDOWN"], "BUSY", "OOM"))
def test_simple_queue_get(own_server_all, make_kit, code):
    """It says nothing but that there is no message, or an error after which kombu connects anew; and goes on afterwards."""
    connection = make_kit(own_server_all).connect()
    queue = connection.SimpleQueue("q")
    errors = (*connection.connection_errors, *connection.channel_errors)
    queue.put("first")
    message = queue.get(timeout=10)
    assert message.payload == "first"
    message.ack()
    queue.put("second")
    with refusing(own_server_all, code):
        for _ in range(3):
            try:
                message = queue.get(timeout=0.2)
            except (Empty, *errors):
                continue
            # Above maxmemory what is there is given all the same, and where a reader needs no write.
            assert code == "OOM", "it was given"
            break
    for _ in range(20):
        if message.payload == "second":
            break
        try:
            message = queue.get(timeout=2)
        except (Empty, *errors):
            continue
    assert message.payload == "second"
    message.ack()
    queue.put("third")
    assert queue.get(timeout=10).payload == "third"
    queue.close()
