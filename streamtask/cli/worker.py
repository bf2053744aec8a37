"""``streamtask worker``: the supervisor with its processes; and the hidden command that is one of these processes."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import click

from ..errors import ConfigError, StreamTaskError
from ..text import counted, logger
from .common import say
from .logs import name_tasks
from .reload import watch

if TYPE_CHECKING:
    from ..app import StreamTask
    from ..worker.ports import WorkerSettings

log = logger("streamtask.supervisor")

F = TypeVar("F", bound=Callable[..., object])


def _options(function: F) -> F:
    function = click.option(
        "-Q", "--queues", default="", help="Queues to work on, as a,b. Default: those of the app's tasks."
    )(function)
    return click.option(
        "-c", "--concurrency", type=click.IntRange(1, 512), default=1, show_default=True,
        help="Lanes that one process runs at once, in threads; async tasks on an event loop.",
    )(function)  # fmt: skip


@click.command()
@click.option(
    "-p",
    "--processes",
    type=click.IntRange(1, 256),
    default=None,
    help="Worker processes. Default: the number of CPUs.",
)
@click.option(
    "--reload", is_flag=True, help="For development: a restart when a source file changes. Needs streamtask[reload]."
)
@_options
@click.pass_context
def worker(ctx: click.Context, processes: int | None, concurrency: int, queues: str, reload: bool) -> None:
    """Runs tasks: a supervisor and its worker processes, until SIGTERM or Ctrl-C.

    The first signal ends it warmly: running bodies end, the rest is handed over. A second one, or SIGQUIT, stops it at once.
    SIGHUP restarts it warmly; SIGUSR1 logs what all threads do.
    """
    from ..worker.signals import Signals
    from ..worker.supervisor import RELOAD, Supervisor

    signals = Signals()
    name = ctx.obj["app_name"]
    app = ctx.obj["app"]()
    names = [one.strip() for one in queues.split(",") if one.strip()]
    settings = app.worker_settings(queues=names, concurrency=concurrency)
    _check_tasks(app, names)
    if app.broker.is_cluster or app.broker.scheme == "memory":
        raise StreamTaskError(
            f"workers do not run on {app.broker.scheme}:// yet: use redis://, rediss://, unix:// or embedded://"
        )
    count = processes or _cpus()
    argv = [sys.executable, "-m", "streamtask", "-A", name]
    for option in ("log_level", "log_format"):
        if ctx.obj.get(option):
            argv += ["--" + option.replace("_", "-"), ctx.obj[option]]
    argv += ["worker-process", "-c", str(concurrency)]
    if names:
        argv += ["-Q", ",".join(names)]
    version = app.broker.check_version()
    if sys.stderr.isatty() or ctx.obj.get("log_format") != "json":
        say(_banner(app, settings, count, version), err=True)
    if reload:
        watch(lambda: signals.post(RELOAD))
    supervisor = Supervisor(settings, argv, count, signals)
    status = supervisor.run()
    if supervisor.restart:
        app.close()
        if signals.hold():
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    ctx.exit(status)


def _check_tasks(app: StreamTask, names: list[str]) -> None:
    if not app.tasks:
        raise ConfigError(
            f"the app {app.name!r} has no tasks, so that every message would be a dead letter: import the modules that have "
            "them where the app is made, or name another app with -A"
        )
    known = app.queue_names()
    strange = [name for name in names if name not in known]
    if strange:
        near = {close for name in strange for close in difflib.get_close_matches(name, known, n=1)}
        log.warning(
            "no task of the app goes to %s (-Q): %s",
            ", ".join(strange),
            f"did you mean {', '.join(sorted(near))}?" if near else f"its tasks go to {', '.join(known)}",
        )


def _banner(app: StreamTask, settings: WorkerSettings, processes: int, version: tuple[int, ...]) -> str:
    lines = [
        f" -- streamtask {settings.version} -- {os.uname().nodename}, pid {os.getpid()}",
        f"    app        {app.name}",
        f"    broker     {app.broker.safe_url} (Redis {'.'.join(map(str, version))})",
        f"    results    {app.results.broker.safe_url if app.results else 'not kept'}",
        f"    processes  {processes}, {settings.concurrency} at once in each",
        f"    lease      {settings.lease_ms / 1000:g} s, group {settings.consumer.group}",
        "    queues     " + ", ".join(f"{q.name} ({counted(q.shards, 'shard')})" for q in settings.queues),
        "    tasks      " + (", ".join(sorted(app.tasks)) or "none"),
    ]
    return "\n".join(lines)


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@click.command("worker-process", hidden=True)
@click.option("--check", is_flag=True, help="Only see whether a worker could be started.")
@_options
@click.pass_context
def worker_process(ctx: click.Context, concurrency: int, queues: str, check: bool) -> None:
    """One worker process; started by ``worker``."""
    from ..worker import child
    from ..worker.supervisor import EXIT_CHILD_UNUSABLE

    fds = child.begin()
    if fds is None and not check:
        raise click.UsageError("worker-process is started by 'streamtask worker'")
    child.print_whole_lines()
    try:
        app = ctx.obj["app"]()
        name_tasks()
        names = [one for one in queues.split(",") if one]
        settings = app.worker_settings(queues=names, concurrency=concurrency)
        app.sender.producer.full_timeout_s = 0.0
        runner = app.runner()
        if check:
            _check_tasks(app, names)
            app.broker.check_version()
            for queue in settings.queues:
                queue.declare((settings.consumer.group,))
    except Exception as exc:
        say(f"Error: {exc}", err=True)
        sys.exit(EXIT_CHILD_UNUSABLE)
    if fds is not None:
        child.run(settings, runner, fds)
