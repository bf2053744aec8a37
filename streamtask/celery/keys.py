"""The shard key of a call, as its task says it. ``publish.py`` writes it into the message's headers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import ShardKeyError
from ..sharding import compile_key
from . import internals

OPTION = "shard_key"
"""The option of ``apply_async`` and of signatures, and of tasks."""

RULE = "_streamtask_rule"
MAPS = {"celery.map": False, "celery.starmap": True}
"""Celery's tasks that call another task for each item of a list; whether they unpack the items."""


class Rule(NamedTuple):
    """How a task's calls get their shard key."""

    key: Callable[..., bytes | None]
    ordered: bool
    shown: str


def rule_of(task: Any) -> Rule | None:
    """How calls of this task get their key, None if they have none. Found out once per task."""
    try:
        rule: Rule | None = getattr(task, RULE)
    except AttributeError:
        rule = _make_rule(task)
        setattr(task, RULE, rule)
    return rule


def _make_rule(task: Any) -> Rule | None:
    if task.name in MAPS:
        return Rule(functools.partial(_key_of_items, task.app, MAPS[task.name]), True, "that of its items")
    declared = declared_key(task)
    if declared is None:
        return None
    ordered = bool(getattr(task, "ordered", True))
    # With autoretry_for, run is a wrapper; its signature is that of the function in it.
    key = compile_key(task.run, task.name, declared)
    shown = repr(declared) if isinstance(declared, str) else getattr(declared, "__qualname__", repr(declared))
    return Rule(key, ordered, shown)


def declared_key(task: Any) -> Any:
    """The task's ``shard_key`` as it was written: a callable is no method, though Celery makes it a class attribute."""
    declared = inspect.getattr_static(task, "shard_key", None)
    return declared.__func__ if isinstance(declared, staticmethod) else declared


def _key_of_items(app: Any, star: bool, task: Mapping[str, Any], it: Iterable[Any]) -> bytes | None:
    """The one key of a ``map`` or ``starmap`` (``chunks`` are starmaps). Its items run one after the other in one message."""
    name = task["task"]
    rule = rule_by_name(app, name)
    if rule is None or not rule.ordered:
        return None
    keys = {key_of(rule, name, item if star else (item,), {}) for item in it}
    if len(keys) > 1:
        raise ShardKeyError(
            f"the items of this map, starmap or chunk of task {name} have {len(keys)} shard keys, and one message can keep "
            "the order of one key only: send a group of calls, or one map for each key"
        )
    return keys.pop() if keys else None


def key_of(rule: Rule, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes | None:
    advice = f"Pass it in the call, or give the key itself: apply_async(..., {OPTION}=...)"
    try:
        return rule.key(*args, **kwargs)
    except ShardKeyError as exc:
        said = str(exc)
        raise ShardKeyError(
            f"{said}. {advice}"
            if said.startswith(("task ", "the items "))
            else f"task {name}, shard_key={rule.shown}: {said}"
        ) from None
    except Exception as exc:  # arguments that don't fit the function, or the user's callable
        raise ShardKeyError(
            f"task {name}: its shard key ({rule.shown}) can't be taken from the arguments: {exc!r}. {advice}"
        ) from exc


def rule_by_name(app: Any, name: str) -> Rule | None:
    task = internals.known_task(app, name)
    if task is None and internals.has_unmade_tasks(app):
        # Celery makes the tasks of a module at their first use, and a call by name is none.
        app.finalize(auto=True)
        task = internals.known_task(app, name)
    return None if task is None else rule_of(task)
