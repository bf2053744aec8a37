"""A pipelined asyncio connection for prepared commands, shared by all calls of one event loop."""

from __future__ import annotations

import asyncio
from typing import Any

from redis.exceptions import RedisError

from ..errors import BrokerUnavailable, StreamTaskError
from .connection import Broker, translate


class Pipe:
    """One pipelined connection of one event loop."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._client = broker.async_client()
        self._conn: Any = None
        self._outgoing: list[tuple[bytes, asyncio.Future[Any]]] = []
        self._wake = asyncio.Event()
        self._task = asyncio.ensure_future(self._run())

    def call(self, packed: bytes) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._outgoing.append((packed, future))
        self._wake.set()
        return future

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            batch, self._outgoing = self._outgoing, []
            try:
                if self._conn is None:
                    self._conn = self._client.connection_pool.make_connection()
                await self._conn.send_packed_command([b"".join(p for p, _ in batch)], check_health=False)
                for _, future in batch:
                    try:
                        reply: Any = await self._conn.read_response(disable_decoding=True)
                    except (RedisError, OSError) as exc:
                        error = translate(exc, self._broker.safe_url)
                        if isinstance(error, BrokerUnavailable):
                            raise error from None
                        reply = error
                    if future.done():
                        continue
                    if isinstance(reply, Exception):
                        future.set_exception(reply)
                    else:
                        future.set_result(reply)
            except (RedisError, OSError, StreamTaskError) as exc:
                error = exc if isinstance(exc, StreamTaskError) else translate(exc, self._broker.safe_url)
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                if self._conn is not None:
                    conn, self._conn = self._conn, None
                    await conn.disconnect(nowait=True)

    async def close(self) -> None:
        self._task.cancel()
        if self._conn is not None:
            await self._conn.disconnect()
