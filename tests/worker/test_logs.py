"""What a worker writes to its log: for people, as JSON, and by way of a logging configuration of the app's own."""

from __future__ import annotations

import json

import pytest

from tests.helpers import wait_until

TASKS = """
import logging, logging.config

if os.environ.get("OWN"):
    # Without disable_existing_loggers=False, as people have it.
    logging.config.dictConfig({
        "version": 1,
        "formatters": {"own": {"format": "OWN %(levelname)s %(name)s %(message)s"}},
        "handlers": {"own": {"class": "logging.StreamHandler", "formatter": "own"}},
        "root": {"handlers": ["own"], "level": "INFO"},
    })
    logging.getLogger().handlers[0].setFormatter(logging.Formatter("OWN %(levelname)s %(name)s id=%(id)s %(message)s",
        defaults={"id": "-"}))

log = logging.getLogger("shop")

class Hooks(Middleware):
    def on_dead(self, request, reason, message):
        log.info("in the hook", extra={"current": current() and current().id})

app = make_app(middleware=[Hooks()])

@app.task(name="put", shard_key="k", max_retries=1, retry_backoff=False)
def put(k, n):
    note("S", k, n)
    log.info("in the body", extra={"cart": n, "key": "of the caller"})
    raise ValueError("no device\\nat all")

@app.task(name="free", max_retries=0, autoretry_for=())
async def free(n):
    log.info("in the coroutine")
    note("E", None, n)

@app.task(name="asks", max_retries=1)
def asks(n):
    if current().attempt == 0:
        raise Retry(countdown=0)
    note("E", None, n)
"""


def run(site, concurrency):
    pod = site.pod(2, concurrency)
    site.task("put").delay("a", 7)
    site.task("free").delay(8)
    site.task("asks").delay(9)
    wait_until(lambda: len(site.dead()) == 1 and len(site.of("E")) == 2, 20, lambda: f"{site}\n{pod.log}")
    wait_until(lambda: "ready:" in pod.log)
    pod.stop()
    return pod.log


def test_one_object_a_line(redis_server, site, monkeypatch):
    monkeypatch.setenv("STREAMTASK_LOG_FORMAT", "json")
    site = site(redis_server, TASKS)
    lines = [json.loads(line) for line in run(site, 1).splitlines()]

    def by(logger):
        return [line for line in lines if line["logger"] == logger]

    said = [line["message"].partition(":")[0] for line in by("streamtask.supervisor")]
    assert said == ["ready", "warm shutdown", "stopped status=0"], "16 shards were spread without a word"
    error = "ValueError: no device\nat all"
    task_id = site.of("S")[0].id
    (retry,) = [line for line in by("streamtask.task") if line["task"] == "put"]
    assert {"task": "put", "id": task_id, "key": "a", "attempt": 0, "error": error}.items() <= retry.items()
    assert retry["level"] == "warning"
    assert retry["exception"].endswith(error)
    assert 'raise ValueError("no device\\nat all")' in retry["exception"]
    (dead,) = by("streamtask.consumer")
    assert {"task": "put", "id": task_id, "key": "a", "attempt": 1}.items() <= dead.items()
    assert (dead["level"], dead["reason"], dead["error"]) == ("error", "exhausted", f"{error} (after 1 retry)")
    assert dead["exception"].endswith(error)
    (asked,) = [line for line in by("streamtask.task") if line["task"] == "asks"]
    assert "exception" not in asked, "to be run again was asked for: nothing went wrong"
    bodies = [line for line in by("shop") if line["message"] == "in the body"]
    assert [(line["task"], line["id"], line["attempt"]) for line in bodies] == [("put", task_id, n) for n in (0, 1)]
    assert [(line["cart"], line["key"]) for line in bodies] == [(7, "of the caller")] * 2, "what is there stays"
    # Nor is it the body's that runs meanwhile, or ran before it.
    (hook,) = [line for line in by("shop") if line["message"] == "in the hook"]
    assert {"task": "put", "id": task_id, "key": "a", "attempt": 1, "current": task_id}.items() <= hook.items()
    (coroutine,) = [line for line in by("shop") if line["message"] == "in the coroutine"]
    assert (coroutine["task"], coroutine.get("key")) == ("free", None)


@pytest.mark.parametrize("own", ["", "1"])
def test_lines_for_people(redis_server, site, monkeypatch, own):
    """By our handler, or by the app's own, whose ``dictConfig`` disables loggers that were there before it."""
    monkeypatch.setenv("OWN", own)
    site = site(redis_server, TASKS)
    log = run(site, 2)
    lines = log.splitlines()
    task_id = site.of("S")[0].id
    indent = "" if own else "    "
    assert len([line for line in lines if "streamtask.supervisor" in line]) == 3, log
    assert sum("ready: 2 processes, 2 messages at once in each" in line for line in lines) == 1
    for level, logger in (("WARNING", "streamtask.task"), ("ERROR", "streamtask.consumer")):
        (at,) = [i for i, line in enumerate(lines) if level in line and logger in line and task_id in line]
        assert lines[at + 1] == f"{indent}Traceback (most recent call last):"
        after = lines[at + 1 :]
        assert after[after.index(f"{indent}ValueError: no device") + 1] == f"{indent}at all"
    (body, _) = [line for line in lines if "in the body" in line]
    assert f"id={task_id}" in body
    assert body.startswith("OWN INFO shop") if own else "cart=7 key=of the caller task=put" in body
