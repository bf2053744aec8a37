"""``streamtask purge``: removes what waits in a queue."""

from __future__ import annotations

import click

from ..text import counted
from .common import cell, inspector_of, json_option, print_json, say


@click.command()
@click.argument("queue")
@click.option("--keep-delayed", is_flag=True, help="Keep the messages that fall due later.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
@json_option
@click.pass_context
def purge(ctx: click.Context, queue: str, keep_delayed: bool, yes: bool, as_json: bool) -> None:
    """Removes the messages that wait in QUEUE, for good. Dead letters stay: see 'dlq purge'.

    What a worker was already given stays and runs: bodies that run now, retries, and what was read ahead.
    """
    inspector = inspector_of(ctx)
    if not yes:
        row = inspector.status(queue, interval=0)[queue]
        what = counted(row["lag"], "waiting message") + ("" if keep_delayed else f" and {row['delayed']:,} delayed")
        click.confirm(f"Remove {what} of queue {cell(queue)} for good?", abort=True, err=True)
    removed = inspector.purge(queue, delayed=not keep_delayed)
    if as_json:
        print_json({"queue": queue, "removed": removed})
    else:
        say(f"removed {counted(removed, 'message')} from queue {queue}")
