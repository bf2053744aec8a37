"""What the commands share: the app that ``-A`` names, and how things are printed."""

from __future__ import annotations

import datetime as dt
import json
import math
import os
import sys
import uuid
from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import click

from ..checks import optional, seconds
from ..text import MOST_LINES, printable

if TYPE_CHECKING:
    from rich.console import Console

    from ..app import StreamTask
    from ..operations import Inspector

UNBOUND = 1_000_000
"""Columns of a file or a pipe: what reads it, as grep, wants whole lines."""
MOST_DEEP = 100
"""Levels of arrays and maps that are shown."""


def load_app(name: str | None) -> StreamTask:
    """Imports and returns the app that ``-A`` names. Raises ``ConfigError``; ``click.UsageError`` if it names none."""
    if not name:
        raise click.UsageError("name the app: streamtask -A module:app COMMAND, or set STREAMTASK_APP=module:app")
    from ..app import find_app

    return find_app(name)


def inspector_of(ctx: click.Context) -> Inspector:
    """An ``Inspector`` of the app, closed with the command. Raises as ``load_app`` does."""
    from ..operations import Inspector

    inspector = Inspector(ctx.obj["app"]())
    ctx.call_on_close(inspector.app.close)
    ctx.call_on_close(inspector.close)
    return inspector


def cell(value: object, most: int = 200) -> str:
    """What stands in one line, or one cell of a table."""
    return printable(value, most, lines=False)


def say(text: str, *, err: bool = False) -> None:
    """Prints lines that hold other people's text, on stdout or stderr."""
    click.echo(printable(text, MOST_LINES), err=err)


def jsonable(value: Any, deep: int = 0) -> Any:
    """A value as JSON can hold it: dates in ISO 8601, UUIDs and decimals as text, bytes as text with escapes, what is no finite
    number as text, and "..." for what is nested deeper than any reader would go."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping | list | tuple | set | frozenset) and value and deep == MOST_DEEP:
        return "..."
    if isinstance(value, Mapping):
        return {
            name if isinstance(name, str) else str(jsonable(name, deep + 1)): jsonable(one, deep + 1)
            for name, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [jsonable(one, deep + 1) for one in value]
    if isinstance(value, set | frozenset):
        return sorted((jsonable(one, deep + 1) for one in value), key=str)
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, dt.datetime | dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, uuid.UUID | Decimal):
        return str(value)
    if isinstance(value, dt.timedelta):
        return value.total_seconds()
    return repr(value)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Prints one JSON document on stdout: the only thing there. ``indent`` None: on one line."""
    click.echo(json.dumps(jsonable(value), indent=indent))


def console() -> Console:
    """Where tables are printed: without markup, since cells hold other people's text, and without colours in a pipe."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else UNBOUND
    return Console(width=width, markup=False, highlight=False, emoji=False, soft_wrap=False)


def in_seconds(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """The callback of options that are a time."""
    rule = optional(seconds())
    try:
        found: float | None = rule.take(value)
    except (TypeError, ValueError, OverflowError):
        raise click.BadParameter(f"{value} is no number of seconds from 0, at most 100 years") from None
    return found


def number(value: float | None, unit: str = "") -> str:
    """A count or a rate as people read it; '-' for None."""
    if value is None:
        return "-"
    return (f"{value:,}" if isinstance(value, int) else f"{value:,.1f}") + unit


def age(seconds: float) -> str:
    """A duration in its largest fitting unit: 12s, 5m, 3h, 2d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{max(0, int(seconds))}s"


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else on stdout.")
queue_option = click.option("-q", "-Q", "--queue", metavar="QUEUE", help="Only this queue.")
