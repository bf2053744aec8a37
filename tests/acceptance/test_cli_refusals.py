"""The commands while Redis refuses: one message that says what it is, and the exit status that the help names."""

from __future__ import annotations

import sys

import pytest
from click.testing import CliRunner

from streamtask import StreamTask
from streamtask.cli import main
from tests.fix_redis import RedisServer
from tests.fix_refusals import FAULTS, refusing, server_for
from tests.parts import sampled

APP = """
import os
from streamtask import StreamTask

app = StreamTask("shop", broker=os.environ["URL"], shards=2, lease=0.3, send_timeout=1)


@app.task(name="shop.push", shard_key="user")
def push(user): ...
"""

COMMANDS = {
    "status": ["status", "--interval", "0"],
    "consumers": ["consumers"],
    "doctor": ["doctor"],
    "dlq list": ["dlq", "list"],
    "dlq show": ["dlq", "show", "1:1-1"],
    "dlq replay": ["dlq", "replay", "--all"],
    "dlq purge": ["dlq", "purge", "--yes"],
    "purge": ["purge", "default", "--yes"],
    "call": ["call", "shop.push", "--kwargs", '{"user": 1}', "--timeout", "0.3"],
}
WORDS = {"OOM": "maxmemory", "NOPERM": "ACL must allow", "CLUSTERDOWN": "slots are not covered"}
READERS = {"status", "consumers", "dlq list", "dlq show"}
SERVED = {
    # There is nothing to remove, so ``purge`` writes nothing either.
    "NOREPLICAS": READERS | {"purge"},
    "READONLY": READERS | {"purge"},
    "MISCONF": READERS | {"purge"},
    "NOPERM": READERS,
    "OOM": READERS | {"dlq replay", "dlq purge", "purge"},  # what removes is to work there
}
"""The commands that do what they are asked for."""


@pytest.fixture
def server(own_server_all, request):
    """One that can refuse with the test's code."""
    with server_for(request.node.callspec.params["code"], own_server_all) as server:
        yield server


@pytest.fixture
def said(tmp_path, monkeypatch):
    """``said(server)``: the app's queue, declared, with one dead letter, and what runs the commands."""
    (tmp_path / "shop.py").write_text(APP)
    monkeypatch.syspath_prepend(str(tmp_path))

    def prepare(server: RedisServer):
        monkeypatch.setenv("URL", server.url)
        made = StreamTask("shop", broker=server.url, shards=2)
        queue = made.queue("default")
        queue.declare(("workers",))
        keys = queue.keys.shard(0, 1)
        dead = {"error": "{}", "entry": "1-1", "group": "workers", "held": "0"}
        server.client().xadd(keys.dlq, dead, id="1-1")
        made.close()

        def run(name: str):
            monkeypatch.delitem(sys.modules, "shop", raising=False)
            done = CliRunner().invoke(main, ["-A", "shop:app", *COMMANDS[name]])
            what = f"{name} says {done.exit_code}: {done.stdout}{done.stderr}"
            assert done.exception is None or isinstance(done.exception, SystemExit), what
            return done.exit_code, done.stdout, done.stderr, what

        return keys, run

    return prepare


@pytest.mark.old_redis("BUSY", "MISCONF", "OOM")
@pytest.mark.parametrize("code", sampled(FAULTS, "BUSY", "OOM", "NOPERM"))
def test_each_command_says_it_once(server: RedisServer, code, said):
    _, run = said(server)
    with refusing(server, code):
        answers = {name: run(name) for name in COMMANDS}
    for name, (status, out, err, what) in answers.items():
        if name in SERVED.get(code, ()):
            assert (status, err) == (0, ""), what
            continue
        assert status == (2 if code == "NOPERM" and name != "doctor" else 1), what
        assert WORDS.get(code, code) in " ".join((out + err).split()), what
        if name == "doctor":
            assert out.count("FAIL") in (1, 2), what  # that it is a replica is said, too
        else:
            assert (err.count("\n"), err[:7], out) == (1, "Error: ", ""), what


def test_a_key_of_a_wrong_type_is_named(redis_server: RedisServer, said):
    keys, run = said(redis_server)
    redis_server.client().delete(keys.stream)
    redis_server.client().set(keys.stream, "not a stream")
    for name in ("status", "consumers", "doctor", "purge"):
        status, out, err, what = run(name)
        assert status == 1, what
        assert f"{keys.stream} is a string, and has to be a stream" in " ".join((out + err).split()), what
        assert err.count("\n") == (0 if name == "doctor" else 1), what
    assert run("dlq show")[0] == 0
