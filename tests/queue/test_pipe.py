"""One connection for all calls of an event loop: what one of them is answered says nothing of the others."""

from __future__ import annotations

import asyncio

from streamtask.errors import BrokerUnavailable
from streamtask.redis.aio import Pipe
from streamtask.redis.connection import Broker
from streamtask.redis.link import pack


def test_a_refused_call_says_nothing_of_those_sent_with_it(redis_server):
    client = redis_server.client()
    client.delete("n")
    broker = Broker(redis_server.url)
    refused = pack("EVAL", "return redis.error_reply('BUSY Redis is busy running a script.')", 0)

    async def main():
        pipe = Pipe(broker)
        calls = [pipe.call(pack("INCR", "n")), pipe.call(refused), pipe.call(pack("INCR", "n"))]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        await pipe.close()
        return answers

    first, second, third = asyncio.run(main())
    broker.close()
    assert first == 1
    assert isinstance(second, BrokerUnavailable)
    assert not second.in_doubt
    assert third == 2
