"""``streamtask status``: what each queue holds, who works on it, and how fast."""

from __future__ import annotations

import datetime as dt
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ..clock import wall_ms
from ..errors import AccessRefused, BrokerUnavailable
from ..text import MOST, counted
from .common import age, cell, console, in_seconds, inspector_of, json_option, number, print_json, queue_option
from .consumers import place_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..operations import Inspector
    from .tables import Table


@click.command()
@queue_option
@click.option("-w", "--watch", is_flag=True, help="Show it again and again, until Ctrl-C.")
@click.option(
    "--interval",
    type=float,
    metavar="S",
    callback=in_seconds,
    help="Seconds over which the rates are taken, and between two pictures of --watch; 0: no rates.  "
    "[default: 0.5, with --watch 1]",
)
@json_option
@click.pass_context
def status(ctx: click.Context, queue: str | None, watch: bool, interval: float | None, as_json: bool) -> None:
    """Shows backlog, rates, owners and workers of each queue.

    LAG waits in Redis, PENDING was given to a worker and is not finished, DELAYED falls due later, DEAD are dead
    letters, LENGTH is what the stream holds.
    """
    inspector = inspector_of(ctx)
    if watch:
        seconds = max(1.0 if interval is None else interval, 0.1)
        try:
            _watch(inspector, queue, seconds, as_json)
        except KeyboardInterrupt:
            return
    else:
        queues = inspector.status(queue, 0.5 if interval is None else interval)
        if as_json:
            print_json(queues)
        else:
            console().print(_picture(inspector, queues))


def _watch(inspector: Inspector, queue: str | None, seconds: float, as_json: bool) -> None:
    if as_json or not sys.stdout.isatty():
        while True:
            queues = inspector.status(queue, seconds)
            if as_json:
                print_json(queues, indent=None)
            else:
                console().print(_picture(inspector, queues))
    from rich.live import Live
    from rich.text import Text

    from .tables import Screenful

    screen = console()
    picture: RenderableType = Text("asking ...")
    error: RenderableType = ""
    seen = False
    try:
        with Live(picture, console=screen, screen=True, auto_refresh=False) as live:
            while True:
                try:
                    picture, error = _picture(inspector, inspector.status(queue, seconds)), ""
                    seen = True
                except BrokerUnavailable as exc:
                    if isinstance(exc, AccessRefused) and not seen:
                        raise
                    # What was seen last stays: it is what there is to go by while Redis is away.
                    error = Text(f"! {cell(str(exc), MOST)}", style="bold red")
                live.update(Screenful(picture, error), refresh=True)
                if error:
                    time.sleep(seconds)
    except KeyboardInterrupt:
        screen.print(picture)
        if error:
            screen.print(error)
        raise


def _picture(inspector: Inspector, queues: dict[str, dict[str, Any]]) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    app = inspector.app
    now = dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    parts: list[RenderableType] = [Text(f"{cell(app.name)} at {app.broker.safe_url}   {now}", style="dim")]
    if full := inspector.full():
        parts.append(Text(f"! {full}", style="bold red"))
    if not queues:
        parts.append(Text("\nno queue yet: one is recorded when its first message is sent or its first worker starts"))
    for name, row in queues.items():
        parts += ["", _headline(name, row)]
        parts += [Text(f"  ! {line}", style="bold red") for line in _warnings(row)]
        parts += ["", _shard_table(row)]
        if row["workers"]:
            parts += ["", _worker_table(row)]
        if len(row["groups"]) > 1:
            parts += ["", _group_table(row)]
    return Group(*parts)


def _headline(name: str, row: dict[str, Any]) -> RenderableType:
    from rich.text import Text

    from .tables import Line

    return Line(
        Text(cell(name), "bold"),
        Text(f"backlog {number(row['backlog'])}", "bold"),
        Text(f"(lag {number(row['lag'])}, pending {number(row['pending'])}, delayed {number(row['delayed'])})"),
        Text(f"in {number(row['in_per_s'], '/s')}"),
        Text(f"out {number(row['out_per_s'], '/s')}"),
        Text(f"dead {number(row['dead'])}", "red" if row["dead"] else ""),
    )


def _warnings(row: dict[str, Any]) -> list[str]:
    """What an operator has to know first."""
    found = []
    if row["backlog"] and not row["workers"]:
        found.append("no worker is alive: nothing runs")
    elif row["workers"]:
        ownerless = [one["shard"] for one in row["shards"] if one["owner"] is None and isinstance(one["shard"], int)]
        if ownerless:
            found.append(f"without an owner: shard{'s' if len(ownerless) > 1 else ''} {ranges(ownerless)}")
    stale = sum(one["stale"] for one in row["consumers"])
    if stale:
        found.append(f"{counted(stale, 'stale consumer')}: see 'consumers'")
    return found


def _shard_table(row: dict[str, Any]) -> Table:
    from .tables import Table

    places = {worker["id"]: place_of(worker) for worker in row["workers"]}
    # The table of the workers has the owners' whole names.
    table = Table(">SHARD", ">LAG", ">PENDING", ">DELAYED", ">DEAD", ">LENGTH", "<OWNER" if places else "OWNER")
    for one in row["shards"]:
        shared = not isinstance(one["shard"], int)
        if shared:
            takers = sum(one["shard"] in worker["shards"] for worker in row["workers"])
            owner = counted(takers, "process", "processes") if takers else "-"
        else:
            owner = places.get(one["owner"]) or one["owner"] or "-"
        lost = one["owner"] is None and not shared and bool(row["workers"] or one["lag"] or one["pending"])
        table.add(
            str(one["shard"]),
            *(number(one[name]) for name in ("lag", "pending", "delayed", "dead", "length")),
            cell(owner),
            style="red" if lost else "",
        )
    return table


def _worker_table(row: dict[str, Any]) -> Table:
    from .tables import Table

    several = len(row["groups"]) > 1
    table = Table("WORKER", *(["GROUP"] if several else []), ">UP", ">LANES", "SHARDS")
    for worker in row["workers"]:
        started, lanes = worker.get("started"), worker.get("concurrency")
        up = age(wall_ms() / 1000 - started) if isinstance(started, int | float) else "-"
        cells = [place_of(worker), up, str(lanes or "-"), ranges(worker["shards"]) or "-"]
        if several:
            cells.insert(1, cell(worker["group"]))
        table.add(*cells)
    return table


def _group_table(row: dict[str, Any]) -> Table:
    from .tables import Table

    table = Table("GROUP", ">LAG", ">PENDING", ">PROCESSES")
    for one in row["groups"]:
        table.add(
            cell(one["group"]),
            number(one["lag"]),
            number(one["pending"]),
            number(one["members"]),
            style="red" if one["backlog"] and not one["members"] else "",
        )
    return table


def ranges(shards: Sequence[int | str]) -> str:
    """Shards as people write them: ``0-3, 7, shared``."""
    parts: list[str] = []
    numbers = sorted(one for one in shards if isinstance(one, int))
    start = 0
    for i, one in enumerate(numbers):
        if i + 1 == len(numbers) or numbers[i + 1] != one + 1:
            parts.append(str(one) if i == start else f"{numbers[start]}-{one}")
            start = i + 1
    return ", ".join([*parts, *(str(one) for one in shards if isinstance(one, str))])


__all__ = ["ranges", "status"]
