"""The command line: ``streamtask -A module:app COMMAND``. One file per command, loaded when it is asked for."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import traceback
from functools import partial
from importlib import metadata
from typing import Any

import click

from ..errors import AccessRefused, ConfigError, ShardCountMismatch, StreamTaskError, UnsupportedServer
from .common import load_app, say
from .logs import FORMATS, LEVELS, set_up

COMMANDS = {
    "worker": "streamtask.cli.worker:worker",
    "worker-process": "streamtask.cli.worker:worker_process",
    "beat": "streamtask.cli.beat:beat",
    "call": "streamtask.cli.call:call",
    "status": "streamtask.cli.status:status",
    "consumers": "streamtask.cli.consumers:consumers",
    "dlq": "streamtask.cli.dlq:dlq",
    "purge": "streamtask.cli.purge:purge",
    "reshard": "streamtask.cli.reshard:reshard",
    "trim": "streamtask.cli.trim:trim",
    "migrate": "streamtask.cli.migrate:migrate",
    "acl": "streamtask.cli.acl:acl",
    "doctor": "streamtask.cli.doctor:doctor",
    "dashboard": "streamtask.cli.dashboard:dashboard",
    "metrics": "streamtask.cli.metrics:metrics",
    "sink": "streamtask.cli.sink:sink",
    "demo": "streamtask.cli.demo:demo",
    "bench": "streamtask.cli.bench:bench",
}
"""Where each command lives; those whose module is missing don't exist."""

SHARED_OPTIONS = ("app_name", "log_level", "log_format", "show_traceback")

EPILOG = """\b
-A, -l, --log-format and --traceback may stand behind the command, too.

\b
Exit status:
  0  fine
  1  what was asked about is wrong: Redis can't be reached, a check of doctor
     fails, a dead letter, queue or task of that name does not exist, ...
  2  the command was given wrongly: options, app or broker URL, or a user of
     Redis who may not do it

\b
Environment:
  STREAMTASK_APP         the app, as -A names it
  STREAMTASK_BROKER_URL  the broker of an app that names none
  NO_COLOR               no colours; there are none outside a terminal either
"""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for, and which turns errors into an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, place in COMMANDS.items() if importlib.util.find_spec(place.partition(":")[0])]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module_name, _, attribute = COMMANDS[cmd_name].partition(":")
        if importlib.util.find_spec(module_name) is None:
            return None
        command: click.Command = getattr(importlib.import_module(module_name), attribute)
        return _taking_late(command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            try:
                command = self.get_command(ctx, name)
            except Exception as exc:  # one command's missing dependency must not hide the others
                rows.append((name, f"(can't be loaded: {exc})"))
                continue
            if command is not None and not command.hidden:
                rows.append((name, command.get_short_help_str(80)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StreamTaskError as exc:
            of_user_code = isinstance(exc, ConfigError) and exc.__cause__ is not None  # a module that can't be imported
            _say(ctx, f"{exc}. --traceback shows the way there" if of_user_code else str(exc))
            ctx.exit(exit_status(exc))
        except (click.ClickException, click.Abort, click.exceptions.Exit, EOFError):
            raise  # click knows them: usage, an answer of no
        except Exception as exc:
            if isinstance(exc, BrokenPipeError):
                raise  # whoever read our output has left; click ends quietly
            _say(ctx, f"unexpected {type(exc).__name__}: {exc} (with --traceback it says where)")
            ctx.exit(1)


def exit_status(exc: StreamTaskError) -> int:
    """2 for what the caller gave wrongly (URL, password, app, option), 1 for what is wrong with the thing asked about."""
    wrong = isinstance(exc, ConfigError | AccessRefused) and not isinstance(exc, ShardCountMismatch | UnsupportedServer)
    return 2 if wrong else 1


def _say(ctx: click.Context, message: str) -> None:
    if (ctx.obj or {}).get("show_traceback"):
        say(traceback.format_exc(), err=True)
    say(f"Error: {message}", err=True)


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    try:
        own = metadata.version("streamtask")
    except metadata.PackageNotFoundError:
        own = "(run from its sources, not installed)"
    click.echo(f"streamtask {own}")
    ctx.exit()


@click.group(
    cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option(
    "-A",
    "--app",
    "app_name",
    metavar="MODULE[:APP]",
    envvar="STREAMTASK_APP",
    help="The app, as in myproject.tasks:app.",
)
@click.option(
    "-l",
    "--log-level",
    "--loglevel",
    "log_level",
    type=click.Choice(LEVELS, case_sensitive=False),
    default="info",
    envvar="STREAMTASK_LOG_LEVEL",
    show_default=True,
    help="Least level of the log, which goes to stderr.",
)
@click.option(
    "--log-format",
    type=click.Choice(FORMATS),
    default="text",
    envvar="STREAMTASK_LOG_FORMAT",
    show_default=True,
    help="Text for people, or one JSON object a line.",
)
@click.option("--traceback", "show_traceback", is_flag=True, help="Show the traceback of an error.")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit."
)
@click.pass_context
def main(ctx: click.Context, app_name: str | None, log_level: str, log_format: str, show_traceback: bool) -> None:
    """Ordered, durable tasks on Redis Streams.

    Start with 'streamtask -A module:app worker', look with 'status', and when something seems wrong ask 'doctor'.
    """
    ctx.obj = {"app_name": app_name, "log_level": log_level, "log_format": log_format, "show_traceback": show_traceback}
    _settle(ctx.obj)


def _settle(obj: dict[str, Any]) -> None:
    set_up(obj["log_level"], obj["log_format"])
    # It imports when it is called: commands that need no app work without one.
    obj["app"] = partial(load_app, obj["app_name"])


def _taking_late(command: click.Command) -> click.Command:
    """Lets a command take the group's options behind its name, too, where people write them who come from Celery."""
    if isinstance(command, click.Group):
        for one in command.commands.values():
            _taking_late(one)
    taken = {name for option in command.params for name in option.opts}
    for option in main.params:
        if option.name in SHARED_OPTIONS and not taken & set(option.opts):
            late = copy.copy(option)
            assert isinstance(late, click.Option)
            late.hidden, late.expose_value, late.callback, late.envvar, late.default = True, False, _late, None, None
            command.params.append(late)
    return command


def _late(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value and not ctx.resilient_parsing:
        ctx.obj[param.name] = value
        _settle(ctx.obj)


__all__ = ["COMMANDS", "exit_status", "main"]
