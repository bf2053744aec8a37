"""What a call is given: its arguments, its options, the many calls of ``send_many``; what is none is refused at the call."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from .checks import ANY_TEXT, INSTANT, TEXT, Rule, check, either, seconds, shown
from .errors import ConfigError, EncodeError
from .settings import Seconds


def _named(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError
    return dict(value)


CALL_RULES: Mapping[str, Rule] = {
    "countdown": seconds(),
    "eta": INSTANT,
    "expires": either(seconds(above=True), INSTANT),
    "task_id": TEXT,
    "dedupe_id": ANY_TEXT,
    "headers": Rule("a mapping from names, which are text, to values", _named),
}
"""What the options of a call may be, where they are given; see also ``queue``, ``timeout`` and ``shard_key``."""


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


def call_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call that are given, as they are to be used. Raises ``ConfigError``, or TypeError for an unknown one."""
    unknown = options.keys() - CALL_RULES.keys()
    if unknown:
        raise TypeError(
            f"unknown option {', '.join(sorted(unknown))}: known are {', '.join(CALL_RULES)}, queue, timeout"
        )
    taken = {name: check(name, CALL_RULES[name], value) for name, value in options.items() if value is not None}
    if "countdown" in taken and "eta" in taken:
        raise ConfigError("give countdown or eta, not both")
    return taken


def arguments(
    args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None, task: str
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """A call's arguments, as a message holds them. Raises ``EncodeError`` for what is no sequence and mapping."""
    if not isinstance(args, tuple | list):
        if args is None:
            args = ()
        elif isinstance(args, Sequence) and not isinstance(args, str | bytes | bytearray | memoryview):
            args = list(args)
        else:
            raise EncodeError(
                f"the arguments of task {task!r} must be a list or tuple, as in apply_async((1, 2)), not {shown(args)}; "
                "those that go by name are the second argument, kwargs={...}"
            )
    if type(kwargs) is not dict:
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise EncodeError(
                f"the keyword arguments of task {task!r} must be a mapping, as in apply_async(kwargs={{'n': 1}}), not "
                f"{shown(kwargs)}"
            )
        kwargs = dict(kwargs or {})
    return args, kwargs


def many_calls(calls: Iterable[Any], task: str) -> Iterable[Any]:
    """What ``send_many`` is given, if it can be many calls."""
    if isinstance(calls, Iterable) and not isinstance(calls, Mapping | str | bytes):
        return calls
    raise EncodeError(
        f"send_many of task {task!r} takes a list, or another iterable, of mappings or of pairs (args, kwargs), not "
        f"{shown(calls)}"
    )


def item_arguments(one: Any, task: str) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The arguments of one call of ``send_many``."""
    if isinstance(one, Mapping):
        return (), dict(one)
    if isinstance(one, tuple | list) and len(one) == 2:
        return arguments(one[0], one[1], task)
    raise EncodeError(
        f"send_many of task {task!r} takes mappings of keyword arguments, or pairs (args, kwargs), not {shown(one)}"
    )
