"""The command line as an operator has it: in a process of its own, against a real server."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from streamtask import StreamTask
from streamtask.cli import COMMANDS
from streamtask.cli.common import age, jsonable, number
from streamtask.cli.consumers import consumers
from streamtask.cli.dlq import dlq
from streamtask.cli.logs import JsonFormatter, TextFormatter
from streamtask.cli.status import ranges, status
from streamtask.coordination import lease as leases
from streamtask.queue.consumer import ShardConsumer
from streamtask.queue.delivery import Kind, Outcome
from streamtask.queue.rules import ConsumerSettings
from streamtask.redis import wire
from streamtask.text import harmless, printable
from tests.fix_redis import RedisServer
from tests.helpers import ROOT, popen, spawn, wait_until
from tests.one_link import OneLink

APP = """
import os
from streamtask import StreamTask

app = StreamTask("shop", broker=os.environ["URL"], backend=os.environ.get("BACKEND"), shards=2, lease=0.3)


@app.task(shard_key="user")
def push(user: int, text: str = "") -> None: ...


@app.task
def tidy() -> None: ...
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(redis_server: RedisServer, tmp_path: Path) -> Run:
    """Runs ``streamtask -A shop ARGS`` and checks its exit status."""
    (tmp_path / "shop.py").write_text(APP)

    def run(
        *args: str, status: int = 0, url: str | None = None, app: str | None = "shop:app", stdin: str = "", **env: str
    ) -> subprocess.CompletedProcess[str]:
        values = {**os.environ, "PYTHONPATH": str(ROOT), "URL": url or redis_server.url, **env}
        for name in ("COLUMNS", "STREAMTASK_APP"):
            if name not in env:
                values.pop(name, None)
        done = subprocess.run(
            [sys.executable, "-m", "streamtask", *(["-A", app] if app else []), *args],
            cwd=tmp_path, env=values, input=stdin, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == status, f"{args}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        if status == 0 and "--traceback" not in args:
            assert "Traceback (most recent call last)" not in done.stderr
        return done

    return run


@pytest.fixture
def seeded(redis_server: RedisServer) -> StreamTask:
    """Five messages of one shard: one is dead, one was given to an owner, three wait; and one is delayed."""
    app = StreamTask("shop", broker=redis_server.url, shards=2, lease=0.3)

    @app.task(name="shop.push", shard_key="user")
    def push(user: int, text: str = "") -> None: ...

    queue = app.queue("default")
    queue.declare(("workers",))
    user = next(i for i in range(100) if queue.shard_for(b"%d" % i) == 1)
    for i in range(2):
        push.delay(user, text=f"text {i}")
    link = app.broker.link()
    lease = leases.acquire(link, queue.shard_keys(1), "workers", "1" * 32, 60_000)
    assert isinstance(lease, leases.Lease)
    consumer = ShardConsumer(lease, "default", 1, ConsumerSettings(), OneLink(link))
    consumer.arrivals.absorb(link.call(consumer.arrivals.read_command())[0][1])
    batch = consumer.hand_out(1)
    assert batch is not None
    message = "ValueError: \x1b[31mno [bold]device[/bold]"
    batch.outcomes.append((0, Outcome(Kind.DEAD, reason="failed", message=message, traceback="Traceback:\n  here")))
    consumer.backlog.complete(batch)
    consumer.settler.flush()
    for i in range(3):
        push.delay(user, text=f"text {i}")
    push.apply_async((user,), countdown=1000)
    link.close()
    app.close()
    return app


def read_json(done: subprocess.CompletedProcess[str]) -> Any:
    assert "\x1b" not in done.stdout
    return json.loads(done.stdout)


# Reading


def test_status_as_json(run: Run, seeded: StreamTask) -> None:
    data = read_json(run("status", "--json"))
    assert list(data) == ["default"]
    row = data["default"]
    assert set(row) >= {"shards", "consumers", "workers", "in_per_s", "out_per_s", "groups", "epoch", "backlog"}
    shard = row["shards"][1]
    assert set(shard) == {"shard", "owner", "token", "lag", "pending", "delayed", "dead", "length"}
    assert (shard["owner"], shard["lag"], shard["pending"]) == ("1" * 32, 3, 1)
    assert (shard["delayed"], shard["dead"], shard["length"]) == (1, 1, 4)
    assert (row["backlog"], row["in_per_s"], row["out_per_s"]) == (5, 0, 0)
    assert read_json(run("status", "--json", "--queue", "default", "--interval", "0"))["default"]["in_per_s"] is None


def test_status_as_text(run: Run, seeded: StreamTask) -> None:
    text = run("status").stdout
    assert "\x1b" not in text
    assert "default  backlog 5  (lag 3, pending 1, delayed 1)" in text
    assert "! no worker is alive: nothing runs" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["SHARD", "LAG", "PENDING", "DELAYED", "DEAD", "LENGTH", "OWNER"] in rows
    assert ["1", "3", "1", "1", "1", "4", "1" * 32] in rows
    assert max(map(len, text.splitlines())) <= 100


def test_reading_an_empty_server_creates_nothing(run: Run, redis_server: RedisServer) -> None:
    assert read_json(run("status", "--json")) == {}
    assert read_json(run("consumers", "--json")) == []
    assert read_json(run("dlq", "list", "--json")) == []
    assert "no queue yet" in run("status").stdout
    assert "no consumers" in run("consumers").stdout
    assert "no dead letters" in run("dlq", "list").stdout
    run("doctor")
    for command in (["status", "-q", "nope"], ["consumers", "-q", "nope"], ["dlq", "list", "-q", "nope"]):
        assert "no queue 'nope'" in run(*command, status=1).stderr
    assert redis_server.client().keys() == []


def test_watch_in_a_pipe_shows_picture_after_picture(run: Run, redis_server: RedisServer, tmp_path: Path) -> None:
    run("status", "--json")  # writes the app's file
    args = ["-m", "streamtask", "-A", "shop", "status", "--watch", "--json", "--interval", "0.1"]
    with spawn(*args, env={"URL": redis_server.url}, cwd=tmp_path) as watch:
        wait_until(lambda: len(watch.lines) >= 3, 20, lambda: str(watch), progress=lambda: watch.stdout)
        assert [json.loads(line) for line in watch.lines[:3]] == [{}, {}, {}]
        watch.signal(2)
        assert watch.wait() == 0
        assert "Traceback" not in watch.stderr


def test_watch_says_what_is_below_the_screen_and_why_it_stands_still(own_server: RedisServer, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(APP.replace("shards=2", "shards=64"))
    app = StreamTask("shop", broker=own_server.url, shards=64)
    app.queue("default").declare(("workers",))
    app.close()
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    seen = b""

    def screen() -> str:
        nonlocal seen
        with contextlib.suppress(OSError):  # after its end
            while select.select([ours], [], [], 0)[0]:
                seen += os.read(ours, 65536)
        return seen.decode(errors="replace")

    args = [sys.executable, "-m", "streamtask", "-A", "shop", "status", "--watch", "--interval", "0.1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "URL": own_server.url, "TERM": "xterm"}
    with popen(args, stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, env=env) as watch:
        try:
            os.close(theirs)
            # 64 shards and the shared stream below 5 lines of headings, on 24 lines.
            wait_until(lambda: "... 47 more lines" in screen(), 20, screen)
            own_server.kill()
            wait_until(lambda: "can't be reached" in screen().rpartition("more lines")[2], 20, screen)
            watch.send_signal(signal.SIGINT)
            wait_until(lambda: screen() and watch.poll() is not None, 20, screen)
            assert watch.returncode == 0
            # What was seen last stays in the terminal, whole.
            left = screen().rpartition("\x1b[?1049l")[2]
            assert "  63  " in left
            assert "can't be reached" in left
        finally:
            watch.kill()
            os.close(ours)


def test_consumers(run: Run, seeded: StreamTask) -> None:
    (row,) = read_json(run("consumers", "--json"))
    assert set(row) >= {"queue", "shard", "group", "consumer", "pending", "alive", "stale", "worker"}
    assert (row["shard"], row["consumer"], row["pending"], row["alive"]) == (1, "owner", 1, True)
    text = run("consumers").stdout
    assert "1 registered, 1 alive, 0 stale" in text
    assert "no stale consumers" in run("consumers", "--stale").stdout


def test_doctor(run: Run, seeded: StreamTask, redis_server: RedisServer) -> None:
    checks = read_json(run("doctor", "--json", status=1))
    assert all(set(check) == {"name", "ok", "message", "advice"} for check in checks)
    assert {check["name"] for check in checks if check["ok"] is False} == {"served"}
    assert "FAIL  served" in run("doctor", status=1).stdout
    redis_server.client().flushall()
    redis_server.config_set(maxmemory_policy="allkeys-lru")
    assert "warn  eviction" in run("doctor").stdout


# Dead letters


def test_dead_letters_from_list_to_replay(run: Run, seeded: StreamTask) -> None:
    (row,) = read_json(run("dlq", "list", "--json"))
    text = run("dlq", "list").stdout
    assert row["id"] in text
    assert "[bold]device[/bold]" in text
    assert "\x1b" not in text
    assert "no dead letters of task other (1 of others)" in run("dlq", "list", "--task", "other").stdout
    shown = run("dlq", "show", row["id"]).stdout
    assert '{"text": "text 0"}' in shown
    assert "Traceback:\n  here" in shown
    assert "\x1b" not in shown
    assert read_json(run("dlq", "show", row["id"], "--json"))["kwargs"] == {"text": "text 0"}
    run("dlq", "replay", status=2)
    run("dlq", "replay", row["id"], "--all", status=2)
    assert "replayed 1 dead letter" in run("dlq", "replay", row["id"]).stdout
    assert "there is no dead letter" in run("dlq", "replay", row["id"], status=1).stderr
    assert "there is no dead letter" in run("dlq", "show", row["id"], status=1).stderr
    assert "is no id" in run("dlq", "show", "what", status=1).stderr
    assert read_json(run("dlq", "replay", "--all", "--json")) == {"replayed": 0, "queues": {}}


def test_dead_letters_are_removed_only_when_meant(run: Run, seeded: StreamTask) -> None:
    run("dlq", "purge", stdin="n\n", status=1)
    assert len(read_json(run("dlq", "list", "--json"))) == 1
    assert "removed 0" in run("dlq", "purge", "--yes", "--task", "other").stdout
    assert "removed 1 dead letter" in run("dlq", "purge", stdin="y\n").stdout
    assert "removed 0" in run("dlq", "purge").stdout


def test_forged_dead_letters_are_shown_and_harmless(seeded: StreamTask, redis_server: RedisServer) -> None:
    """Whatever stands in a dead letter: whoever may append may have chosen all of it."""
    client = redis_server.client()
    key = seeded.queue("default").shard_keys(0).dlq
    nasty = "\x1b]0;mine\x07\x9b31m\u202e\u2066\u200b\ud800\n  reason  fine"
    deep: object = []
    for _ in range(900):
        deep = [deep]
    as_key = nasty.encode("utf-8", "replace")
    real = wire.encode("shop.push", b"1", b"i" * 16, [harmless(nasty), float("nan"), deep], {"x" * 100_000: as_key})
    text = wire.encode(harmless(nasty), as_key, harmless(nasty) * 1000, [], {}, {"x": harmless(nasty)})
    errors: list[object] = [
        dict.fromkeys(("reason", "message", "traceback", "task", "id", "key", "attempts", "crashes", "dead_at"), value)
        for value in (nasty, nasty * 1_000, 7, 1e300, -5, True, [nasty], {nasty: nasty}, None, 10**40)
    ]
    errors += [[], nasty, 3, None]
    raw = [json.dumps(error).encode() for error in errors]
    raw += [b"", b"\xff\x9b", b"[" * 100_000, b'{"attempts": NaN, "dead_at": Infinity}', b"9" * 20_000]
    for i, error in enumerate(raw):
        message = [real, text, b"\x9b\xff junk"][i % 3]
        fields = ["error", error, "entry", as_key, "group", b"g\x9b", "held", b"x", "m", message]
        client.execute_command("XADD", key, "*", *fields)
    for entry in ([b"\x9b", b"\x1b"], [b"error", b"{}", b"m", real], [b"a", b"b"] * 5):
        client.execute_command("XADD", key, "*", *entry)
    client.xadd(key, {"error": b"{}", "entry": "1-1", "group": "g", "held": "0", "m": real}, id="9999999999999999-7")
    app = seeded
    client.hset(
        app.queue("default").keys.member_info("workers"),
        mapping={"a": "[1]", "b": b'{"pid": "x"}', "c": b'{"host": [1]}'},
    )
    client.zadd(app.queue("default").keys.members("workers"), dict.fromkeys("abc", 10**16))

    def invoke(command: click.Command, *args: str) -> str:
        fresh = StreamTask("shop", broker=redis_server.url, shards=2, lease=0.3)
        done = CliRunner().invoke(command, args, obj={"app": lambda: fresh})
        assert done.exit_code == 0, f"{args}: {done.exception!r}"
        assert done.output.replace("\n", "").isprintable()
        return done.output

    def strict(text: str) -> Any:
        assert text.isascii()
        return json.loads(text, parse_constant=lambda name: pytest.fail(name))

    table = invoke(dlq, "list", "-n", "100")
    assert len(table) < 100_000
    rows = strict(invoke(dlq, "list", "-n", "100", "--json"))
    assert len(rows) == len(raw) + 5  # with the one of ``seeded``
    assert rows[0]["id"] == "0:9999999999999999-7"
    assert rows[0]["dead_at"] is None
    assert "9999999999999999-7" in table
    for row in rows:
        assert type(row["attempts"]) in (int, type(None))
        assert type(row["reason"]) is str
        shown = invoke(dlq, "show", row["id"])
        assert len(shown) < 200_000
        assert "\nreason  fine" not in shown
        assert strict(invoke(dlq, "show", row["id"], "--json")).keys() == row.keys()
    strict(invoke(status, "--interval", "0", "--json"))
    invoke(status, "--interval", "0")
    invoke(consumers)


# Acting


def test_purge_asks_and_counts(run: Run, seeded: StreamTask) -> None:
    done = run("purge", "default", stdin="n\n", status=1)
    assert "Remove 3 waiting messages and 1 delayed of queue default" in done.stderr
    assert "removed 3 messages" in run("purge", "default", "--yes", "--keep-delayed").stdout
    assert read_json(run("purge", "default", "--yes", "--json")) == {"queue": "default", "removed": 1}
    assert "no queue 'nope'" in run("purge", "nope", "--yes", status=1).stderr


def test_call_stores_a_message(run: Run, redis_server: RedisServer) -> None:
    sent = run("call", "shop.push", "--args", "[7]", "--kwargs", '{"text": "hi"}').stdout.strip()
    assert len(sent) == 36
    run("call", "shop.tidy", "--queue", "other", "--countdown", "100")
    first = read_json(run("call", "shop.push", "--args", "[7]", "--dedupe-id", "order-1", "--json"))
    again = read_json(run("call", "shop.push", "--args", "[7]", "--dedupe-id", "order-1", "--json"))
    assert (first["stored"], again["stored"], first["id"]) == (True, False, again["id"])
    data = read_json(run("status", "--json", "--interval", "0"))
    assert (data["default"]["backlog"], data["other"]["delayed"]) == (2, 1)


def test_call_says_what_is_wrong(run: Run, redis_server: RedisServer) -> None:
    assert "did you mean shop.push?" in run("call", "push", status=1).stderr
    assert "did you mean shop.push" in run("call", "shop.psuh", status=1).stderr
    wrong = run("call", "shop.push", "--kwargs", '{"usr": 1}', status=1).stderr
    assert "these arguments don't fit the task shop.push" in wrong
    assert "'usr'" in wrong
    assert "shard key" in run("call", "shop.push", "--args", "[null]", status=1).stderr
    for args in (
        ["--args", "{"], ["--args", "{}"], ["--kwargs", "[]"], ["--countdown", "nan"], ["--args", "[7]", "--dedupe-id", ""],
    ):  # fmt: skip
        done = run("call", "shop.push", *args, status=2)
        assert args[-2].removeprefix("--").replace("-", "_") in done.stderr.replace("-", "_")
    assert "keeps none" in run("call", "shop.tidy", "--wait", "1", status=2).stderr
    assert redis_server.client().keys() == []


def test_call_waits_for_the_result(run: Run, redis_server: RedisServer) -> None:
    done = run("call", "shop.tidy", "--wait", "0.1", status=1, BACKEND=redis_server.url)
    assert len(done.stdout.strip()) == 36
    assert "no result" in done.stderr
    store = StreamTask("shop", broker=redis_server.url, backend=True)
    assert store.results is not None
    task_id = "11111111-1111-4111-8111-111111111111"
    origin = ("default", "shared", b"1-1")
    link = store.broker.link()
    link.call(store.results.pack(task_id, origin, "SUCCESS", {"sum": 3})[1])
    done = run("call", "shop.tidy", "--task-id", task_id, "--wait", "10", BACKEND=redis_server.url)
    assert done.stdout == f'{task_id}\n{{"sum": 3}}\n'
    link.call(store.results.pack(task_id, origin, "FAILURE", error="ValueError: no")[1])
    done = run("call", "shop.tidy", "--task-id", task_id, "--wait", "10", status=1, BACKEND=redis_server.url)
    assert "ValueError: no" in done.stderr
    link.close()
    store.close()


# Errors


def test_wrong_usage_is_status_2(run: Run) -> None:
    assert "STREAMTASK_APP" in run("status", app=None, status=2).stderr
    assert "nomodule" in run("status", app="nomodule:app", status=2).stderr
    assert "is no StreamTask app" in run("status", app="shop:push", status=2).stderr
    run("nocommand", status=2)
    run("status", "--nooption", status=2)
    run("status", app="shop", STREAMTASK_APP="nomodule")
    run("status", app=None, STREAMTASK_APP="shop:app")


@pytest.mark.parametrize(
    "url, status, says",
    [
        ("redis://:hunter2@127.0.0.1:1/0", 1, "can't be reached"),
        ("foo://:hunter2@127.0.0.1/0", 2, "unknown scheme"),
        ("redis://:hunter2@127.0.0.1:nope/0", 2, "can't be read"),
    ],
)
@pytest.mark.parametrize(
    "command", [["status"], ["status", "--json"], ["dlq", "list"], ["call", "shop.tidy", "--timeout", "0.1"]]
)
def test_a_wrong_url_is_one_line_without_the_password(
    run: Run, command: list[str], url: str, status: int, says: str
) -> None:
    done = run(*command, url=url, status=status)
    assert says in done.stderr
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert "hunter2" not in done.stderr


def test_a_refused_password_is_not_shown(run: Run, redis_server: RedisServer) -> None:
    url = redis_server.url.replace("//", "//:hunter2@")
    assert "hunter2" not in run("status", url=url, status=2).stderr
    failed = run("doctor", "--json", url=url, status=1)
    assert "hunter2" not in failed.stdout + failed.stderr
    assert [check["ok"] for check in read_json(failed)] == [False]


def test_traceback_is_shown_when_asked_for(run: Run) -> None:
    url = "redis://:hunter2@127.0.0.1:1/0"
    assert "Traceback" not in run("status", url=url, status=1).stderr
    shown = run("--traceback", "status", url=url, status=1).stderr
    assert "Traceback (most recent call last)" in shown
    assert "hunter2" not in shown


def test_help_needs_neither_app_nor_redis(run: Run) -> None:
    text = run("--help", app=None).stdout
    assert "Exit status:" in text
    assert "worker-process" not in text
    for name in ("call", "status", "consumers", "dlq", "purge", "doctor"):
        assert f"  {name} " in text
        assert "--help" in run(name, "--help", app=None).stdout
    assert "streamtask" in run("--version", app=None).stdout


def test_a_missing_command_module_hides_only_itself(run: Run) -> None:
    missing = [
        n for n, place in COMMANDS.items() if not (ROOT / (place.partition(":")[0].replace(".", "/") + ".py")).exists()
    ]
    for name in missing[:1]:
        assert f"  {name} " not in run("--help", app=None).stdout
        assert "No such command" in run(name, status=2).stderr


# Parts


def test_log_lines() -> None:
    record = logging.makeLogRecord(
        {"name": "a", "levelname": "INFO", "levelno": 20, "msg": "two\nlines \x1b[31m%s", "args": ("x",), "shard": 3}
    )
    text = TextFormatter().format(record)
    assert text.endswith("INFO    a: two\\nlines \\x1b[31mx shard=3")
    event = json.loads(JsonFormatter().format(record))
    assert (event["level"], event["logger"], event["message"], event["shard"]) == (
        "info",
        "a",
        "two\nlines \x1b[31mx",
        3,
    )
    assert set(event) == {"time", "level", "logger", "message", "process", "shard"}
    try:
        raise ValueError("no")
    except ValueError:
        record.exc_info = sys.exc_info()
    assert "\n    ValueError: no" in TextFormatter().format(record)
    assert JsonFormatter().format(record).count("\n") == 0
    assert "ValueError: no" in json.loads(JsonFormatter().format(record))["exception"]


def test_small_formats() -> None:
    assert ranges([0, 1, 2, 5, 7, 8, "shared"]) == "0-2, 5, 7-8, shared"
    assert ranges([]) == ""
    assert [age(5), age(65), age(7200), age(90000), age(-1)] == ["5s", "1m", "2h", "1d", "0s"]
    assert [number(None), number(12345), number(1.25, "/s")] == ["-", "12,345", "1.2/s"]
    assert printable("a\x1b[0m\r\té\n") == "a\\x1b[0m\\r\\té\n"
    assert jsonable({1: {b"\xff"}, "a": (1, None)}) == {"1": ["\\xff"], "a": [1, None]}
