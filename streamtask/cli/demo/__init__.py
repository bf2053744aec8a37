"""``streamtask demo``: ordered messages through a kill -9, on a server of its own, with a check at the end."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click

from ..common import console, json_option, print_json


@click.command()
@click.option(
    "--events",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Send the lines of this JSON Lines file, gzipped or not, instead of notifications.",
)
@click.option(
    "--key",
    metavar="FIELD",
    help="The field of each line that is its shard key, as key or payload.user.id; lines where it is null are sent "
    "without one.  [default: key]",
)
@click.option("--messages", type=click.IntRange(1, 50_000_000), metavar="N", help="Notifications.  [default: 20000]")
@click.option("--users", type=click.IntRange(1, 10_000_000), metavar="N", help="Users they are for.  [default: 1000]")
@click.option("--processes", type=click.IntRange(1, 64), default=4, show_default=True, help="Worker processes.")
@click.option("--shards", type=click.IntRange(1, 1024), default=8, show_default=True, help="Shards of the queue.")
@click.option("--kill/--no-kill", default=True, help="Whether a worker process is killed in the middle.")
@json_option
@click.pass_context
def demo(
    ctx: click.Context,
    events: Path | None,
    key: str | None,
    messages: int | None,
    users: int | None,
    processes: int,
    shards: int,
    kill: bool,
    as_json: bool,
) -> None:
    """Sends messages through worker processes, kills one of them, and checks what became of the messages.

    It starts a redis-server of its own and leaves nothing behind. The bodies write down each start, and the table at
    the end is counted from that. Exit status 0 only if nothing is lost and nothing out of order.
    """
    from .events import Events
    from .run import Demo, Plan
    from .view import Lines, Screen, closing_line, end_table

    if events is None and key is not None:
        raise click.UsageError("--key says where the lines of --events have their key: give a file, too")
    if events is not None and (messages is not None or users is not None):
        raise click.UsageError(
            "with --events the file says how many messages there are: leave out --messages and --users"
        )
    if key is not None and not all(key.split(".")):
        raise click.UsageError(f"--key {key!r} is no field, as key or payload.user.id")
    if events is not None and not events.exists():
        raise click.BadParameter(f"there is no file {str(events)!r}", ctx, param_hint="'--events'")
    with ending_on_signals():
        try:
            plan = Plan(messages=messages or 20_000, users=users or 1000, processes=processes, shards=shards, kill=kill)
            if events is not None:
                found = Events(events, key or "key")
                found.scan()
                plan = Plan(messages=found.messages, events=found, processes=processes, shards=shards, kill=kill)
            screen = console()
            live = screen.is_terminal and not as_json
            view = Screen(plan, screen) if live else Lines(plan, sys.stderr if as_json else sys.stdout)
            report = Demo(plan, view).run()
        except KeyboardInterrupt:
            click.echo("\nInterrupted; nothing is left running.", err=True)
            ctx.exit(130)
    if as_json:
        print_json(report.as_dict())
    else:
        screen.print()
        screen.print(end_table(report, screen.width))
        screen.print(closing_line(report))
    ctx.exit(0 if report.verdict.good else 1)


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """SIGTERM and a closed terminal end the demo as Ctrl-C does, so that it cleans up."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        # Python drops what is raised while it does away with an object, and goes on: until it is heard it is said again.
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGALRM)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
