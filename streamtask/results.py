"""Results: written by the worker before the ack, in a slot of their own, and waited for without polling."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar, overload

from .backoff import delays
from .checks import TIMEOUT, check
from .clock import mono_s, wall_ms
from .errors import AccessRefused, BrokerUnavailable, ConfigError, DecodeError, ResultTimeout, TaskError, TaskRevoked
from .redis import commands, keys, wire
from .redis.aio import News, Pipe
from .redis.links import Links, Pool, Prepared
from .redis.news import heard
from .redis.scripts import script
from .settings import Seconds
from .text import harmless, said

R = TypeVar("R", covariant=True)
T = TypeVar("T")

PENDING = "PENDING"
SUCCESS = "SUCCESS"
FAILURE = "FAILURE"
REVOKED = "REVOKED"
IGNORED = "IGNORED"

POLL_S = 0.02
"""How often asyncio programs look for a result where they can't be told of it: in memory, on a Cluster, behind Sentinels."""
NO_BACKEND = "this app keeps no results: name a backend, as in StreamTask(..., backend=True)"


Origin = tuple[str, str, bytes]
"""Which message a result is of, whatever id it has: queue, shard and entry id."""
ORIGIN = "of"


class ResultStore:
    """Where an app's results lie. ``ttl_s``: how long one is kept, in seconds."""

    def __init__(self, pool: Pool, namespace: str, app: str, ttl_s: float) -> None:
        self.pool = pool
        self.broker = pool.broker
        self._namespace = namespace
        self._app = app
        self._ttl_ms = int(ttl_s * 1000)
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Pipe, News]] = (
            weakref.WeakKeyDictionary()
        )

    def key(self, task_id: str) -> str:
        return keys.result(self._namespace, self._app, task_id)

    def pack(
        self,
        task_id: str,
        origin: Origin,
        state: str,
        result: Any = None,
        *,
        error: str | None = None,
        traceback: str | None = None,
    ) -> Prepared:
        """The command that stores a result; Redis answers -1 where another message's is there. A value that can't be
        serialised becomes a failure that says so."""
        body = {
            "state": state,
            "result": result,
            "error": error and harmless(error),
            "traceback": traceback and harmless(traceback),
            "at": wall_ms(),
            ORIGIN: origin,  # the last: scripts look at how a payload ends
        }
        try:
            payload = wire.pack_body(body)
        except BaseException as exc:  # also what the value's own methods raise
            body |= {
                "state": FAILURE,
                "result": None,
                "error": f"the task ran, but its result can't be serialised: {said(exc)}",
            }
            payload = wire.pack_body(body)
        key = self.key(task_id)
        return key, script("store_result").pack((key,), (payload, self._ttl_ms, _ending(origin)))

    def forget(self, ended: Sequence[tuple[str, Origin]]) -> None:
        """Removes the results of these messages, and of no others with their ids: they are to run again."""
        call = script("forget_result")
        keys = [self.key(task_id) for task_id, _ in ended]
        calls = [(key, call.pack((key,), (_ending(origin),))) for key, (_, origin) in zip(keys, ended, strict=True)]
        with contextlib.closing(Links(self.broker)) as links:
            for reply in links.pipeline(calls):
                if isinstance(reply, Exception):
                    raise reply

    def read(self, task_id: str) -> dict[str, Any] | None:
        key = self.key(task_id)
        payload = self.pool.call(key, commands.value(key))
        return None if payload is None else _read(task_id, payload)

    def wait(self, task_id: str, timeout_s: float | None) -> dict[str, Any]:
        """Subscribes, then reads, waits, and reads again after every reconnect, so that no result is missed."""
        deadline = None if timeout_s is None else mono_s() + timeout_s
        waits = delays(0.05, 1.0)
        while True:
            try:
                found = self._wait_once(task_id, deadline)
                if found is not None:
                    return found
            except AccessRefused:
                raise
            except BrokerUnavailable:
                if deadline is not None and mono_s() >= deadline:
                    raise
                time.sleep(next(waits))
            if deadline is not None and mono_s() >= deadline:
                raise ResultTimeout(f"no result of task {task_id} within {timeout_s} s")

    async def await_(self, task_id: str, timeout_s: float | None) -> dict[str, Any]:
        """As ``wait``, for asyncio: all waits of an event loop hear of their results over one connection."""
        deadline = None if timeout_s is None else mono_s() + timeout_s
        waits = delays(0.05, 1.0)
        while True:
            try:
                found = await self._await_once(task_id, deadline)
                if found is not None:
                    return found
            except AccessRefused:
                raise
            except BrokerUnavailable:
                if deadline is not None and mono_s() >= deadline:
                    raise
                await asyncio.sleep(next(waits))
            if deadline is not None and mono_s() >= deadline:
                raise ResultTimeout(f"no result of task {task_id} within {timeout_s} s")

    async def _await_once(self, task_id: str, deadline: float | None) -> dict[str, Any] | None:
        """None: not yet; ask again."""
        if not self.broker.has_async_client:
            found = await asyncio.to_thread(self.read, task_id)
            if found is None:
                await asyncio.sleep(POLL_S)
            return found
        pipe, news = self._here()
        channel, event = self.key(task_id).encode(), asyncio.Event()
        events = news.events.setdefault(channel, set())
        events.add(event)
        try:
            await news.hear(channel)
            while True:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(event.wait(), None if deadline is None else max(0.0, deadline - mono_s()))
                event.clear()
                payload = await pipe.call(commands.value(channel))
                if payload is not None:
                    return _read(task_id, payload)
                if not news.connected or (deadline is not None and mono_s() >= deadline):
                    return None
        finally:
            events.discard(event)
            if not events and news.events.get(channel) is events:
                del news.events[channel]
                await news.leave(channel)

    def _here(self) -> tuple[Pipe, News]:
        loop = asyncio.get_running_loop()
        found = self._loops.get(loop)
        if found is None:
            for ended in [other for other in self._loops if other.is_closed()]:
                del self._loops[ended]
            found = self._loops[loop] = Pipe(self.broker), News(self.broker)
        return found

    def _wait_once(self, task_id: str, deadline: float | None) -> dict[str, Any] | None:
        with heard(self.broker, self.key(task_id)) as wait:
            while True:
                came = wait(30.0 if deadline is None else max(0.0, min(30.0, deadline - mono_s())))
                # The confirmation that it is heard, the news of the result, or a quiet half minute, in which a connection may
                # have died without a word.
                found = self.read(task_id)
                if found is not None or (not came and deadline is not None and mono_s() >= deadline):
                    return found


