"""What is to be a task: whether it can be one, how it is called, and what it answers."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from .checks import TEXT, check, shown
from .errors import ConfigError
from .text import logger

log = logger("streamtask.task")


def task_name(function: Any, name: str | None) -> str:
    """What a task is called: ``name``, or the module's and the function's. Raises ``ConfigError`` for what is no function, or
    has no name."""
    if isinstance(function, str):
        raise ConfigError(f"@app.task takes a function; a name is given as @app.task(name={shown(function)})")
    if not callable(function):
        raise ConfigError(f"@app.task takes a function, not {shown(function)}")
    if name is not None:
        return str(check("the task option name", TEXT, name))
    module, own = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not own or not module:
        raise ConfigError(
            f"{shown(function)} has no name that a task could be known by: give it one, as in app.task(name='shop.pay')(...)"
        )
    if module == "__main__":
        # What runs as a script is imported by the worker under its file's name.
        file = getattr(sys.modules["__main__"], "__file__", None)
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        if spec is not None and spec.name:
            module = spec.name.removesuffix(".__main__")
        elif file:
            module = os.path.splitext(os.path.basename(file))[0]
    return f"{module}.{own}"


def is_async(function: Callable[..., Any], name: str) -> bool:
    """Whether a call answers a coroutine. (Others may, too: a wrapper of an ``async def``, say; that is seen when they run.)
    Raises ``ConfigError`` for generators, whose calls run nothing."""
    inner: Any = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    kinds = [inner] if inspect.isroutine(inner) or inspect.isclass(inner) else [inner, type(inner).__call__]
    if any(inspect.isgeneratorfunction(one) or inspect.isasyncgenfunction(one) for one in kinds):
        raise ConfigError(
            f"task {name} is a generator: a call of it runs nothing. Let the body do the work and return (a list, say), and "
            "leave yield to a function that it calls"
        )
    return any(map(inspect.iscoroutinefunction, kinds))


def say_taken(name: str, function: Any, before: Any) -> None:
    """Of a name that is taken: nothing where the same definition comes again, as when its module is reloaded; a warning where
    the function is defined anew. Raises ``ConfigError`` for another function."""
    one, other = inspect.unwrap(function), inspect.unwrap(before)
    if one is other:
        return
    code, other_code = (getattr(each, "__code__", None) for each in (one, other))
    if code is not None and code == other_code and not (one.__closure__ or other.__closure__):
        return
    names = [(getattr(each, "__module__", None), getattr(each, "__qualname__", None)) for each in (one, other)]
    if names[0] != names[1] or not names[0][1]:
        raise ConfigError(
            f"two tasks are named {name!r}: {_where(other)} and {_where(one)}. Give one of them another name="
        )
    log.warning(
        "task %s is defined a second time, and the first is not called any more: %s, then %s",
        name, _where(other), _where(one),
    )  # fmt: skip


def _where(function: Any) -> str:
    code = getattr(function, "__code__", None)
    return shown(function) if code is None else f"{function.__qualname__} ({code.co_filename}:{code.co_firstlineno})"
