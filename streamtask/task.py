"""Tasks: a function with a name, options and ways to send it."""

from __future__ import annotations

import copy
import datetime as dt
import functools
import inspect
import keyword
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypedDict, TypeVar

from .errors import ConfigError, Retry, ShardKeyError
from .request import Request, current
from .sharding import canonical

if TYPE_CHECKING:
    from typing_extensions import Unpack  # type checkers know it without its being installed

    from .app import StreamTask
    from .results import AsyncResult
    from .settings import Seconds

P = ParamSpec("P")
R = TypeVar("R")
FINAL = "_streamtask_final"
"""Mark on an exception that ``retry`` raised because no retries are left: it is not retried by default either."""

ShardKey = str | Callable[..., Any] | None
Exceptions = type[BaseException] | Collection[type[BaseException]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """What ``@app.task`` takes. Durations are in seconds."""

    queue: str = "default"
    shard_key: ShardKey = None
    ordered: bool = True
    bind: bool = False
    max_retries: int | None = 3
    retry_backoff: bool | float = True
    retry_backoff_max: float = 600.0
    retry_jitter: bool = True
    autoretry_for: tuple[type[BaseException], ...] | None = None
    dont_autoretry_for: tuple[type[BaseException], ...] = ()
    soft_time_limit: float | None = None
    time_limit: float | None = None
    expires: float | None = None
    ignore_result: bool = False
    serializer: str | None = None
    rate_limit: str | float | None = None

    def __post_init__(self) -> None:
        for name in ("soft_time_limit", "time_limit", "expires"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
                raise ConfigError(f"{name} must be a number of seconds above 0, not {value!r}")
        if self.max_retries is not None and (
            isinstance(self.max_retries, bool) or not isinstance(self.max_retries, int) or self.max_retries < 0
        ):
            raise ConfigError(
                f"max_retries must be a whole number from 0, or None for no limit, not {self.max_retries!r}"
            )
        self.rate_per_s()

    def rate_per_s(self) -> float | None:
        """``rate_limit`` as starts per second: a number, or ``"10/s"``, ``"100/m"``, ``"1000/h"`` as in Celery."""
        rate = self.rate_limit
        if rate is None:
            return None
        try:
            if isinstance(rate, str):
                count, _, unit = rate.partition("/")
                value = float(count) / {"": 1, "s": 1, "m": 60, "h": 3600}[unit]
            else:
                value = float(rate)
        except (ValueError, KeyError):
            value = 0.0
        if not 0 < value < math.inf:
            raise ConfigError(f"rate_limit must be a number per second or text such as '100/m', not {rate!r}")
        return value


class TaskKeywords(TypedDict, total=False):
    """The fields of ``TaskOptions``, for type checkers: the keywords of ``@app.task``, but for ``bind``."""

    queue: str
    shard_key: ShardKey
    ordered: bool
    max_retries: int | None
    retry_backoff: bool | Seconds
    retry_backoff_max: Seconds
    retry_jitter: bool
    autoretry_for: Exceptions | None
    dont_autoretry_for: Exceptions
    soft_time_limit: Seconds | None
    time_limit: Seconds | None
    expires: Seconds | None
    ignore_result: bool
    serializer: str | None
    rate_limit: str | float | None


class SendOptions(TypedDict, total=False):
    """What a call may say of its message beside the shard key, for type checkers; see ``Task.apply_async``."""

    countdown: Seconds | None
    eta: dt.datetime | None
    expires: Seconds | dt.datetime | None
    task_id: str | None
    dedupe_id: str | None
    headers: Mapping[str, Any] | None
    timeout: float | None


class Task(Generic[P, R]):
    """A registered task. Calling it calls the function; ``delay`` sends a message.

    ``P``: the arguments of a call, without ``self``; ``R``: what the function returns, for an ``async def`` a coroutine.
    """

    def __init__(self, app: StreamTask, function: Callable[..., R], name: str, options: TaskOptions) -> None:
        self.app = app
        self.function = function
        self.name = name
        self.options = options
        self.is_async = inspect.iscoroutinefunction(function)
        self.is_plain = options.expires is None  # messages have no headers, if their call gives them none
        self._key_of = compile_key(function, name, options)
        self._fits = compile_key(function, name, replace(options, shard_key=None))
        functools.update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.options.bind:
            return self.function(self, *args, **kwargs)
        return self.function(*args, **kwargs)

    @property
    def request(self) -> Request:
        """The message that runs now. Raises ``ConfigError`` outside of a body that a worker runs."""
        request = current()
        if request is None:
            raise ConfigError("request is there only while a worker runs the task")
        return request

    def shard_key(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes | None:
        """The canonical shard key of a call. Raises ``ShardKeyError``, or TypeError if the arguments don't fit."""
        return self._key_of(*args, **kwargs)

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """Sends the task to run as soon as its turn comes. When it returns, the message is stored.

        Raises ``ShardKeyError``, ``EncodeError``, ``MessageTooLarge``, ``QueueFull`` or ``BrokerUnavailable``;
        TypeError if the arguments don't fit the function.
        """
        return self.app.send_plain(self, self._key_of(*args, **kwargs), args, kwargs)

    def apply_async(
        self,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        countdown: Seconds | None = None,
        eta: dt.datetime | None = None,
        expires: Seconds | dt.datetime | None = None,
        task_id: str | None = None,
        dedupe_id: str | None = None,
        shard_key: object = None,
        headers: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> AsyncResult[R]:
        """Sends the task with options. When it returns, the message is stored.

        ``countdown``: seconds from now (Redis' clock); ``eta``: a timezone-aware instant; ``expires``: seconds or an
        instant after which the body does not run; ``dedupe_id``: a repeated call with it, queue and shard key adds
        nothing for ``dedupe_ttl``; ``shard_key``: instead of what the task would take from its arguments; ``timeout``:
        seconds to wait for Redis and for room. Raises as ``delay`` does.
        """
        kwargs = {} if kwargs is None else kwargs
        return self.app.send(
            self,
            self._key(args, kwargs, shard_key),
            args,
            kwargs,
            countdown=countdown,
            eta=eta,
            expires=expires,
            task_id=task_id,
            dedupe_id=dedupe_id,
            headers=headers,
            timeout=timeout,
        )

    def _key(self, args: Sequence[Any], kwargs: Mapping[str, Any], shard_key: object) -> bytes | None:
        if shard_key is None:
            return self._key_of(*args, **kwargs)
        self._fits(*args, **kwargs)
        return canonical(shard_key)

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """As ``delay``, for asyncio."""
        return await self.app.asend(self, self._key_of(*args, **kwargs), args, kwargs)

    async def aapply_async(
        self,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        shard_key: object = None,
        **options: Unpack[SendOptions],
    ) -> AsyncResult[R]:
        """As ``apply_async``, for asyncio."""
        kwargs = {} if kwargs is None else kwargs
        return await self.app.asend(self, self._key(args, kwargs, shard_key), args, kwargs, **options)

    def send_many(
        self,
        calls: Iterable[Mapping[str, Any] | tuple[Sequence[Any], Mapping[str, Any]]],
        *,
        timeout: float | None = None,
    ) -> list[AsyncResult[R]]:
        """Sends many calls: kwargs mappings, or pairs ``(args, kwargs)``. Calls of one shard key keep their order.

        Some hundreds of messages of one shard take one script call. Raises ``BulkSendError``, which says what is
        stored; other errors as ``delay``, before anything is sent.
        """
        return self.app.send_bulk(self, calls, timeout=timeout)

    def on(self, queue: str) -> Task[P, R]:
        """The same task with another queue, to send it there."""
        other = copy.copy(self)
        other.options = replace(self.options, queue=queue)
        return other

    def retry(
        self,
        *,
        exc: BaseException | None = None,
        countdown: float | None = None,
        eta: dt.datetime | None = None,
        max_retries: int | None = None,
        throw: bool = True,
    ) -> Retry:
        """Ends the run: the message runs again later, at the head of its lane. Use as ``raise self.retry(...)``.

        When ``max_retries`` are used up, ``exc`` (if given) is raised instead, and the message becomes a dead letter.
        """
        limit = self.options.max_retries if max_retries is None else max_retries
        request = current()
        if exc is not None and request is not None and limit is not None and request.attempt >= limit and throw:
            exc.__dict__[FINAL] = True
            raise exc
        signal = Retry(exc=exc, countdown=countdown, eta=eta, max_retries=max_retries)
        if throw:
            raise signal from exc
        return signal

    def __repr__(self) -> str:
        return f"<Task {self.name}>"


def compile_key(function: Callable[..., Any], name: str, options: TaskOptions) -> Callable[..., bytes | None]:
    """A function with the task's own signature that returns the canonical shard key: Python itself then binds the
    arguments, which is the fastest way, and refuses those that don't fit."""
    parameters = list(inspect.signature(function).parameters.values())
    if options.bind:
        parameters = parameters[1:]
    shard_key = options.shard_key
    if shard_key is None:
        return _with_signature(parameters, "None", name, {})
    if callable(shard_key):
        return _with_signature(
            parameters, f"_st_canonical(_st_key({_forward(parameters)}))", name, {"_st_key": shard_key}
        )
    if not isinstance(shard_key, str) or not all(part.isidentifier() for part in shard_key.split(".")):
        raise ConfigError(f"shard_key of task {name} must be an argument's name, a path such as 'a.b', or a callable")
    first, *path = shard_key.split(".")
    named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    rest = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    if first in named:
        source = first
    elif rest is not None:
        source = f"_st_need({rest}, {first!r}, _st_name)"
    else:
        raise ConfigError(f"task {name} has no argument {first!r}, which its shard_key names")
    if path:
        source = f"_st_walk({source}, {tuple(path)!r}, {shard_key!r}, _st_name)"
    return _with_signature(parameters, f"_st_canonical({source})", name, {})


def _with_signature(
    parameters: list[inspect.Parameter], result: str, name: str, extra: dict[str, Any]
) -> Callable[..., bytes | None]:
    scope: dict[str, Any] = {
        "_st_canonical": canonical,
        "_st_need": _need,
        "_st_walk": _walk,
        "_st_name": name,
        **extra,
    }
    bare = []
    for i, parameter in enumerate(parameters):
        if parameter.default is not parameter.empty:
            scope[f"_st_default{i}"] = parameter.default
        bare.append(parameter.replace(annotation=inspect.Parameter.empty, default=inspect.Parameter.empty))
    pieces, seen_star = [], False
    for i, (parameter, plain) in enumerate(zip(parameters, bare, strict=True)):
        text = str(plain)
        if parameter.kind is parameter.KEYWORD_ONLY and not seen_star:
            pieces.append("*")
            seen_star = True
        seen_star = seen_star or parameter.kind is parameter.VAR_POSITIONAL
        if parameter.default is not parameter.empty:
            text += f"=_st_default{i}"
        pieces.append(text)
        following = parameters[i + 1].kind if i + 1 < len(parameters) else None
        if parameter.kind is parameter.POSITIONAL_ONLY and following is not parameter.POSITIONAL_ONLY:
            pieces.append("/")
    short = name.rpartition(".")[2]
    short = short if short.isidentifier() and not keyword.iskeyword(short) else "task"
    exec(f"def {short}({', '.join(pieces)}):\n    return {result}", scope)
    made: Callable[..., bytes | None] = scope[short]
    return made


def _forward(parameters: list[inspect.Parameter]) -> str:
    parts = []
    for p in parameters:
        if p.kind is p.VAR_POSITIONAL:
            parts.append(f"*{p.name}")
        elif p.kind is p.VAR_KEYWORD:
            parts.append(f"**{p.name}")
        elif p.kind is p.KEYWORD_ONLY:
            parts.append(f"{p.name}={p.name}")
        else:
            parts.append(p.name)
    return ", ".join(parts)


def _need(kwargs: Mapping[str, Any], key: str, name: str) -> Any:
    if key not in kwargs:
        raise ShardKeyError(f"task {name} needs the argument {key!r}: it is its shard key")
    return kwargs[key]


def _walk(value: Any, path: tuple[str, ...], whole: str, name: str) -> Any:
    for part in path:
        try:
            value = value[part] if isinstance(value, Mapping) else getattr(value, part)
        except (KeyError, AttributeError):
            raise ShardKeyError(
                f"task {name}: its shard key {whole!r} is not in the arguments: {part!r} is missing"
            ) from None
    return value
