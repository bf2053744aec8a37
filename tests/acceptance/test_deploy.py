"""The files of ``deploy/``: they work as they are, and allow no more than they must."""

from __future__ import annotations

import configparser
import contextlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any

import kombu
import pytest
import redis
import yaml

import streamtask.transport  # noqa: F401  registers its schemes
from streamtask.operations import Inspector
from streamtask.redis import wire
from tests.fix_redis import RedisServer, chosen_binaries
from tests.helpers import ROOT, wait_until
from tests.worker.rig import TASKS, Site, site  # noqa: F401  a fixture

DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "streamtask-worker.service"
PLACEHOLDER = re.compile(r"#SHA256_[A-Z_]+")


class DeployedServer(RedisServer):
    """A redis-server with ``deploy/redis.conf`` and ``deploy/users.acl``; each user's password is its name."""

    def __init__(self, binary: str) -> None:
        super().__init__(binary)
        users = [
            PLACEHOLDER.sub("#" + sha256(line.split()[1].encode()).hexdigest(), line.replace("{shop.", "{t."))
            for line in (DEPLOY / "users.acl").read_text().splitlines()
        ]
        (self.dir / "users.acl").write_text("\n".join(users) + "\n")

    def _arguments(self) -> list[str]:
        own = {"port": str(self.port), "dir": str(self.dir), "aclfile": str(self.dir / "users.acl")}
        own |= {"logfile": str(self.dir / "redis.log")}
        options = (part for name, value in own.items() for part in (f"--{name}", value))
        return [self.binary, str(DEPLOY / "redis.conf"), *options]

    def of(self, user: str) -> str:
        return f"redis://{user}:{user}@127.0.0.1:{self.port}/0"

    @property
    def url(self) -> str:
        return self.of("app")

    @property
    def plain_url(self) -> str:
        return self.of("operator")

    def refused(self) -> list[str]:
        """What users were refused; redis-py tries to tell its version, which is no matter."""
        log = self.client(decode_responses=True).execute_command("ACL", "LOG")
        rows = [row if isinstance(row, dict) else dict(zip(row[::2], row[1::2], strict=True)) for row in log]
        found = (f"{row['username']}: {row['reason']} {row['object']}" for row in rows)
        return [one for one in found if not one.endswith(("command client", "command client|setinfo"))]


@pytest.fixture
def deployed(redis_version: str, request: pytest.FixtureRequest) -> Iterator[DeployedServer]:
    with DeployedServer(chosen_binaries(request.config)[redis_version]) as server:  # type: ignore[misc]
        yield server


def test_a_worker_and_the_commands_may_do_what_they_must(
    deployed: DeployedServer,
    site: Callable[..., Site],  # noqa: F811
) -> None:
    sut = site(deployed, TASKS, shards=2, backend=True, max_crashes=0)
    sut.pod()
    sut.send("a", range(5), fail=1)
    sut.send(None, range(5), fail=1)
    sut.task("put").apply_async(kwargs={"k": "b", "n": 9}, countdown=0.1)
    sut.produced["b"].append(9)
    assert sut.task("free").delay(n=99).get(timeout=30) is None
    sut.task("gated").delay(k="c", n=50)
    sut.open_gate(50, outcome="reject")
    wait_until(sut.dead, 30)
    sut.wait_ended(12)
    with contextlib.closing(Inspector(sut.app)) as inspector:
        assert inspector.status(interval=0)["default"]
        assert inspector.consumers()
        (letter,) = inspector.dead_letters("default")
        assert inspector.dead_letter(letter["id"])
        assert inspector.replay("default") == 1
        wait_until(sut.dead, 30)
        assert inspector.drop("default") == 1
        inspector.purge("default")
        checks = {check["name"]: check for check in inspector.doctor()}
        assert [name for name, check in checks.items() if check["ok"] is not True] == []
        assert checks["access"]["message"] == "a connection without a password is refused"
    assert deployed.refused() == []


def test_celery_and_kombu_may_do_what_they_must(deployed: DeployedServer) -> None:
    url = deployed.of("celery").replace("redis://", "streamtask://")
    with kombu.Connection(url, transport_options={"shards": 2}) as connection:
        channel = connection.channel()
        events = kombu.Queue("heard", kombu.Exchange("events", "fanout"), auto_delete=True)(channel)
        heard: list[Any] = []
        with channel.Consumer(events, callbacks=[lambda body, message: heard.append(body)], no_ack=True):
            channel.Producer(exchange=events.exchange).publish("hi", routing_key="x")
            wait_until(lambda: heard or connection.drain_events(timeout=1) or heard)
        plain = connection.SimpleQueue("plain")
        for headers in ({}, {"shard_key": "u1"}):
            plain.put("hello", headers=headers)
            message = plain.get(timeout=20)
            assert message.payload == "hello"
            message.ack()
        plain.queue.delete()
    assert deployed.refused() == []


