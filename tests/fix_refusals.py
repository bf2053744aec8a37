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


def _loading(server: RedisServer) -> Callable[[], None]:
    """It is killed, starts anew and reads its data slowly."""
    filler = server.client().pipeline(transaction=False)
    for _ in range(100_000):
        filler.incr("filler")
    filler.execute()
    server.kill()
    server.config["key-load-delay"] = "200"  # microseconds for each command of its file
    server.start(loading=True)
    del server.config["key-load-delay"]

    def lift() -> None:
        server.restart(kill=True)
        server.client().delete("filler")

    return lift


def _cluster_down(server: RedisServer) -> Callable[[], None]:
    """One slot, in which nothing lies, is served by nobody."""
    admin = server.client()
    held: list[bytes] = admin.keys("*")
    taken = {admin.execute_command("CLUSTER", "KEYSLOT", key) for key in held}
    slot = next(slot for slot in range(16384) if slot not in taken)
    admin.execute_command("CLUSTER", "DELSLOTS", slot)
    state = "CLUSTER INFO"
    wait_until(lambda: admin.execute_command(state)["cluster_state"] == "fail", 15)

    def lift() -> None:
        admin.execute_command("CLUSTER", "ADDSLOTS", slot)
        wait_until(lambda: admin.execute_command(state)["cluster_state"] == "ok", 15)

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
    "LOADING": _loading,
    "CLUSTERDOWN": _cluster_down,  # of a server that is a Cluster of one node
    "OOM": _full,
    "NOPERM": _no_permission,
}
PASSING = ["BUSY", "NOREPLICAS", "READONLY", "MASTERDOWN", "MISCONF", "LOADING", "CLUSTERDOWN"]
"""Those for which a call waits."""


class OneNodeCluster(RedisServer):
    """A server that is a Cluster by itself."""

    def __init__(self, binary: str) -> None:
        super().__init__(binary, aof=True, config={"cluster-enabled": "yes"})
        while self.port > 55_000:  # nodes talk on a port 10,000 above
            self.port = free_port()
        self._any_port = False

    @property
    def url(self) -> str:
        return f"redis+cluster://127.0.0.1:{self.port}"

    def start(self, timeout: float = 20, *, loading: bool = False) -> RedisServer:
        super().start(timeout, loading=loading)
        admin = self.client()
        for first in range(0, 16384, 4096):
            admin.execute_command("CLUSTER", "ADDSLOTS", *range(first, first + 4096))
        wait_until(lambda: admin.execute_command("CLUSTER INFO")["cluster_state"] == "ok", 15)
        return self


def server_for(code: str, server: RedisServer) -> contextlib.AbstractContextManager[RedisServer]:
    """The server that can refuse with a code: the one given, or a Cluster of one node of its version."""
    return OneNodeCluster(server.binary) if code == "CLUSTERDOWN" else contextlib.nullcontext(server)


@contextlib.contextmanager
def refusing(server: RedisServer, code: str) -> Iterator[None]:
    """The server refuses calls with this code until the block ends."""
    lift = FAULTS[code](server)
    try:
        yield
    finally:
        lift()
