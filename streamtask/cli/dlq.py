"""``streamtask dlq``: the dead letters: messages that could not be run, whole and with their errors."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Any

import click

from ..errors import StreamTaskError
from ..text import MOST, MOST_LINES, counted, printable
from .common import cell, console, inspector_of, json_option, jsonable, number, print_json, queue_option

if TYPE_CHECKING:
    from ..operations import Inspector

task_option = click.option("-t", "--task", metavar="TASK", help="Only this task's.")


@click.group()
def dlq() -> None:
    """Dead letters: list, show, replay or remove them.

    A dead letter is a message that could not be run: its retries are used up, it was rejected, its task is unknown, it
    can't be decoded, or its process died too often while it ran. Its id is SHARD:ENTRYID.
    """


@dlq.command("list")
@queue_option
@task_option
@click.option("-n", "--limit", type=click.IntRange(1), default=20, show_default=True, help="Most to list.")
@click.option("--oldest", is_flag=True, help="The oldest first.")
@json_option
@click.pass_context
def list_(ctx: click.Context, queue: str | None, task: str | None, limit: int, oldest: bool, as_json: bool) -> None:
    """Lists dead letters, the newest first."""
    inspector = inspector_of(ctx)
    counts = inspector.count_dead(queue)
    rows = inspector.dead_letters(queue, limit, not oldest, task)
    if as_json:
        print_json(rows)
        return
    total = sum(counts.values())
    if not rows:
        click.echo("no dead letters" + (f" of task {cell(task)} ({total:,} of others)" if task and total else ""))
        return
    _print_list(rows)
    click.echo(f"\n{len(rows):,} of {total:,}. 'dlq show ID' has the traceback, 'dlq replay ID' runs one again")


def _print_list(rows: list[dict[str, Any]]) -> None:
    from .tables import Table

    several = len({row["queue"] for row in rows}) > 1
    table = Table("=ID", *(["QUEUE"] if several else []), "DIED (UTC)", ">RUNS", "TASK", "KEY", "WHY")
    for row in rows:
        died = (row["dead_at"] or "-")[:19].replace("T", " ")
        why = f"{row['reason']}: {row['error']}" if row["error"] else row["reason"]
        if row["held"]:
            why = "HOLDS ITS LANE; " + why
        cells = [row["id"], died, number(row["attempts"]), cell(row["task"] or "-", 72), cell(row["key"] or "-", 40)]
        if several:
            cells.insert(1, cell(row["queue"]))
        table.add(*cells, cell(textwrap.shorten(why[:1000], 120, placeholder=" ...")))
    console().print(table)


@dlq.command()
@click.argument("dead_id", metavar="ID")
@queue_option
@json_option
@click.pass_context
def show(ctx: click.Context, dead_id: str, queue: str | None, as_json: bool) -> None:
    """Shows one dead letter with its arguments and its traceback."""
    row = inspector_of(ctx).dead_letter(dead_id, queue)
    if as_json:
        print_json(row)
        return
    for name in ("id", "queue", "task", "task_id", "key", "reason", "attempts", "crashes", "appended_at", "dead_at"):
        if row[name] is not None:
            click.echo(f"{name.replace('_', ' '):<12} {cell(row[name], MOST)}")
    if row["held"]:
        click.echo(f"{'held':<12} its lane is closed until this is replayed or removed")
    for name in ("args", "kwargs", "headers"):
        if row[name]:
            text = json.dumps(jsonable(row[name]), ensure_ascii=False)
            click.echo(f"{name:<12} {printable(text, MOST_LINES)}")
    if row["fields"] is not None:
        click.echo("the entry can't be decoded; its fields are:")
        for name, value in row["fields"].items():
            click.echo(f"  {cell(name)}: {cell(value, MOST_LINES)}")
    click.echo(f"{'error':<12} " + _block(row["error"] or "-", 13))
    if row["traceback"]:
        click.echo("\n" + _block(row["traceback"].replace("\t", "    ").rstrip(), 0))


def _block(text: str, indent: int) -> str:
    """Several lines, of which none looks like one of ours."""
    return printable(text, MOST_LINES).replace("\n", "\n" + " " * indent)


@dlq.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "everything", is_flag=True, help="All that are there now.")
@queue_option
@task_option
@json_option
@click.pass_context
def replay(
    ctx: click.Context, ids: tuple[str, ...], everything: bool, queue: str | None, task: str | None, as_json: bool
) -> None:
    """Puts dead letters back into their queue, at the end of their lanes; a held one goes on at its lane's head.

    Ids and shard keys stay as they were; attempts count from the start.
    """
    if bool(ids) == (everything or task is not None):
        raise click.UsageError("name the ids, or give --all or --task TASK")
    inspector = inspector_of(ctx)
    found = _by_queue(inspector, ids, queue)
    done = {name: inspector.replay(name, some, task) for name, some in found.items()}
    _report("replayed", done, ids, as_json)


@dlq.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@queue_option
@task_option
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
@json_option
@click.pass_context
def purge(
    ctx: click.Context, ids: tuple[str, ...], queue: str | None, task: str | None, yes: bool, as_json: bool
) -> None:
    """Removes dead letters for good: those named, else all (of the queue, of the task).

    A lane that one of them holds goes on behind it.
    """
    inspector = inspector_of(ctx)
    found = _by_queue(inspector, ids, queue)
    if found and not yes:
        what = counted(len(ids), "dead letter") if ids else "all dead letters"
        if task:
            what += f" of task {cell(task)}"
        click.confirm(f"Remove {what} of queue {', '.join(map(cell, found))} for good?", abort=True, err=True)
    done = {name: inspector.drop(name, some, task) for name, some in found.items()}
    _report("removed", done, ids, as_json)


def _by_queue(inspector: Inspector, ids: tuple[str, ...], queue: str | None) -> dict[str, list[str] | None]:
    """Which dead letters of which queue; None for all of them. Raises ``StreamTaskError`` for an id that is not there,
    before anything is done."""
    if not ids:
        counts = inspector.count_dead(queue)
        return {name: None for name, count in counts.items() if count or name == queue}
    found: dict[str, list[str] | None] = {}
    for dead_id in dict.fromkeys(ids):
        name = inspector.dead_letter(dead_id, queue)["queue"]
        some = found.setdefault(name, [])
        assert some is not None
        some.append(dead_id)
    return found


def _report(what: str, done: dict[str, int], ids: tuple[str, ...], as_json: bool) -> None:
    total = sum(done.values())
    if as_json:
        print_json({what: total, "queues": done})
    else:
        click.echo(f"{what} {counted(total, 'dead letter')}")
    missing = len(set(ids)) - total
    if ids and missing > 0:
        raise StreamTaskError(f"{missing} of them did not count: gone meanwhile, or another task's")