def _ending(origin: Origin) -> bytes:
    return wire.pack_body(ORIGIN) + wire.pack_body(origin)


def _read(task_id: str, payload: bytes) -> dict[str, Any]:
    try:
        found = wire.unpack_body(payload)
    except Exception as exc:
        raise DecodeError(
            f"what is stored as the result of task {task_id} can't be decoded: {said(exc)[:500]}"
        ) from exc
    if not (type(found) is dict and {"state", "result", "error", "traceback"} <= found.keys()):
        raise DecodeError(f"what is stored as the result of task {task_id} is no result")
    return found


def _timeout_s(timeout: object) -> float | None:
    return None if timeout is None else check("timeout", TIMEOUT, timeout)


class Revoker(Protocol):
    def __call__(self, task_id: str) -> None: ...


class AsyncResult(Generic[R]):
    """A handle on a sent message. ``id`` is the task id; ``R`` is what its function returns. ``store``: where its result will
    be, or why there will be none."""

    __slots__ = ("_id", "_revoke", "_store", "stored")

    def __init__(
        self,
        task_id: bytes | str,
        store: ResultStore | str,
        revoke: Callable[[str], None] | None = None,
        stored: bool = True,
    ) -> None:
        self._id = task_id  # made text when somebody asks for it
        self._store = store
        self._revoke = revoke
        self.stored = stored
        """False if the call's ``dedupe_id`` was known, and so nothing was stored."""

    @property
    def id(self) -> str:
        if isinstance(self._id, bytes):
            self._id = wire.id_text(self._id)
        return self._id

    def _results(self) -> ResultStore:
        if isinstance(self._store, str):
            raise ConfigError(self._store)
        return self._store

    @overload
    def get(self: AsyncResult[Awaitable[T]], timeout: Seconds | None = None) -> T: ...
    @overload
    def get(self, timeout: Seconds | None = None) -> R: ...
    def get(self, timeout: Seconds | None = None) -> Any:
        """Waits for the result and returns it, None for a task that raised ``Ignore``. ``timeout`` in seconds; None waits for
        ever.

        Raises ``TaskError`` if the task failed for good, ``TaskRevoked``, ``ResultTimeout``, ``BrokerUnavailable``; and
        ``ConfigError`` at once where no result is kept.
        """
        return self._value(self._results().wait(self.id, _timeout_s(timeout)))

    @overload
    async def aget(self: AsyncResult[Awaitable[T]], timeout: Seconds | None = None) -> T: ...
    @overload
    async def aget(self, timeout: Seconds | None = None) -> R: ...
    async def aget(self, timeout: Seconds | None = None) -> Any:
        """As ``get``, for asyncio."""
        return self._value(await self._results().await_(self.id, _timeout_s(timeout)))

    def _value(self, found: Mapping[str, Any]) -> Any:
        if found["state"] in (SUCCESS, IGNORED):
            return found["result"]
        kind = TaskRevoked if found["state"] == REVOKED else TaskError
        raise kind(f"task {self.id}: {found['error']}", traceback=found["traceback"])

    @property
    def state(self) -> str:
        """``PENDING`` (also for an unknown id), ``SUCCESS``, ``FAILURE``, ``REVOKED`` or ``IGNORED``."""
        found = self._results().read(self.id)
        return PENDING if found is None else str(found["state"])

    def ready(self) -> bool:
        return self.state != PENDING

    def successful(self) -> bool:
        return self.state == SUCCESS

    def failed(self) -> bool:
        return self.state == FAILURE

    @property
    def traceback(self) -> str | None:
        found = self._results().read(self.id)
        return None if found is None else found["traceback"]

    def revoke(self) -> None:
        """Keeps the message from running, if it has not started when the workers hear of it (within about a second)."""
        if self._revoke is None:
            raise ConfigError("this result knows no app: use app.AsyncResult(task_id, queue=...)")
        self._revoke(self.id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AsyncResult) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<AsyncResult {self.id}>"
