"""Tasks: a function with a name, options and ways to send it."""

from __future__ import annotations

import datetime as dt
import functools
import inspect
import keyword
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypedDict, TypeVar

from .arguments import arguments
from .checks import (
    EXCEPTIONS,
    FLAG,
    INSTANT,
    MOST_S,
    TEXT,
    Rule,
    check,
    check_fields,
    either,
    optional,
    seconds,
    shown,
    whole,
)
from .errors import ConfigError, Retry, ShardKeyError
from .functions import is_async
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
"""Mark on an exception that ``retry`` raised because no retries are left, or because it was asked for what can't be: it is
not retried by default either."""


def _exception(value: Any) -> BaseException:
    if not isinstance(value, BaseException):
        raise TypeError
    return value


RETRY_RULES = {
    # One that is reckoned, as until a limit is lifted, may be over already: then at once, as with an eta that has passed.
    "countdown": optional(Rule("a number of seconds, at most 100 years, or a timedelta", seconds(-MOST_S).take)),
    "eta": optional(INSTANT),
    "max_retries": optional(whole(0)),
    "exc": optional(Rule("an exception", _exception)),
}

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
        check_fields(self, RULES, "the task option")
        soft, hard = self.soft_time_limit, self.time_limit
        if soft is not None and hard is not None and soft > hard:
            raise ConfigError(
                f"the task option soft_time_limit must be at most the time_limit ({hard:g} s), not {soft:g} s: the process "
                "would have ended before"
            )

    def rate_per_s(self) -> float | None:
        """``rate_limit`` as starts per second."""
        return None if self.rate_limit is None else _per_s(self.rate_limit)


def _rate(rate: Any) -> str | float:
    if isinstance(rate, bool) or not 0 < _per_s(rate) < math.inf:
        raise ValueError
    found: str | float = rate
    return found


def _per_s(rate: str | float) -> float:
    if not isinstance(rate, str):
        return float(rate)
    count, _, unit = rate.partition("/")
    return float(count) / {"": 1, "s": 1, "m": 60, "h": 3600}.get(unit, math.nan)


RULES: Mapping[str, Rule] = {
    "queue": TEXT,
    "ordered": FLAG,
    "bind": FLAG,
    "max_retries": optional(whole(0), " for no limit"),
    "retry_backoff": either(FLAG, seconds()),
    "retry_backoff_max": seconds(),
    "retry_jitter": FLAG,
    "autoretry_for": optional(EXCEPTIONS),
    "dont_autoretry_for": EXCEPTIONS,
    "soft_time_limit": optional(seconds(above=True)),
    "time_limit": optional(seconds(above=True)),
    "expires": optional(seconds(above=True)),
    "ignore_result": FLAG,
    "serializer": optional(TEXT),
    "rate_limit": optional(Rule("a number of starts per second, or text such as '10/s', '100/m' or '1000/h'", _rate)),
}
"""What each may be; ``shard_key`` is looked at with the function's arguments (``compile_key``)."""


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
    queue: str | None
    headers: Mapping[str, Any] | None
    timeout: Seconds | None