FORBIDDEN: dict[str, list[tuple[Any, ...]]] = {
    "default": [("PING",), ("GET", "streamtask:x")],
    "app": [
        ("GET", "other"), ("XADD", "other", "*", "a", "b"), ("PUBLISH", "other", "x"), ("SUBSCRIBE", "other"), ("KEYS", "*"),
        ("FLUSHALL",), ("CONFIG", "SET", "dir", "/tmp"), ("EVAL", "return 1", 0), ("SCRIPT", "FLUSH"), ("ACL", "LIST"),
        ("CLIENT", "KILL", "TYPE", "normal"), ("SHUTDOWN",), ("REPLICAOF", "NO", "ONE"),
        ("MIGRATE", "h", 1, "k", 0, 1), ("RENAME", "streamtask:a", "streamtask:b"), ("MONITOR",),
    ],
    "celery": [("GET", "other"), ("FLUSHALL",), ("CONFIG", "SET", "dir", "/tmp")],
    "foreign": [
        ("XRANGE", "streamtask:{t.default.0.0}:stream", "-", "+"), ("DEL", "streamtask:{t.default.0.0}:stream"),
        ("XADD", "streamtask:{t.default.0.0}:dlq", "*", "a", "b"),
        ("XADD", "streamtask:{other.default.0.0}:stream", "*", "a", "b"),
        ("XADD", "streamtask:{t.default.0.0}:wake", "*", "a", "b"), ("HSET", "streamtask:{t.default}:meta", "shards", 1),
        ("HMGET", "streamtask:{t.default.0.0}:state", "epoch"), ("EVALSHA", "0" * 40, 0), ("PUBLISH", "streamtask:{t}", "x"),
    ],
}  # fmt: skip


def test_nobody_may_do_more(deployed: DeployedServer) -> None:
    for user, commands in FORBIDDEN.items():
        url = deployed.of(user) if user != "default" else f"redis://127.0.0.1:{deployed.port}/0"
        with contextlib.closing(redis.Redis.from_url(url, protocol=2)) as client:
            for command in commands:
                with pytest.raises((redis.exceptions.NoPermissionError, redis.exceptions.AuthenticationError)):
                    client.execute_command(*command)


def test_a_foreign_producer_may_append(deployed: DeployedServer, site: Callable[..., Site]) -> None:  # noqa: F811
    sut = site(deployed, TASKS, shards=2)
    sut.app.queue("default").declare()
    sut.pod()
    with contextlib.closing(redis.Redis.from_url(deployed.of("foreign"), protocol=2)) as client:
        shards, epoch = client.hmget("streamtask:{t.default}:meta", "shards", "epoch")
        assert (shards, epoch) == (b"2", b"0")
        envelope = wire.encode("free", None, b"x" * 16, (5,), None, None)
        client.xadd("streamtask:{t.default.0.shared}:stream", {"m": envelope})
    sut.wait_ended(1)


def used_commands() -> set[str]:
    """The commands of Redis in our scripts and calls."""
    found = set()
    for path in sorted((ROOT / "streamtask").rglob("*.lua")):
        found |= set(re.findall(r"""\.p?call\(\s*['"](\w+)""", path.read_text()))
    for path in sorted((ROOT / "streamtask").rglob("*.py")):
        found |= set(re.findall(r"""\b(?:command|pack|_bulk|pack_command)\(\s*\(?\s*"([A-Z]+)\"""", path.read_text()))
    return {name.lower() for name in found}


def test_the_users_may_call_what_is_called_and_nothing_else() -> None:
    users = {line.split()[1]: line.split()[2:] for line in (DEPLOY / "users.acl").read_text().splitlines()}
    may = {
        user: {rule[1:].partition("|")[0] for rule in rules if rule.startswith("+") and rule[1] != "@"}
        for user, rules in users.items()
    }
    of_kombu = {"psubscribe", "punsubscribe"}
    assert may["app"] == used_commands() - of_kombu - {"ping"} | {"unsubscribe"}
    assert may["celery"] == may["app"] | of_kombu
    assert users["default"][0] == "off"
    assert all(PLACEHOLDER.fullmatch(rules[1]) for user, rules in users.items() if user != "default")


def test_redis_listens_to_this_machine_alone() -> None:
    lines = (DEPLOY / "redis.conf").read_text().splitlines()
    assert {"bind 127.0.0.1 -::1", "protected-mode yes", "aclfile /etc/redis/users.acl"} <= set(lines)


def test_the_unit_holds_no_secret_and_is_closed() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    service = unit["Service"]
    assert "Environment" not in service
    assert service["EnvironmentFile"].startswith("/etc/")
    for name in (
        "NoNewPrivileges",
        "PrivateTmp",
        "PrivateDevices",
        "ProtectHome",
        "RestrictNamespaces",
        "RestrictSUIDSGID",
    ):
        assert service[name] == "yes", name
    assert service["ProtectSystem"] == "strict"
    assert service["CapabilityBoundingSet"] == ""


def test_systemd_finds_the_unit_closed() -> None:
    if shutil.which("systemd-analyze") is None:
        return  # its settings are looked at above
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(UNIT)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if "Overall exposure" in done.stdout:
        assert done.returncode == 0, done.stdout


def test_the_pod_is_closed() -> None:
    secret, deployment = yaml.safe_load_all((DEPLOY / "worker.yaml").read_text())
    assert secret["kind"] == "Secret"
    pod = deployment["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert container["resources"]["limits"]["memory"]
    assert "value" not in container["env"][0]
    assert "redis://" not in str(deployment)
