"""``streamtask call``: sends one task from the command line."""

from __future__ import annotations

import difflib
import json
from typing import TYPE_CHECKING, Any

import click

from ..errors import EncodeError, ShardKeyError, StreamTaskError, UnknownTask
from .common import in_seconds, json_option, print_json, say

if TYPE_CHECKING:
    from ..app import StreamTask
    from ..task import Task


def _json(kind: type, what: str) -> Any:
    def parse(ctx: click.Context, param: click.Parameter, value: str) -> Any:
        try:
            found = json.loads(value)
        except ValueError as exc:
            raise click.BadParameter(f"this is no JSON: {exc}") from None
        if not isinstance(found, kind):
            raise click.BadParameter(f"this must be {what}")
        return found

    return parse


@click.command()
@click.argument("task")
@click.option(
    "--args", default="[]", metavar="JSON", callback=_json(list, "an array, as [1, 2]"), help="The arguments: an array."
)
@click.option(
    "--kwargs",
    default="{}",
    metavar="JSON",
    callback=_json(dict, 'an object, as {"a": 1}'),
    help="The keyword arguments: an object.",
)
@click.option("--countdown", type=float, metavar="S", callback=in_seconds, help="Run it after so many seconds.")
@click.option(
    "--expires", type=float, metavar="S", callback=in_seconds, help="Don't run it later than in so many seconds."
)
@click.option("--dedupe-id", metavar="ID", help="Send it only once, however often it is called with this id.")
@click.option("--task-id", metavar="ID", help="The message's id, instead of a new one.")
@click.option(
    "--shard-key", metavar="KEY", help="The shard key, instead of the one that the task takes from its arguments."
)
@click.option("-q", "-Q", "--queue", metavar="QUEUE", help="The queue, instead of the task's own.")
@click.option(
    "--timeout",
    type=float,
    default=5.0,
    show_default=True,
    metavar="S",
    callback=in_seconds,
    help="How long to wait for Redis and for room.",
)
@click.option(
    "--wait",
    type=float,
    metavar="S",
    callback=in_seconds,
    help="Wait so many seconds for the result, and print it as JSON.",
)
@json_option
@click.pass_context
def call(
    ctx: click.Context,
    task: str,
    args: list[Any],
    kwargs: dict[str, Any],
    countdown: float | None,
    expires: float | None,
    dedupe_id: str | None,
    task_id: str | None,
    shard_key: str | None,
    queue: str | None,
    timeout: float,
    wait: float | None,
    as_json: bool,
) -> None:
    """Sends TASK and prints the message's id. When it returns, the message is stored.

    TASK is the task's name, as in myproject.tasks.send_push.
    """
    app: StreamTask = ctx.obj["app"]()
    ctx.call_on_close(app.close)
    if wait is not None and app.results is None:
        raise click.UsageError("--wait needs results, and this app keeps none: name a backend, as in backend=True")
    found = _find(app, task)
    if wait is not None and found.options.ignore_result:
        raise click.UsageError(f"--wait needs results, and the task {found.name} keeps none: it has ignore_result=True")
    try:
        sent = found.apply_async(
            args,
            kwargs,
            countdown=countdown,
            expires=expires,
            dedupe_id=dedupe_id,
            task_id=task_id,
            shard_key=shard_key,
            queue=queue,
            timeout=timeout,
        )
    except (EncodeError, ShardKeyError):
        raise
    except TypeError as exc:
        raise StreamTaskError(f"these arguments don't fit the task {task}: {exc}") from exc
    answer: dict[str, Any] = {"id": sent.id, "stored": sent.stored}
    if not as_json:
        say(sent.id)
        if not sent.stored:
            say(f"nothing was stored: the dedupe id {dedupe_id!r} is known", err=True)
    if wait is not None:
        answer["result"] = sent.get(timeout=wait)
        if not as_json:
            print_json(answer["result"], indent=None)
    if as_json:
        print_json(answer)


def _find(app: StreamTask, name: str) -> Task[..., Any]:
    found = app.tasks.get(name)
    if found is not None:
        return found
    last = [one for one in app.tasks if one.rpartition(".")[2] == name.rpartition(".")[2]]
    near = list(dict.fromkeys([*last, *difflib.get_close_matches(name, app.tasks, n=3, cutoff=0.6)]))
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif app.tasks:
        hint = f"it has {', '.join(sorted(app.tasks))}"
    else:
        hint = "it has none: import the modules with the tasks where the app is made"
    raise UnknownTask(f"app {app.name!r} has no task {name!r}: {hint}")
