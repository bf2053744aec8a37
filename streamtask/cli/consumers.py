"""``streamtask consumers``: who is registered in the consumer groups, and who of them lives."""

from __future__ import annotations

from typing import Any

import click

from .common import cell, console, inspector_of, json_option, number, print_json, queue_option


@click.command()
@queue_option
@click.option("--stale", "only_stale", is_flag=True, help="Only those whose process is gone.")
@json_option
@click.pass_context
def consumers(ctx: click.Context, queue: str | None, only_stale: bool, as_json: bool) -> None:
    """Lists the registered consumers and marks stale ones.

    A shard has one consumer, 'owner', whoever owns it; a shared stream has one for each live process. A stale one is
    registered, but its lease has expired: live workers remove it within a lease time.
    """
    inspector = inspector_of(ctx)
    rows = [row for row in inspector.consumers(queue) if row["stale"] or not only_stale]
    if as_json:
        print_json(rows)
        return
    if full := inspector.full():
        click.secho(f"! {full}\n", fg="red", bold=True)
    _print(rows, "no stale consumers" if only_stale else "no consumers: no worker has started yet")


def state_of(row: dict[str, Any]) -> str:
    """``alive``, ``STALE``, or ``free``: given back in good order, waiting for the next owner."""
    return "alive" if row["alive"] else "STALE" if row["stale"] else "free"


def place_of(row: dict[str, Any]) -> str:
    """Where a process runs: ``host:pid``, or what is known of it."""
    if row.get("host"):
        return cell(f"{row['host']}:{row['pid']}")
    return cell(row.get("worker") or row.get("id") or "-")


def _print(rows: list[dict[str, Any]], nothing: str) -> None:
    from .tables import Table

    if not rows:
        click.echo(nothing)
        return
    table = Table("QUEUE", ">SHARD", "GROUP", "CONSUMER", "STATE", ">PENDING", "PROCESS")
    for row in rows:
        table.add(
            cell(row["queue"]),
            str(row["shard"]),
            cell(row["group"]),
            cell(row["consumer"]),
            state_of(row),
            number(row["pending"]),
            place_of(row) if row["alive"] else "-",
            style="bold red" if row["stale"] else "",
        )
    console().print(table)
    stale = sum(row["stale"] for row in rows)
    click.echo(f"\n{len(rows):,} registered, {sum(row['alive'] for row in rows):,} alive, {stale:,} stale")
