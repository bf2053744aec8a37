"""From a call to a stored message: hooks, envelope, shard, and the handle on its result."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from zlib import crc32

from . import fork
from .arguments import call_options, item_arguments, many_calls
from .checks import TEXT, TIMEOUT, check
from .clock import wall_ms
from .errors import MessageTooLarge
from .middleware import Middleware, Outgoing, overriding
from .queue.aproducer import AsyncProducer
from .queue.bulk import send_many
from .queue.calls import Call, ProducerSettings
from .queue.producer import Producer, new_id, new_ids
from .queue.queues import Queue
from .queue.seen import dedupe_hash
from .redis import wire
from .redis.keys import SHARED
from .redis.links import Pool
from .results import NO_BACKEND, AsyncResult, ResultStore
from .settings import Seconds, Settings, TaskOptions
from .sharding import shard_of

MOST_QUEUES = 2048
"""Queues that an app remembers: calls may name ever new ones."""

REVOKED_MS = 86_400_000
"""For how long a task id stays revoked: a message that waits longer runs, as revoking was never promised to be for ever."""


class Sendable(Protocol):
    """What sending asks of a task."""

    name: str
    options: TaskOptions
    is_plain: bool

    def shard_key(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes | None: ...


class Sender:
    """Sends the messages of an app, whose name is ``app``. ``results``: where their results will be."""

    def __init__(
        self,
        app: str,
        settings: Settings,
        pool: Pool,
        results: ResultStore | None,
        middleware: Iterable[Middleware],
    ) -> None:
        self._app = app
        self.settings = settings
        self._before_send = overriding(middleware, "before_send")
        self._after_send = overriding(middleware, "after_send")[::-1]
        self._hooks = bool(self._before_send or self._after_send)
        self.revocations = 0
        """Grows with each one, and again when Redis has taken it."""
        self._begin(pool, results)

    def _begin(self, pool: Pool, results: ResultStore | None) -> None:
        s = self.settings
        self.results = results
        self.pool = pool
        self.producer = Producer(
            ProducerSettings(
                max_backlog=s.max_backlog,
                produce_ttl_ms=int(s.produce_ttl * 1000),
                dedupe_ttl_ms=int(s.dedupe_ttl * 1000),
                max_dedupe_ids=s.max_dedupe_ids,
                timeout_s=s.send_timeout,
            ),
            self.pool,
        )
        self._async_producer: AsyncProducer | None = None
        self.queues: dict[str, Queue] = {}
        self._revokers: dict[Queue, Callable[[str], None]] = {}
        self._plain: dict[Sendable, tuple[Queue, int, ResultStore | str, Callable[[str], None]]] = {}

    @contextmanager
    def elsewhere(self, pool: Pool, results: ResultStore | None) -> Iterator[None]:
        """Inside the block all goes to another broker, which is closed afterwards."""
        before = self.results, self.pool, self.producer, self._async_producer, self.queues, self._revokers
        self._begin(pool, results)
        try:
            yield
        finally:
            self.close()
            self.results, self.pool, self.producer, self._async_producer, self.queues, self._revokers = before
            self._plain = {}

    def close(self) -> None:
        """Closes all connections."""
        self.producer.close()
        if self.results is not None and self.results.pool is not self.pool:
            self.results.pool.close()
            self.results.broker.close()
        self.pool.broker.close()

    def queue(self, name: str) -> Queue:
        """The queue of that name, whether it exists in Redis or not."""
        found = self.queues.get(name)
        if found is None:
            if len(self.queues) >= MOST_QUEUES:
                self.queues, self._revokers, self._plain = {}, {}, {}
            shards = self.settings.queue_shards.get(name, self.settings.shards)
            found = self.queues.setdefault(name, Queue(self.pool, self.settings.namespace, self._app, name, shards))
        return found

    def send_plain(
        self, task: Sendable, key: bytes | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> AsyncResult[Any]:
        """``send`` for a message without options, hooks or headers: what ``task.delay`` nearly always sends."""
        if self._hooks or not task.is_plain:
            return self.send(task, key, args, kwargs)
        fork.check()
        queue, most, store, revoke = self._plain.get(task) or self._prepare(task)
        shape = queue.known
        if shape is None:
            self.producer.declare(queue)
            shape = queue.shape()
        message_id = os.urandom(16)  # see new_id
        if most < 0 or len(envelope := wire.encode(task.name, key, message_id, args, kwargs)) > most:
            envelope = self._encode(task, key, message_id, args, kwargs, None)
        self.producer.append(queue, SHARED if key is None else crc32(key) % shape.shards, envelope)
        return AsyncResult(message_id, store, revoke)

    def _prepare(self, task: Sendable) -> tuple[Queue, int, ResultStore | str, Callable[[str], None]]:
        """What is the same for all plain messages of a task: queue, most bytes (-1 where another serializer writes them),
        where their results will be, and what revokes them."""
        queue = self.queue(task.options.queue)
        most = self.settings.max_message_bytes if self._serializer(task) == "msgpack" else -1
        if len(self._plain) >= MOST_QUEUES:
            self._plain = {}
        found = self._plain[task] = (queue, most, self._store_of(task), self.revoker(queue))
        return found

    def send(
        self,
        task: Sendable,
        key: bytes | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        queue: str | None = None,
        timeout: Seconds | None = None,
        **options: Any,
    ) -> AsyncResult[Any]:
        """Stores one message; ``task.delay`` and ``apply_async`` are the ways to call it."""
        to, timeout_s = self._where_to(task, queue, timeout)
        options = call_options(options)
        if not to.declared:
            self.producer.declare(to, timeout_s)
        call, outgoing = self._call(task, to, key, args, kwargs, **options)
        stored = self.producer.send(call, timeout_s)
        return self._sent(task, call, outgoing, stored)

    async def asend(
        self,
        task: Sendable,
        key: bytes | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        queue: str | None = None,
        timeout: Seconds | None = None,
        **options: Any,
    ) -> AsyncResult[Any]:
        """As ``send``, for asyncio."""
        to, timeout_s = self._where_to(task, queue, timeout)
        options = call_options(options)
        if self._async_producer is None:
            self._async_producer = AsyncProducer(self.producer, self.pool.broker)
        if not to.declared:
            await asyncio.to_thread(self.producer.declare, to, timeout_s)
        call, outgoing = self._call(task, to, key, args, kwargs, **options)
        stored = await self._async_producer.send(call, timeout_s)
        return self._sent(task, call, outgoing, stored)

    def _where_to(self, task: Sendable, queue: str | None, timeout: Seconds | None) -> tuple[Queue, float | None]:
        name = task.options.queue if queue is None else check("queue", TEXT, queue)
        return self.queue(name), None if timeout is None else check("timeout", TIMEOUT, timeout)

    def _call(
        self,
        task: Sendable,
        queue: Queue,
        key: bytes | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        countdown: float | None = None,
        eta: dt.datetime | None = None,
        expires: float | dt.datetime | None = None,
        dedupe_id: str | None = None,
        task_id: str | None = None,
        headers: Mapping[str, Any] | None = None,
    ) -> tuple[Call, Outgoing | None]:
        fork.check()
        call_id = new_id()
        message_id: bytes | str = call_id
        dedupe = None
        if dedupe_id is not None:
            message_id = dedupe = dedupe_hash(queue.name, key, dedupe_id)
        if task_id is not None:
            message_id = wire.id_bytes(task_id)
        due_ms: int | None = None
        relative = False
        head: dict[str, Any] = dict(headers) if headers else {}
        if countdown is not None or eta is not None:
            due_ms, relative = _due(countdown, eta)
            if due_ms is not None:
                head[wire.H_PRODUCED] = wall_ms()
                head[wire.H_ETA] = wall_ms() + due_ms if relative else due_ms
        if expires is None:
            expires = task.options.expires
        if expires is not None:
            head[wire.H_EXPIRES] = _deadline_ms(expires)
        outgoing = None
        if self._hooks:
            outgoing = Outgoing(task.name, wire.id_text(message_id), args, kwargs, queue.name, key, head)
            for hook in self._before_send:
                hook(outgoing)
            head = outgoing.headers
        envelope = self._encode(task, key, message_id, args, kwargs, head or None)
        call = Call(queue, queue.shard_for(key), envelope, due_ms, relative, dedupe, message_id, call_id)
        return call, outgoing

    def _serializer(self, task: Sendable) -> str:
        return task.options.serializer or self.settings.serializer

    def _encode(
        self,
        task: Sendable,
        key: bytes | None,
        message_id: bytes | str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        headers: dict[str, Any] | None,
    ) -> bytes:
        serializer = self._serializer(task)
        if serializer == "msgpack":
            envelope = wire.encode(task.name, key, message_id, args, kwargs, headers)
        else:
            envelope = wire.encode_as(serializer, task.name, key, message_id, args, kwargs, headers)
        if len(envelope) > self.settings.max_message_bytes:
            raise MessageTooLarge(
                f"the message of task {task.name!r} has {len(envelope)} bytes; max_message_bytes is "
                f"{self.settings.max_message_bytes}. Store the data elsewhere and send where it is"
            )
        return envelope

    def _sent(self, task: Sendable, call: Call, outgoing: Outgoing | None, stored: bool) -> AsyncResult[Any]:
        if outgoing is not None:
            for hook in self._after_send:
                hook(outgoing, stored)
            message_id: bytes | str = outgoing.id
        else:
            message_id = call.message_id
        return AsyncResult(message_id, self._store_of(task), self.revoker(call.queue), stored)

    def _store_of(self, task: Sendable) -> ResultStore | str:
        """Where the task's results lie, or why there are none."""
        if task.options.ignore_result:
            return f"task {task.name!r} keeps no results: it has ignore_result=True"
        return self.results or NO_BACKEND

    def send_many(
        self,
        task: Sendable,
        calls: Iterable[Mapping[str, Any] | tuple[Sequence[Any], Mapping[str, Any]]],
        *,
        timeout: Seconds | None = None,
    ) -> list[AsyncResult[Any]]:
        """Stores many messages of one task; ``task.send_many`` is the way to call it."""
        queue, timeout_s = self._where_to(task, None, timeout)
        calls = many_calls(calls, task.name)
        self.producer.declare(queue, timeout_s)
        messages, results, outgoing = self._many(task, queue, calls)
        send_many(self.producer, queue, messages, timeout_s)
        self._many_sent(outgoing)
        return results

    async def asend_many(
        self,
        task: Sendable,
        calls: Iterable[Mapping[str, Any] | tuple[Sequence[Any], Mapping[str, Any]]],
        *,
        timeout: Seconds | None = None,
    ) -> list[AsyncResult[Any]]:
        """As ``send_many``, for asyncio: a thread talks to Redis meanwhile."""
        queue, timeout_s = self._where_to(task, None, timeout)
        calls = many_calls(calls, task.name)
        await asyncio.to_thread(self.producer.declare, queue, timeout_s)
        messages, results, outgoing = self._many(task, queue, calls)
        await asyncio.to_thread(send_many, self.producer, queue, messages, timeout_s)
        self._many_sent(outgoing)
        return results

    def _many(
        self, task: Sendable, queue: Queue, calls: Iterable[Any]
    ) -> tuple[list[tuple[int | str, bytes]], list[AsyncResult[Any]], list[Outgoing]]:
        fork.check()
        messages: list[tuple[int | str, bytes]] = []
        results: list[AsyncResult[Any]] = []
        outgoing: list[Outgoing] = []
        revoke = self.revoker(queue)
        expires = task.options.expires
        base_headers = {wire.H_EXPIRES: _deadline_ms(expires)} if expires is not None else None
        key_of, results_store, name = task.shard_key, self._store_of(task), task.name
        msgpack = self._serializer(task) == "msgpack"
        most = self.settings.max_message_bytes
        shards = queue.shape().shards
        for one, message_id in zip(calls, new_ids(), strict=False):
            args, kwargs = ((), one) if type(one) is dict else item_arguments(one, name)
            key = key_of(args, kwargs)
            headers = base_headers
            if self._hooks:
                out = Outgoing(name, wire.id_text(message_id), args, kwargs, queue.name, key, dict(headers or {}))
                for hook in self._before_send:
                    hook(out)
                outgoing.append(out)
                headers = out.headers or None
            if not msgpack or len(envelope := wire.encode(name, key, message_id, args, kwargs, headers)) > most:
                envelope = self._encode(task, key, message_id, args, kwargs, headers)
            messages.append((SHARED if key is None else shard_of(key, shards), envelope))
            results.append(AsyncResult(message_id, results_store, revoke))
        return messages, results, outgoing

    def _many_sent(self, outgoing: Iterable[Outgoing]) -> None:
        for out in outgoing:
            for hook in self._after_send:
                hook(out, True)

    def revoker(self, queue: Queue) -> Callable[[str], None]:
        found = self._revokers.get(queue)
        if found is None:
            found = self._revokers[queue] = self._make_revoker(queue)
        return found

    def _make_revoker(self, queue: Queue) -> Callable[[str], None]:
        def revoke(task_id: str) -> None:
            key = queue.keys.revoked
            self.revocations += 1
            try:
                queue.pool.run("revoke", [key], [task_id, REVOKED_MS, queue.keys.channel(self.settings.group)])
            finally:
                self.revocations += 1  # whoever looked meanwhile looks again

        return revoke


def _due(countdown: float | None, eta: dt.datetime | None) -> tuple[int | None, bool]:
    if eta is not None:
        due = int(eta.timestamp() * 1000)
        return (due if due > wall_ms() else None), False
    # Never early: a part of a millisecond counts as a whole one.
    return (-int(-countdown * 1000 // 1), True) if countdown else (None, False)


def _deadline_ms(expires: float | dt.datetime) -> int:
    if isinstance(expires, dt.datetime):
        return int(expires.timestamp() * 1000)
    return wall_ms() + int(expires * 1000)
