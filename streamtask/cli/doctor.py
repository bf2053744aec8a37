"""``streamtask doctor``: what is wrong with the server and the queues, and what to do about it."""

from __future__ import annotations

import textwrap
from typing import Any

import click

from ..text import MOST
from .common import cell, inspector_of, json_option, print_json

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
    for check in checks:
        mark, colour = _MARKS[check["ok"]]
        click.echo(f"{click.style(mark, fg=colour, bold=check['ok'] is False)}  {check['name']:<15}  ", nl=False)
        click.echo(_wrapped(check["message"]))
        if check["advice"]:
            click.echo(f"{'':23}{_wrapped('-> ' + check['advice'])}")
    failed = sum(check["ok"] is False for check in checks)
    warned = sum(check["ok"] is None for check in checks)
    click.echo(f"\n{_count(len(checks), 'check')}: {failed} failed, {_count(warned, 'warning')}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _wrapped(text: str) -> str:
    return ("\n" + " " * 23).join(
        textwrap.wrap(cell(text, MOST), 77, break_long_words=False, break_on_hyphens=False) or [""]
    )
