"""A pipelined asyncio connection for prepared commands, shared by all calls of one event loop."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from redis.exceptions import RedisError

from ..clock import mono_s
from ..errors import BrokerUnavailable, StreamTaskError
from . import commands
from .connection import Broker
from .link import not_done, too_late, translate

QUIET_S = 30.0
"""A connection that says nothing for so long may have died without a word."""


class Pipe:
    """One pipelined connection of one event loop. It ends with its loop, which cancels what still runs then."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._client = broker.async_client()
        self._conn: Any = None
        self._outgoing: list[tuple[bytes, asyncio.Future[Any]]] = []
        self._until: dict[asyncio.Future[Any], float] = {}
        self._wake = asyncio.Event()
        self._task = asyncio.ensure_future(self._run())

    def call(self, packed: bytes, until: float | None = None) -> asyncio.Future[Any]:
        """The reply, some time. ``until``: not to be sent later than that."""
        if self._task.done():
            # Cancelled with other tasks of a loop that goes on: without this, calls would wait for ever.
            self._task = asyncio.ensure_future(self._run())
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._outgoing.append((packed, future))
        if until is not None:
            self._until[future] = until
            future.add_done_callback(self._until.pop)
        self._wake.set()
        return future

    async def _run(self) -> None:
        batch: list[tuple[bytes, asyncio.Future[Any]]] = []
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                batch, self._outgoing = self._outgoing, []
                try:
                    await self._exchange(batch)
                except Exception as exc:
                    # Whatever it is, those that wait for these replies must hear of it.
                    self._fail(batch, self._error(exc))
                    await self._disconnect()
        finally:
            self._fail(batch + self._outgoing, BrokerUnavailable("the event loop's tasks were cancelled"))
            self._outgoing = []
            await self._disconnect()

    async def _exchange(self, batch: list[tuple[bytes, asyncio.Future[Any]]]) -> None:
        if self._conn is None:
            self._conn = self._client.connection_pool.make_connection()
            try:
                await self._conn.connect()
            except (RedisError, OSError) as exc:
                raise not_done(self._error(exc)) from None
        if self._until:
            batch = self._in_time(batch)
        await self._conn.send_packed_command([b"".join(p for p, _ in batch)], check_health=False)
        refused: BrokerUnavailable | None = None
        for _, future in batch:
            try:
                reply: Any = await self._conn.read_response(disable_decoding=True)
            except (RedisError, OSError) as exc:
                reply = self._error(exc)
                if isinstance(reply, BrokerUnavailable):
                    if reply.in_doubt:
                        raise reply from None
                    refused = reply  # this call alone: those behind it may have been done
            if future.done():
                continue
            if isinstance(reply, Exception):
                future.set_exception(reply)
            else:
                future.set_result(reply)
        if refused is not None:
            raise refused  # by a server to connect to anew

    def _in_time(self, batch: list[tuple[bytes, asyncio.Future[Any]]]) -> list[tuple[bytes, asyncio.Future[Any]]]:
        """Without those that are late, also for what it took to connect."""
        now = mono_s()
        late = {future for _, future in batch if self._until.get(future, now) < now}
        self._fail([one for one in batch if one[1] in late], too_late())
        return [one for one in batch if one[1] not in late]

    def _error(self, exc: Exception) -> StreamTaskError:
        return exc if isinstance(exc, StreamTaskError) else translate(exc, self._broker.safe_url)

    @staticmethod
    def _fail(batch: list[tuple[bytes, asyncio.Future[Any]]], error: StreamTaskError) -> None:
        for _, future in batch:
            if not future.done() and not future.get_loop().is_closed():
                future.set_exception(error)

    async def _disconnect(self) -> None:
        if self._conn is not None:
            conn, self._conn = self._conn, None
            await conn.disconnect(nowait=True)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


class News:
    """One connection of one event loop that hears channels. ``events``, by channel: set when it is heard from now on, at each
    message of it, and when the connection is lost, after which it is to be heard again."""

    def __init__(self, broker: Broker) -> None:
        self._where = broker.safe_url
        self._client = broker.async_client()
        self._conn: Any = None
        self._saying = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self.events: dict[bytes, set[asyncio.Event]] = {}

    @property
    def connected(self) -> bool:
        return self._conn is not None

    async def hear(self, channel: bytes) -> None:
        """Raises ``BrokerUnavailable`` or ``ConfigError``."""
        try:
            async with self._saying:
                if self._conn is None:
                    conn = self._client.connection_pool.make_connection()
                    await conn.connect()
                    self._conn, self._task = conn, asyncio.ensure_future(self._listen(conn))
                await self._conn.send_packed_command([commands.subscribe([channel])], check_health=False)
        except (RedisError, OSError) as exc:
            raise translate(exc, self._where) from None

    async def leave(self, channel: bytes) -> None:
        """Hears no more of a channel, if nobody waits for it."""
        async with self._saying:
            if self._conn is not None and channel not in self.events:
                with contextlib.suppress(RedisError, OSError):
                    await self._conn.send_packed_command([commands.unsubscribe([channel])], check_health=False)

    async def _listen(self, conn: Any) -> None:
        try:
            while True:
                _, channel, _ = await conn.read_response(disable_decoding=True, timeout=QUIET_S)
                self._set(channel)
        except Exception:
            pass  # those that wait connect anew, and meet what is wrong
        finally:
            if self._conn is conn:
                self._conn = None
            for channel in self.events:
                self._set(channel)
            await conn.disconnect(nowait=True)

    def _set(self, channel: bytes) -> None:
        for event in self.events.get(channel, ()):
            event.set()
