"""``StreamTask``: the app, which puts the parts together."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar, overload

from . import fork
from . import settings as settings_module
from .arguments import call_options, item_arguments, many_calls
from .checks import FLAG, TEXT, TIMEOUT, Rule, check, either, optional
from .clock import wall_ms
from .errors import ConfigError, EncodeError, MessageTooLarge
from .functions import say_taken, task_name
from .imports import import_named, run_and_imported
from .middleware import Dedupe, Middleware, Outgoing, overriding
from .queue.aproducer import AsyncProducer
from .queue.calls import Call, ProducerSettings
from .queue.producer import Producer, new_id, new_ids
from .queue.queues import Queue
from .queue.rules import ConsumerSettings
from .queue.seen import dedupe_hash
from .redis import wire
from .redis.connection import Broker
from .redis.keys import SHARED
from .redis.links import Pool
from .results import NO_BACKEND, AsyncResult, ResultStore
from .runner import Runner
from .settings import Seconds, Settings, TaskOptions
from .sharding import shard_of
from .task import SendOptions, Task
from .text import logger, said
from .version import installed
from .worker.ports import WorkerSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .settings import SettingsKeywords, TaskKeywords

P = ParamSpec("P")
R = TypeVar("R")
log = logger("streamtask.app")
ENV_URL = "STREAMTASK_BROKER_URL"
ENV_AUDIT_S = "STREAMTASK_AUDIT_S"
MOST_QUEUES = 2048
"""Queues that an app remembers: calls may name ever new ones."""


def _middlewares(value: Any) -> Any:
    if not isinstance(value, tuple | list) or not all(isinstance(one, Middleware) for one in value):
        raise TypeError
    return value


APP_RULES: Mapping[str, Rule] = {
    "name": Rule("text that is not empty, as in StreamTask('notifications')", TEXT.take),
    "broker": optional(Rule("a URL, as redis://localhost:6379/0", TEXT.take)),
    "backend": optional(either(FLAG, Rule("a URL, as redis://localhost:6379/1", TEXT.take))),
    "middleware": Rule("a list of middlewares, made already, as in [Dedupe()]", _middlewares),
}


REVOKED_MS = 86_400_000
"""For how long a task id stays revoked: a message that waits longer runs, as revoking was never promised to be for ever."""


class StreamTask:
    """An app: a broker, its settings and its tasks.

    ``name``: part of every key, so apps of different names share nothing. ``broker``: a URL; None reads
    ``STREAMTASK_BROKER_URL``, and without it uses the embedded server. ``backend``: True keeps results on the broker's
    server, a URL elsewhere, None nowhere. ``middleware``: in the order in which their hooks run. Other options: see
    ``streamtask.settings.Settings``. Raises ``ConfigError``; connects at the first use.
    """

    def __init__(
        self,
        name: str,
        *,
        broker: str | None = None,
        backend: str | bool | None = None,
        middleware: Sequence[Middleware] = (),
        **options: Unpack[SettingsKeywords],
    ) -> None:
        given: dict[str, Any] = {"name": name, "broker": broker, "backend": backend, "middleware": middleware}
        for option, rule in APP_RULES.items():
            secret = option in ("broker", "backend") and bool(given[option])  # a URL may have a password
            given[option] = check(f"the {option} of an app", rule, given[option], secret=secret)
        name, broker, backend, middleware = given.values()
        self.name: str = name
        self.settings: Settings = settings_module.from_options(options)
        url = broker if broker is not None else os.environ.get(ENV_URL) or "embedded://"
        self.broker = Broker(url, timeout_s=self.settings.redis_timeout)
        self.middleware = list(middleware)
        self._tasks: dict[str, Task[..., Any]] = {}
        self._modules: list[str] = []  # to be imported before a task is looked up
        self._said_twice = False
        self._revocations = 0
        self._queues: dict[str, Queue] = {}
        self._revokers: dict[Queue, Callable[[str], None]] = {}
        self.pool = Pool(self.broker)
        self.results = self._result_store(backend)
        self.producer = Producer(self._producer_settings(), self.pool)
        self._async_producer: AsyncProducer | None = None
        self._before_send = overriding(self.middleware, "before_send")
        self._after_send = overriding(self.middleware, "after_send")[::-1]
        self._hooks = bool(self._before_send or self._after_send)
        named = (*self.settings.accept_content, self.settings.serializer)
        self._accepted = wire.SAFE_CONTENT | _content_types(named)
        self._stranger = lru_cache(1000)(self._make_stranger)  # of a name that ``send_task`` was given
        self._accepted_of: dict[str, frozenset[str]] = {}  # by task

    def _result_store(self, backend: str | bool | None) -> ResultStore | None:
        if backend is None or backend is False:
            return None
        try:
            where = self.pool if backend is True else Pool(Broker(backend, timeout_s=self.settings.redis_timeout))
        except ConfigError as exc:
            raise ConfigError(f"the backend of app {self.name!r}: {exc}") from None
        return ResultStore(where, self.settings.namespace, self.name, self.settings.result_ttl)

    def _producer_settings(self) -> ProducerSettings:
        s = self.settings
        return ProducerSettings(
            max_backlog=s.max_backlog,
            produce_ttl_ms=int(s.produce_ttl * 1000),
            dedupe_ttl_ms=int(s.dedupe_ttl * 1000),
            max_dedupe_ids=s.max_dedupe_ids,
            timeout_s=s.send_timeout,
        )

    # Tasks

    @overload
    def task(self, function: Callable[P, R]) -> Task[P, R]: ...
    @overload
    def task(
        self,
        function: None = None,
        *,
        name: str | None = None,
        bind: Literal[False] = False,
        **options: Unpack[TaskKeywords],
    ) -> Callable[[Callable[P, R]], Task[P, R]]: ...
    @overload
    def task(
        self,
        function: None = None,
        *,
        name: str | None = None,
        bind: Literal[True],
        **options: Unpack[TaskKeywords],
    ) -> Callable[[Callable[Concatenate[Any, P], R]], Task[P, R]]: ...
    def task(self, function: Callable[..., Any] | None = None, *, name: str | None = None, **options: Any) -> Any:
        """Registers a function as a task: ``@app.task`` or ``@app.task(shard_key="user_id", ...)``.

        Options: see ``streamtask.settings.TaskOptions``. ``name`` is the module's and the function's by default. Raises
        ``ConfigError`` for unknown options or a name that is taken.
        """

        def register(function: Callable[..., Any]) -> Task[..., Any]:
            unknown = set(options) - set(TaskOptions.__dataclass_fields__)
            if unknown:
                raise ConfigError(
                    f"unknown task option{'s' if len(unknown) > 1 else ''} {', '.join(sorted(unknown))}: "
                    f"known are name, {', '.join(sorted(TaskOptions.__dataclass_fields__))}"
                )
            if isinstance(function, Task):
                raise ConfigError(
                    f"{function.name!r} is a task already: @app.task takes its function, {function.name}.function"
                )
            task: Task[..., Any] = Task(self, function, task_name(function, name), TaskOptions(**options))
            before = self._tasks.get(task.name)
            if before is not None:
                say_taken(task.name, function, before.function)
            own = task.options.serializer
            self._accepted_of[task.name] = self._accepted | _content_types([own] if own else [])
            self._tasks[task.name] = task
            return task

        return register if function is None else register(function)

    @property
    def tasks(self) -> dict[str, Task[..., Any]]:
        """All tasks by their names. Raises ``ConfigError`` if a module that ``autodiscover`` was given can't be imported."""
        # Each time, which costs next to nothing and needs no lock: Python's own see to it that each module runs once.
        for name in tuple(self._modules):
            import_named(name, f"autodiscover of app {self.name!r}")
        if self._modules and not self._said_twice and (script := run_and_imported(self)):
            self._said_twice = True
            log.warning(
                "%s is run as a script, and was imported once more by a module with tasks: there are two apps %r, and this one "
                "has none of those tasks. Make the app in a module that is only imported", script, self.name,
            )  # fmt: skip
        return self._tasks

    def autodiscover(self, modules: list[str] | tuple[str, ...]) -> None:
        """Names the modules that have this app's tasks, as ``app.autodiscover(["shop.orders", "shop.mails"])``.

        They are imported when a task is first looked up: when a worker starts, at a command, at ``app.tasks``. So the module
        with the app may be imported by them.
        """
        names = modules if isinstance(modules, list | tuple) else ()
        if not names or not all(isinstance(one, str) and all(map(str.isidentifier, one.split("."))) for one in names):
            raise ConfigError(
                f"autodiscover takes a list of modules' full names, as ['shop.orders', 'shop.mails'], not {modules!r}"
            )
        self._modules += [one for one in names if one not in self._modules]

    def accepts(self, task: str) -> Collection[str]:
        """The content types that messages of a task may have: those of the serializers that the app and the task name."""
        return self._accepted_of.get(task, self._accepted)

    # Queues

    def queue(self, name: str) -> Queue:
        """The queue of that name, whether it exists in Redis or not."""
        found = self._queues.get(name)
        if found is None:
            if len(self._queues) >= MOST_QUEUES:
                self._queues, self._revokers = {}, {}
            shards = self.settings.queue_shards.get(name, self.settings.shards)
            found = self._queues.setdefault(name, Queue(self.pool, self.settings.namespace, self.name, name, shards))
        return found

    def queue_names(self) -> list[str]:
        """The queues that this app's tasks name, ``default`` first."""
        names = {task.options.queue for task in self.tasks.values()} or {"default"}
        return sorted(names, key=lambda name: (name != "default", name))

    # Sending

    def send_plain(
        self, task: Task[..., Any], key: bytes | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> AsyncResult[Any]:
        """``send`` for a message without options, hooks or headers: what ``task.delay`` nearly always sends."""
        if self._hooks or not task.is_plain:
            return self.send(task, key, args, kwargs)
        fork.check()
        queue = self._queues.get(task.options.queue) or self.queue(task.options.queue)
        if not queue.declared:
            self.producer.declare(queue)
        message_id = new_id()
        envelope = self._encode(task, key, message_id, args, kwargs, None)
        self.producer.append(queue, queue.shard_for(key), envelope)
        return AsyncResult(message_id, self._store_of(task), self._revoker(queue))

    def send(
        self,
        task: Task[..., Any],
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
        task: Task[..., Any],
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
            self._async_producer = AsyncProducer(self.producer, self.broker)
        if not to.declared:
            await asyncio.to_thread(self.producer.declare, to, timeout_s)
        call, outgoing = self._call(task, to, key, args, kwargs, **options)
        stored = await self._async_producer.send(call, timeout_s)
        return self._sent(task, call, outgoing, stored)

    def _where_to(self, task: Task[..., Any], queue: str | None, timeout: Seconds | None) -> tuple[Queue, float | None]:
        name = task.options.queue if queue is None else check("queue", TEXT, queue)
        return self.queue(name), None if timeout is None else check("timeout", TIMEOUT, timeout)

    def send_task(
        self,
        name: str,
        args: Sequence[Any] | None = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        shard_key: object = None,
        **options: Unpack[SendOptions],
    ) -> AsyncResult[Any]:
        """Sends a task by its name, for programs that don't have its code. ``options`` are those of ``apply_async``.

        A task that this app has is sent as by its own ``apply_async``. Of any other only what the call says is known: its
        arguments are not checked, without a ``shard_key`` its message has no order, and without a ``queue`` it goes to
        ``default``.
        """
        return self._named(name).apply_async(args, kwargs, shard_key=shard_key, **options)

    async def asend_task(
        self,
        name: str,
        args: Sequence[Any] | None = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        shard_key: object = None,
        **options: Unpack[SendOptions],
    ) -> AsyncResult[Any]:
        """As ``send_task``, for asyncio."""
        return await self._named(name).aapply_async(args, kwargs, shard_key=shard_key, **options)

    def _named(self, name: str) -> Task[..., Any]:
        return self.tasks.get(check("name", TEXT, name)) or self._stranger(name)

    def _make_stranger(self, name: str) -> Task[..., Any]:
        return Task(self, _anything, name, TaskOptions())

    def _call(
        self,
        task: Task[..., Any],
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

    def _serializer(self, task: Task[..., Any]) -> str:
        return task.options.serializer or self.settings.serializer

    def _encode(
        self,
        task: Task[..., Any],
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
            envelope = _encode_with_kombu(task.name, serializer, key, message_id, args, kwargs, headers)
        if len(envelope) > self.settings.max_message_bytes:
            raise MessageTooLarge(
                f"the message of task {task.name!r} has {len(envelope)} bytes; max_message_bytes is "
                f"{self.settings.max_message_bytes}. Store the data elsewhere and send where it is"
            )
        return envelope

    def _sent(self, task: Task[..., Any], call: Call, outgoing: Outgoing | None, stored: bool) -> AsyncResult[Any]:
        if outgoing is not None:
            for hook in self._after_send:
                hook(outgoing, stored)
            message_id: bytes | str = outgoing.id
        else:
            message_id = call.message_id
        return AsyncResult(message_id, self._store_of(task), self._revoker(call.queue), stored)

    def _store_of(self, task: Task[..., Any]) -> ResultStore | str:
        """Where the task's results lie, or why there are none."""
        if task.options.ignore_result:
            return f"task {task.name!r} keeps no results: it has ignore_result=True"
        return self.results or NO_BACKEND

    def send_bulk(
        self,
        task: Task[..., Any],
        calls: Iterable[Mapping[str, Any] | tuple[Sequence[Any], Mapping[str, Any]]],
        *,
        timeout: Seconds | None = None,
    ) -> list[AsyncResult[Any]]:
        """Stores many messages of one task; ``task.send_many`` is the way to call it."""
        queue, timeout_s = self._where_to(task, None, timeout)
        calls = many_calls(calls, task.name)
        self.producer.declare(queue, timeout_s)
        messages, results, outgoing = self._many(task, queue, calls)
        self.producer.send_many(queue, messages, timeout_s)
        self._many_sent(outgoing)
        return results

    async def asend_bulk(
        self,
        task: Task[..., Any],
        calls: Iterable[Mapping[str, Any] | tuple[Sequence[Any], Mapping[str, Any]]],
        *,
        timeout: Seconds | None = None,
    ) -> list[AsyncResult[Any]]:
        """As ``send_bulk``, for asyncio: a thread talks to Redis meanwhile."""
        queue, timeout_s = self._where_to(task, None, timeout)
        calls = many_calls(calls, task.name)
        await asyncio.to_thread(self.producer.declare, queue, timeout_s)
        messages, results, outgoing = self._many(task, queue, calls)
        await asyncio.to_thread(self.producer.send_many, queue, messages, timeout_s)
        self._many_sent(outgoing)
        return results

    def _many(
        self, task: Task[..., Any], queue: Queue, calls: Iterable[Any]
    ) -> tuple[list[tuple[int | str, bytes]], list[AsyncResult[Any]], list[Outgoing]]:
        fork.check()
        messages: list[tuple[int | str, bytes]] = []
        results: list[AsyncResult[Any]] = []
        outgoing: list[Outgoing] = []
        revoke = self._revoker(queue)
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

    # Results

    def AsyncResult(self, task_id: str, *, queue: str = "default") -> AsyncResult[Any]:
        """The result of a task id; ``queue`` is where ``revoke`` looks for its message."""
        check("the task id", TEXT, task_id)
        to = self.queue(check("queue", TEXT, queue))
        return AsyncResult(wire.id_bytes(task_id), self.results or NO_BACKEND, self._revoker(to))

    def _revoker(self, queue: Queue) -> Callable[[str], None]:
        found = self._revokers.get(queue)
        if found is None:
            found = self._revokers[queue] = self._make_revoker(queue)
        return found

    def _make_revoker(self, queue: Queue) -> Callable[[str], None]:
        def revoke(task_id: str) -> None:
            key = queue.keys.revoked
            self._revocations += 1
            try:
                self.pool.run("revoke", [key], [task_id, REVOKED_MS, queue.keys.channel(self.settings.group)])
            finally:
                self._revocations += 1  # whoever looked meanwhile looks again

        return revoke

    # Working

    def runner(self, on_start: Callable[[], None] = lambda: None) -> Runner:
        """What runs this app's tasks in a worker."""
        return Runner(self.tasks, self.settings, self.results, self.middleware, on_start)

    def worker_settings(self, *, queues: Sequence[str] | None = None, concurrency: int = 1) -> WorkerSettings:
        """How this app's workers are to work."""
        s = self.settings
        names = list(queues) if queues else self.queue_names()
        deduped: dict[str, int] = {}
        dedupe_all_ms = 0
        for one in self.middleware:
            if isinstance(one, Dedupe):
                if one.tasks is None:
                    dedupe_all_ms = one.ttl_ms
                else:
                    deduped.update(dict.fromkeys(one.tasks, one.ttl_ms))
        each = s.ack == "each"
        return WorkerSettings(
            app=self.name,
            broker=self.broker,
            queues=[self.queue(name) for name in names],
            consumer=ConsumerSettings(
                group=s.group,
                fetch_count=s.prefetch,
                ack_batch=1 if each else s.ack_batch,
                max_crashes=s.max_crashes,
                hold_on_dead=s.on_dead == "hold",
                max_dedupe_ids=s.max_dedupe_ids,
                unordered=frozenset(name for name, task in self.tasks.items() if not task.options.ordered),
                deduped=deduped,
                dedupe_all_ms=dedupe_all_ms,
                max_message_bytes=s.max_message_bytes,
                accepts=self.accepts,
            ),
            version=installed(),
            lease_ms=int(s.lease * 1000),
            handover_timeout_s=s.handover_timeout,
            ack_interval_s=0.0 if each else s.ack_interval,
            audit_s=float(os.environ.get(ENV_AUDIT_S, 60)),
            concurrency=concurrency,
            result_broker=self.results.broker if self.results else None,
            has_time_limits=any(task.options.time_limit for task in self.tasks.values()),
        )

    def run_until_idle(self, *, timeout: Seconds = 60.0, fail_fast: bool = True) -> int:
        """Runs everything that is queued in this process, until nothing is left that could run within the time.

        For tests, with any broker, ``memory://`` among them. Waits for retries and delayed messages up to ``timeout``
        seconds. Returns how many bodies ended well. ``fail_fast``: raises ``TaskError`` at the first dead letter.
        """
        from .worker.inline import run_until_idle

        __tracebackhide__ = True  # pytest shows where it was called, and where the task failed
        # Also those that a call alone has named.
        settings = self.worker_settings(queues=sorted({*self.queue_names(), *self._queues}))
        timeout_s = check("timeout", TIMEOUT, timeout)
        return run_until_idle(
            settings, self.runner(), lambda: self._revocations, timeout_s=timeout_s, fail_fast=fail_fast
        )

    @contextmanager
    def on_broker(self, url: str) -> Iterator[None]:
        """Inside the block the app works with another broker, which keeps its results too; for tests."""
        before = self.broker, self.pool, self.results, self.producer, self._queues, self._async_producer
        self.broker = Broker(url, timeout_s=self.settings.redis_timeout)
        self.pool = Pool(self.broker)
        self.results = self._result_store(True)
        self.producer = Producer(self._producer_settings(), self.pool)
        self._queues, self._async_producer = {}, None
        try:
            yield
        finally:
            self.close()
            self.broker, self.pool, self.results, self.producer, self._queues, self._async_producer = before

    def close(self) -> None:
        """Closes the app's connections."""
        self.producer.close()
        if self.results is not None and self.results.pool is not self.pool:
            self.results.pool.close()
            self.results.broker.close()
        self.broker.close()

    def __repr__(self) -> str:
        return f"<StreamTask {self.name!r} at {self.broker.safe_url}>"


def _anything(*args: Any, **kwargs: Any) -> None:
    """Stands for the function of a task whose code is elsewhere."""


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


def _content_types(serializers: Iterable[str]) -> set[str]:
    from kombu.serialization import registry

    found = set()
    for name in serializers:
        try:
            found.add(registry.name_to_type[name])
        except KeyError:
            raise ConfigError(
                f"no serializer {name!r} is registered with kombu: known are {', '.join(sorted(registry.name_to_type))}"
            ) from None
    return found


def _encode_with_kombu(
    task: str,
    serializer: str,
    key: bytes | None,
    message_id: bytes | str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    headers: dict[str, Any] | None,
) -> bytes:
    from kombu.serialization import dumps, loads

    try:
        content_type, encoding, body = dumps((list(args), dict(kwargs)), serializer)
        raw = body.encode(encoding or "utf-8") if isinstance(body, str) else bytes(body)
        if content_type == wire.JSON_CONTENT:
            wire.check_json_keys((args, kwargs))
            if b"\\u" in raw:
                wire.refuse_surrogates(loads(raw, content_type, "utf-8", accept={content_type}))
    except Exception as exc:
        raise EncodeError(f"the arguments of task {task!r} can't be serialised as {serializer}: {said(exc)}") from None
    return wire.encode(task, key, message_id, raw, None, {**(headers or {}), wire.H_CONTENT: content_type})


def find_app(name: str) -> StreamTask:
    """The app that ``-A`` names: ``module:attribute``, or ``module`` (the one app in it, or ``app``).

    Raises ``ConfigError`` saying what was looked for, and where an import failed.
    """
    module_name, colon, attribute = name.partition(":")
    if not module_name or (colon and not attribute):
        raise ConfigError(f"-A {name} must name a module and the app in it, as in -A myproject.tasks:app")
    if "/" in module_name or module_name.endswith(".py"):
        dotted = os.path.normpath(module_name).removesuffix(".py").strip("./").replace(os.sep, ".")
        raise ConfigError(
            f"-A {name} names a file: name its module, as in -A {dotted}{colon}{attribute}, from the folder it is found in"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module = import_named(module_name, f"-A {name}")
    apps = {key: value for key, value in vars(module).items() if isinstance(value, StreamTask)}
    there = f"its apps are {', '.join(sorted(apps))}" if apps else "there is no StreamTask app in it"
    if attribute:
        found = getattr(module, attribute, None)
        if isinstance(found, StreamTask):
            return found
        if not hasattr(module, attribute):
            raise ConfigError(f"the module {module_name!r} has no {attribute!r} (-A {name}): {there}")
        raise ConfigError(
            f"{module_name}:{attribute} is no StreamTask app, but of type {type(found).__name__}: {there}"
        )
    if "app" in apps:
        return apps["app"]
    if len({id(app) for app in apps.values()}) == 1:
        return next(iter(apps.values()))
    if not apps:
        raise ConfigError(f"the module {module_name!r} has no StreamTask app: name the module that makes one")
    raise ConfigError(
        f"the module {module_name!r} has several apps: name one, as in -A {module_name}:{min(apps)}; {there}"
    )
