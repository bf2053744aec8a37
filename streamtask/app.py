"""``StreamTask``: the app, which puts the parts together."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar, overload

from . import settings as settings_module
from .checks import FLAG, TEXT, TIMEOUT, Rule, check, either, optional
from .errors import ConfigError
from .functions import say_taken, task_name
from .imports import import_named, run_and_imported
from .middleware import Dedupe, Middleware
from .queue.queues import Queue
from .queue.rules import ConsumerSettings
from .redis import wire
from .redis.connection import Broker
from .redis.links import Pool
from .results import NO_BACKEND, AsyncResult, ResultStore
from .runner import Runner
from .sending import Sender
from .settings import Seconds, Settings, TaskOptions
from .task import Task
from .text import logger
from .version import installed
from .worker.ports import WorkerSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .arguments import SendOptions
    from .settings import SettingsKeywords, TaskKeywords

P = ParamSpec("P")
R = TypeVar("R")
log = logger("streamtask.app")
ENV_URL = "STREAMTASK_BROKER_URL"
ENV_AUDIT_S = "STREAMTASK_AUDIT_S"


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
        pool = Pool(Broker(url, timeout_s=self.settings.redis_timeout))
        self.middleware = list(middleware)
        self.sender = Sender(name, self.settings, pool, self._result_store(backend, pool), self.middleware)
        self._tasks: dict[str, Task[..., Any]] = {}
        self._modules: list[str] = []  # to be imported before a task is looked up
        self._said_twice = False
        self._accepted = wire.SAFE_CONTENT | wire.content_types(
            (*self.settings.accept_content, self.settings.serializer)
        )
        self._accepted_of: dict[str, frozenset[str]] = {}  # by task
        self._stranger = lru_cache(1000)(self._make_stranger)  # of a name that ``send_task`` was given

    def _result_store(self, backend: str | bool | None, pool: Pool) -> ResultStore | None:
        if backend is None or backend is False:
            return None
        try:
            where = pool if backend is True else Pool(Broker(backend, timeout_s=self.settings.redis_timeout))
        except ConfigError as exc:
            raise ConfigError(f"the backend of app {self.name!r}: {exc}") from None
        return ResultStore(where, self.settings.namespace, self.name, self.settings.result_ttl)

    @property
    def broker(self) -> Broker:
        """Where its messages are."""
        return self.sender.pool.broker

    @property
    def results(self) -> ResultStore | None:
        """Where its results are."""
        return self.sender.results

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
            task: Task[..., Any] = Task(self, self.sender, function, task_name(function, name), TaskOptions(**options))
            before = self._tasks.get(task.name)
            if before is not None:
                say_taken(task.name, function, before.function)
            own = task.options.serializer
            self._accepted_of[task.name] = self._accepted | wire.content_types([own] if own else [])
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
        return self.sender.queue(name)

    def queue_names(self) -> list[str]:
        """The queues that this app's tasks name, ``default`` first."""
        names = {task.options.queue for task in self.tasks.values()} or {"default"}
        return sorted(names, key=lambda name: (name != "default", name))

    # Sending

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
        return Task(self, self.sender, _anything, name, TaskOptions())

    # Results

    def AsyncResult(self, task_id: str, *, queue: str = "default") -> AsyncResult[Any]:
        """The result of a task id; ``queue`` is where ``revoke`` looks for its message."""
        check("the task id", TEXT, task_id)
        to = self.queue(check("queue", TEXT, queue))
        return AsyncResult(wire.id_bytes(task_id), self.results or NO_BACKEND, self.sender.revoker(to))

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
        settings = self.worker_settings(queues=sorted({*self.queue_names(), *self.sender.queues}))
        timeout_s = check("timeout", TIMEOUT, timeout)
        return run_until_idle(
            settings, self.runner(), lambda: self.sender.revocations, timeout_s=timeout_s, fail_fast=fail_fast
        )

    @contextmanager
    def on_broker(self, url: str) -> Iterator[None]:
        """Inside the block the app works with another broker, which keeps its results too; for tests."""
        pool = Pool(Broker(url, timeout_s=self.settings.redis_timeout))
        with self.sender.elsewhere(pool, self._result_store(True, pool)):
            yield

    def close(self) -> None:
        """Closes the app's connections."""
        self.sender.close()

    def __repr__(self) -> str:
        return f"<StreamTask {self.name!r} at {self.broker.safe_url}>"


def _anything(*args: Any, **kwargs: Any) -> None:
    """Stands for the function of a task whose code is elsewhere."""


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
