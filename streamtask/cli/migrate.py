"""``streamtask migrate``: moves the messages of a Celery app from one broker to the other, and back."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from typing import Any

import click

from ..migration import Outcome, open_broker
from ..text import MOST_LINES, counted
from .common import cell, json_option, print_json, say

SHOWN = 20
"""Most messages that are named one by one in the output for people."""


def _given(name: str, *names: str, **how: Any) -> Callable[[Any], Any]:
    """An option that may hold a password: other users see a command's arguments, but neither its environment nor files."""
    variable = "STREAMTASK_MIGRATE_" + name.strip("-").replace("-", "_").upper()
    return click.option(name, *names, envvar=variable, **how)


@click.command()
@_given("--from", "source_url", metavar="URL", required=True, help="The broker that holds the messages.")
@_given("--to", "target_url", metavar="URL", required=True, help="The broker that shall get them.")
@click.option("-q", "-Q", "--queues", metavar="QUEUE,...", help="These queues.")
@click.option("--all", "everything", is_flag=True, help="All queues that are found in the old broker.")
@click.option("--unacked", is_flag=True, help="Also what the old workers hold. Stop them first: else it runs twice.")
@_given("--from-options", metavar="JSON", help="broker_transport_options of the old broker.")
@_given("--to-options", metavar="JSON", help="broker_transport_options of the new broker.")
@click.option("-n", "--dry-run", is_flag=True, help="Only count.")
@json_option
def migrate(
    source_url: str,
    target_url: str,
    queues: str | None,
    everything: bool,
    unacked: bool,
    from_options: str | None,
    to_options: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Moves a Celery app's messages from redis:// to streamtask://, or back.

    Nothing is lost if it dies: run it again and it goes on. Queues, priorities, bodies, headers and properties stay as
    they are. Exit status 1 if a message stayed behind; it is named then.

    All users of the machine see a command's arguments. Give a URL that holds a password as @FILE, as - (a line of
    stdin; the one of --from comes first), or as STREAMTASK_MIGRATE_FROM and STREAMTASK_MIGRATE_TO in the environment;
    the options likewise (STREAMTASK_MIGRATE_FROM_OPTIONS, STREAMTASK_MIGRATE_TO_OPTIONS).
    """
    source_url = _read("--from", source_url)
    target_url = _read("--to", target_url)
    options = [_json_object("--from-options", from_options), _json_object("--to-options", to_options)]
    names = [name.strip() for name in (queues or "").split(",") if name.strip()]
    if bool(names) == everything:
        raise click.UsageError("name the queues with --queues a,b, or give --all")
    if source_url == target_url and options[0] == options[1]:
        raise click.UsageError("--from and --to are the same broker")
    outcome = Outcome()
    # As Ctrl-C: what was set aside and not yet sent is put back.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with (
            open_broker(source_url, options[0], _tell) as source,
            open_broker(target_url, options[1], _tell) as target,
            source.translated(),
        ):
            if source.is_target_of(target):
                raise click.UsageError("--from and --to are the same database")
            if everything and not source.finds_queues:
                raise click.UsageError("name the queues with --queues a,b: --all is for redis://")
            if dry_run:
                source.count(names, outcome)
            else:
                source.move(names, unacked, target, outcome)
    finally:
        signal.signal(signal.SIGTERM, before)
        _report(outcome, dry_run, as_json)
    if outcome.not_moved or outcome.left:
        click.get_current_context().exit(1)


def _read(name: str, value: str) -> str:
    """An option's value, from where it points to: ``@FILE``, or ``-`` for the next line of stdin."""
    if value == "-":
        value = sys.stdin.readline()
    elif value.startswith("@"):
        try:
            with open(value[1:], encoding="utf-8") as file:
                value = file.read()
        except (OSError, ValueError) as exc:
            raise click.UsageError(f"{name}: {value[1:]} can't be read: {exc}") from None
    if not value.strip():
        raise click.UsageError(f"{name}: nothing stands there")
    return value.strip()


def _json_object(name: str, text: str | None) -> dict[str, Any]:
    if not text:
        return {}
    try:
        value = json.loads(_read(name, text))
    except ValueError as exc:
        raise click.UsageError(f"{name} is no JSON: {exc}") from None
    if not isinstance(value, dict):
        raise click.UsageError(f'{name} must be a JSON object, as in {{"global_keyprefix": "shop:"}}')
    return value


# --- the report


def _report(outcome: Outcome, dry_run: bool, as_json: bool) -> None:
    if as_json:
        print_json({"dry_run": dry_run, **outcome.as_json()})
        return
    verb = "would move" if dry_run else "moved"
    for queue, counts in sorted(outcome.moved.items()):
        steps = ", ".join(f"{number:,} of priority {step}" for step, number in sorted(counts.items()) if step)
        number = sum(counts.values())
        _say(f"{queue}: {verb} {counted(number, 'message')}" + (f" ({steps})" if steps else ""))
    if not outcome.moved:
        _say("nothing to move")
    for queue, number in sorted(outcome.restored.items()):
        _say(f"{queue}: {number:,} of them were held by workers")
    for queue, number in sorted(outcome.held.items()):
        _say(f"{queue}: workers hold {number:,} more; once they are stopped, --unacked takes these, too")
    for queue, number in sorted(outcome.left.items()):
        _say(f"{queue}: {number:,} are left: live workers hold them, or they wait for their time")
    if outcome.skipped:
        _say(f"left out, for control and events only: {', '.join(outcome.skipped)}")
    _list("not moved, and still where they were", outcome.not_moved)
    _list("were under way when a run before ended, and may now be there twice", outcome.maybe_twice)


def _list(title: str, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    _say(f"{len(rows):,} {title}:")
    for row in rows[:SHOWN]:
        _say("  " + ", ".join(f"{name} {value}" for name, value in row.items() if value is not None))
    if len(rows) > SHOWN:
        _say(f"  ... and {len(rows) - SHOWN:,} more: --json has all")


def _tell(text: str) -> None:
    say(text, err=True)


def _say(text: str) -> None:
    click.echo(cell(text, MOST_LINES))
