"""A real server that answers with an error for a while: ``refusing(server, code)``."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import redis

from tests.fix_redis import RedisServer
from tests.helpers import free_port, wait_until

ENDLESS = "while true do end"


def _busy(server: RedisServer) -> Callable[[], None]:
    server.config_set({"lua-time-limit": 20})

    def run() -> None:
        with contextlib.suppress(redis.RedisError):
            server.client(socket_timeout=60).eval(ENDLESS, 0)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    admin = server.client()

    def is_busy() -> bool:
        try:
            admin.ping()
        except redis.ResponseError:
            return True
        return False

    wait_until(is_busy, 15)

    def lift() -> None:
        admin.script_kill()
        thread.join(10)

    return lift


def _no_replicas(server: RedisServer) -> Callable[[], None]:
    server.config_set({"min-replicas-to-write": 1})
    return lambda: server.config_set({"min-replicas-to-write": 0})


def _replica(server: RedisServer, stale: str) -> Callable[[], None]:
    server.config_set({"replica-serve-stale-data": stale})
    server.client().execute_command("REPLICAOF", "127.0.0.1", free_port())
    return lambda: server.client().execute_command("REPLICAOF", "NO", "ONE")


def _misconf(server: RedisServer) -> Callable[[], None]:
    """A snapshot that can't be written: a directory stands in its place."""
    admin = server.client()
    place = server.dir / "dump.rdb"
    place.unlink(missing_ok=True)
    place.mkdir()
    server.config_set({"save": "3600 100000000"})
    admin.bgsave()
    wait_until(lambda: admin.info("persistence")["rdb_last_bgsave_status"] == "err", 15)

    def lift() -> None:
        place.rmdir()
        admin.bgsave()
        wait_until(lambda: admin.info("persistence")["rdb_last_bgsave_status"] == "ok", 15)

    return lift


def _full(server: RedisServer) -> Callable[[], None]:
    server.config_set({"maxmemory": 1})
    return lambda: server.config_set({"maxmemory": 0})


def _no_permission(server: RedisServer) -> Callable[[], None]:
    admin = server.client()
    admin.execute_command("ACL", "SETUSER", "default", "-xadd", "-xreadgroup", "-evalsha")
    return lambda: admin.execute_command("ACL", "SETUSER", "default", "+@all")


FAULTS: dict[str, Callable[[RedisServer], Callable[[], object]]] = {
    "BUSY": _busy,
    "NOREPLICAS": _no_replicas,
    "READONLY": lambda server: _replica(server, "yes"),
    "MASTERDOWN": lambda server: _replica(server, "no"),
    "MISCONF": _misconf,
    "OOM": _full,
    "NOPERM": _no_permission,
}
PASSING = ["BUSY", "NOREPLICAS", "READONLY", "MASTERDOWN", "MISCONF"]
"""Those for which a call waits."""


@contextlib.contextmanager
def refusing(server: RedisServer, code: str) -> Iterator[None]:
    """The server refuses calls with this code until the block ends."""
    lift = FAULTS[code](server)
    try:
        yield
    finally:
        lift()
