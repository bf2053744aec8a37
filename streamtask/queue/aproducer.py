"""Produce calls of asyncio programs.

All calls of an event loop share one connection: those that are made in the same turn of the loop go out in one write,
and the replies come back in order. A lost connection fails none of them: each is repeated with its id.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import Any

from ..clock import mono_s
from ..errors import BrokerUnavailable, QueueFull, ReplyError
from ..redis.aio import Pipe
from ..redis.connection import Broker
from ..redis.scripts import by_sha
from .calls import Call
from .producer import Producer


class AsyncProducer:
    """Stores messages for callers on event loops; one ``Pipe`` per loop."""

    def __init__(self, producer: Producer, broker: Broker) -> None:
        self._producer = producer
        self._broker = broker
        self._pipes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Pipe] = weakref.WeakKeyDictionary()

    def _pipe(self) -> Pipe:
        loop = asyncio.get_running_loop()
        pipe = self._pipes.get(loop)
        if pipe is None:
            # A pipe refers to its loop, so that the weak keys alone would keep the ended ones for ever.
            for ended in [other for other in self._pipes if other.is_closed()]:
                del self._pipes[ended]
            pipe = self._pipes[loop] = Pipe(self._broker)
        return pipe

    async def send(self, call: Call, timeout_s: float | None = None) -> bool:
        """As ``Producer.send``."""
        producer = self._producer
        if not self._broker.has_async_client:
            return await asyncio.to_thread(producer.send, call, timeout_s)
        started = mono_s()
        while True:
            try:
                if not call.queue.declared:  # any more: after a flush, or a reshard
                    await asyncio.to_thread(call.queue.shape)
                target = producer.target(call.queue, call.shard)
                answer = await self._answer(call.next_try(target), producer.until(call))
                outcome = call.outcome(target, answer)
                if isinstance(outcome, bool):
                    return outcome
                error = await asyncio.to_thread(producer.refused, call, outcome)
                if error is None:
                    continue
            except (BrokerUnavailable, QueueFull) as exc:
                error = exc
            except ReplyError as exc:
                raise await asyncio.to_thread(call.queue.named, exc) from None
            await asyncio.sleep(producer.pause(call, error, timeout_s, started))

    async def _answer(self, packed: bytes, until: float | None) -> Any:
        pipe = self._pipe()
        try:
            return await pipe.call(packed, until)
        except ReplyError as exc:
            if exc.code != "NOSCRIPT":
                raise
        sha = packed.split(b"\r\n", 5)[4]
        source = by_sha()[sha].source.encode()
        await pipe.call(b"*3\r\n$6\r\nSCRIPT\r\n$4\r\nLOAD\r\n$%d\r\n%b\r\n" % (len(source), source))
        return await pipe.call(packed, until)
