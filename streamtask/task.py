"""Tasks: a function with a name, options and ways to send it."""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from .arguments import arguments
from .checks import INSTANT, MOST_S, Rule, check, optional, seconds, whole
from .errors import ConfigError, Retry
from .functions import is_async
from .request import Request, current
from .sharding import canonical, compile_key

if TYPE_CHECKING:
    from typing_extensions import Unpack  # type checkers know it without its being installed

    from .arguments import SendOptions
    from .results import AsyncResult
    from .sending import Sender
    from .settings import Seconds, TaskOptions

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


class Task(Generic[P, R]):
    """A registered task. Calling it calls the function; ``delay`` sends a message.

    ``P``: the arguments of a call, without ``self``; ``R``: what the function returns, for an ``async def`` a coroutine.
    """

    app: Any
    """The ``StreamTask`` that has it."""

    def __init__(self, app: Any, sender: Sender, function: Callable[..., R], name: str, options: TaskOptions) -> None:
        functools.update_wrapper(self, function, updated=())
        # What stands on the function stands on the task, unless it would hide what a task has.
        self.__dict__.update({k: v for k, v in getattr(function, "__dict__", {}).items() if not hasattr(Task, k)})
        self.app = app
        self._sender = sender
        self.function = function
        self.name = name
        self.options = options
        self.is_async = is_async(function, name)
        self.is_plain = options.expires is None  # messages have no headers, if their call gives them none
        self._key_of = compile_key(function, name, options.shard_key, bind=options.bind)
        self._fits = compile_key(function, name, None, bind=options.bind)

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
        return self._sender.send_plain(self, self._key_of(*args, **kwargs), args, kwargs)

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
        return self._sender.send(
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
        return await self._sender.asend(self, self._key_of(*args, **kwargs), args, kwargs)

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
        return await self._sender.asend(self, self._key(args, kwargs, shard_key), args, kwargs, **options)

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
        return self._sender.send_many(self, calls, timeout=timeout)

    async def asend_many(
        self,
        calls: Iterable[Mapping[str, Any] | tuple[Sequence[Any], Mapping[str, Any]]],
        *,
        timeout: Seconds | None = None,
    ) -> list[AsyncResult[R]]:
        """As ``send_many``, for asyncio. If it is cancelled, what is under way goes on."""
        return await self._sender.asend_many(self, calls, timeout=timeout)

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