class Task(Generic[P, R]):
    """A registered task. Calling it calls the function; ``delay`` sends a message.

    ``P``: the arguments of a call, without ``self``; ``R``: what the function returns, for an ``async def`` a coroutine.
    """

    def __init__(self, app: StreamTask, function: Callable[..., R], name: str, options: TaskOptions) -> None:
        functools.update_wrapper(self, function, updated=())
        # What stands on the function stands on the task, unless it would hide what a task has.
        self.__dict__.update({k: v for k, v in getattr(function, "__dict__", {}).items() if not hasattr(Task, k)})
        self.app = app
        self.function = function
        self.name = name
        self.options = options
        self.is_async = is_async(function, name)
        self.is_plain = options.expires is None  # messages have no headers, if their call gives them none
        self._key_of = compile_key(function, name, options)
        self._fits = compile_key(function, name, replace(options, shard_key=None))

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
        args: Sequence[Any] | None = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        countdown: Seconds | None = None,
        eta: dt.datetime | None = None,
        expires: Seconds | dt.datetime | None = None,
        task_id: str | None = None,
        dedupe_id: str | None = None,
        shard_key: object = None,
        queue: str | None = None,
        headers: Mapping[str, Any] | None = None,
        timeout: Seconds | None = None,
    ) -> AsyncResult[R]:
        """Sends the task with options. When it returns, the message is stored.

        ``countdown``: seconds from now (Redis' clock); ``eta``: a timezone-aware instant; ``expires``: seconds or an
        instant after which the body does not run; ``dedupe_id``: a repeated call with it, queue and shard key adds
        nothing for ``dedupe_ttl``; ``shard_key``: instead of what the task would take from its arguments; ``queue``:
        instead of the task's own; ``timeout``: seconds to wait for Redis and for room. Raises as ``delay`` does, and
        ``ConfigError`` for a wrong option.
        """
        args, kwargs = arguments(args, kwargs, self.name)
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
            queue=queue,
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
        args: Sequence[Any] | None = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        shard_key: object = None,
        **options: Unpack[SendOptions],
    ) -> AsyncResult[R]:
        """As ``apply_async``, for asyncio."""
        args, kwargs = arguments(args, kwargs, self.name)
        return await self.app.asend(self, self._key(args, kwargs, shard_key), args, kwargs, **options)

    def send_many(
        self,
        calls: Iterable[Mapping[str, Any] | tuple[Sequence[Any], Mapping[str, Any]]],
        *,
        timeout: Seconds | None = None,
    ) -> list[AsyncResult[R]]:
        """Sends many calls: kwargs mappings, or pairs ``(args, kwargs)``. Calls of one shard key keep their order.

        Some hundreds of messages of one shard take one script call. Raises ``BulkSendError``, which says what is
        stored; other errors as ``delay``, before anything is sent.
        """
        return self.app.send_bulk(self, calls, timeout=timeout)

    async def asend_many(
        self,
        calls: Iterable[Mapping[str, Any] | tuple[Sequence[Any], Mapping[str, Any]]],
        *,
        timeout: Seconds | None = None,
    ) -> list[AsyncResult[R]]:
        """As ``send_many``, for asyncio. If it is cancelled, what is under way goes on."""
        return await self.app.asend_bulk(self, calls, timeout=timeout)

    def retry(
        self,
        *,
        exc: BaseException | None = None,
        countdown: float | dt.timedelta | None = None,
        eta: dt.datetime | None = None,
        max_retries: int | None = None,
        throw: bool = True,
    ) -> Retry:
        """Ends the run: the message runs again later, at the head of its lane. Use as ``raise self.retry(...)``.

        When ``max_retries`` are used up, ``exc`` (if given) is raised instead, and the message becomes a dead letter.
        """
        signal = Retry(exc=exc, countdown=countdown, eta=eta, max_retries=max_retries)
        check_retry(signal)
        limit = self.options.max_retries if max_retries is None else max_retries
        request = current()
        if exc is not None and request is not None and limit is not None and request.attempt >= limit and throw:
            exc.__dict__[FINAL] = True
            raise exc
        if throw:
            raise signal from exc
        return signal

    def __repr__(self) -> str:
        return f"<Task {self.name}>"


def check_retry(retry: Retry) -> None:
    """Raises ``ConfigError`` where a retry asks for what can't be. Running the body again would not help."""
    try:
        for name, rule in RETRY_RULES.items():
            check(f"the retry's {name}", rule, getattr(retry, name))
    except ConfigError as exc:
        exc.__dict__[FINAL] = True
        raise


def compile_key(function: Callable[..., Any], name: str, options: TaskOptions) -> Callable[..., bytes | None]:
    """A function with the task's own signature that returns the canonical shard key: Python itself then binds the
    arguments, which is the fastest way, and refuses those that don't fit."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:
        raise ConfigError(
            f"the arguments of task {name} can't be told from {shown(function)}: wrap it in a def"
        ) from None
    if options.bind:
        if not parameters or parameters[0].kind not in (
            inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
        ):  # fmt: skip
            raise ConfigError(
                f"task {name} has bind=True, so its first argument must be the task, as in def pay(self, ...)"
            )
        if parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
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
