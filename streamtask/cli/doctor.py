"""``streamtask doctor``: what is wrong with the server and the queues, and what to do about it."""

from __future__ import annotations

import textwrap
from typing import Any

import click

from ..text import MOST, counted
from .common import UNBOUND, cell, console, inspector_of, json_option, print_json

INDENT = 23
WIDEST = 110
"""Columns of a line that is to be read."""
_MARKS = {True: ("ok  ", "green"), None: ("warn", "yellow"), False: ("FAIL", "red")}


@click.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Checks Redis and the queues, and says what to do. Exit status 1 if a check fails; warnings are fine."""
    checks = inspector_of(ctx).doctor()
    failed = [check for check in checks if check["ok"] is False]
    if as_json:
        print_json(checks)
    else:
        _print(checks)
    if failed:
        ctx.exit(1)


def _print(checks: list[dict[str, Any]]) -> None:
    width = console().width
    width = width if width == UNBOUND else min(width, WIDEST)
    for check in checks:
        mark, colour = _MARKS[check["ok"]]
        click.echo(f"{click.style(mark, fg=colour, bold=check['ok'] is False)}  {check['name']:<15}  ", nl=False)
        click.echo(_wrapped(check["message"], width))
        if check["advice"]:
            click.echo(" " * INDENT + _wrapped("-> " + check["advice"], width))
    failed = sum(check["ok"] is False for check in checks)
    warned = sum(check["ok"] is None for check in checks)
    click.echo(f"\n{counted(len(checks), 'check')}: {failed} failed, {counted(warned, 'warning')}")


def _wrapped(text: str, width: int) -> str:
    room = max(width - INDENT, 20)
    return ("\n" + " " * INDENT).join(
        textwrap.wrap(cell(text, MOST), room, break_long_words=False, break_on_hyphens=False) or [""]
    )
