"""The test rig itself does what the tests of the layers above take for granted."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.fix_proxy import Proxy
from tests.fix_redis import RedisServer, server_binaries
from tests.helpers import Starved, is_alive, our_processes, popen, spawn, wait_until

MakeProxy = Callable[[RedisServer], Proxy]


def fragile(url: str, **options: Any) -> redis.Redis:
    """A client that says at once that its connection broke."""
    client: redis.Redis = redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), **options)
    return client


def test_every_version_answers_and_is_what_it_says(redis_server_all: RedisServer, redis_version: str) -> None:
    info: Any = redis_server_all.client().info("server")
    assert info["redis_version"] == ".".join(map(str, redis_server_all.version))
    assert redis_server_all.label == redis_version
    assert redis_version in server_binaries()


@pytest.mark.parametrize("turn", [1, 2])
def test_each_test_gets_a_clean_server(redis_server: RedisServer, turn: int) -> None:
    client = redis_server.client(decode_responses=True)
    assert client.dbsize() == 0
    assert redis_server.config_get("maxmemory") == {"maxmemory": "0"}
    assert client.acl_users() == ["default"]
    sha = "a42059b356c875f0717db19a51f6aaca9ae659ea"
    assert client.script_exists(sha) == [False]
    client.set("a", "b")
    assert client.script_load("return 1") != sha
    assert client.script_load("return {1,2}")
    client.acl_setuser("somebody", enabled=True, nopass=True)
    redis_server.config_set(maxmemory="3mb")


@pytest.mark.parametrize("turn", [1, 2])
def test_a_shared_server_that_a_test_ruined_is_replaced(redis_server: RedisServer, turn: int) -> None:
    assert redis_server.client().dbsize() == 0
    redis_server.config_set(requirepass="secret") if turn == 1 else redis_server.kill()


def test_data_lives_through_kill_and_restart(own_server_all: RedisServer) -> None:
    own_server_all.client().set("a", "b")
    port, pid = own_server_all.port, own_server_all.pid
    own_server_all.kill()
    assert not is_alive(pid)
    assert not own_server_all.answers()
    own_server_all.restart()
    assert own_server_all.port == port
    assert own_server_all.pid != pid
    assert own_server_all.client().get("a") == b"b"
    own_server_all.restart()
    assert own_server_all.client().get("a") == b"b"


def test_a_paused_server_keeps_connections_open_and_is_silent(own_server: RedisServer) -> None:
    client = fragile(own_server.url, socket_timeout=0.1)
    client.ping()
    own_server.pause()
    with pytest.raises(redis.TimeoutError):
        client.ping()
    own_server.resume()
    assert fragile(own_server.url).ping()


def test_a_unix_socket_server() -> None:
    with RedisServer(list(server_binaries().values())[-1], unix=True) as server:
        assert server.client().ping()
        assert server.url.startswith("unix://")
        folder = server.dir
    assert not folder.exists()


def test_whoever_has_the_port_already_is_not_taken_for_the_new_server(own_server: RedisServer) -> None:
    """It would vanish in the middle of a test, with the test that it belongs to."""
    other = RedisServer(own_server.binary)
    other.port = own_server.port
    with other:
        assert other.port != own_server.port
        assert other.client().info("server")["process_id"] == other.pid


def test_a_server_started_in_a_thread_outlives_the_thread(own_server: RedisServer) -> None:
    own_server.kill()
    thread = threading.Thread(target=own_server.restart)
    thread.start()
    thread.join()
    time.sleep(0.05)  # nothing must happen, so there is nothing to wait for
    assert own_server.answers()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux only")
def test_a_server_dies_with_a_killed_test_run() -> None:
    code = (
        "import time; from tests.fix_redis import *\n"
        "server = RedisServer(list(server_binaries().values())[-1]).start()\n"
        "print('pid', server.pid, server.dir, flush=True); time.sleep(600)"
    )
    with spawn("-c", code) as run:
        _, pid, folder = run.wait_line("pid").split()
        assert is_alive(int(pid))
        run.kill()
        wait_until(lambda: not is_alive(int(pid)))
        for path in Path(folder).iterdir():
            path.unlink()
        Path(folder).rmdir()


# --- proxy


def test_proxy_passes_traffic_of_any_size(redis_server: RedisServer, proxy: MakeProxy) -> None:
    way = proxy(redis_server)
    client = fragile(way.url)
    big = os.urandom(8 << 20)
    client.set("big", big)
    assert client.get("big") == big
    assert way.connections == 1
    assert way.open_connections == 1
    assert way.bytes_to_server > len(big)
    assert way.bytes_to_client > len(big)
    client.close()
    wait_until(lambda: way.open_connections == 0)


def test_lost_reply(redis_server: RedisServer, proxy: MakeProxy) -> None:
    way = proxy(redis_server)
    way.cut_after_request(b"counter", times=2)
    client = fragile(way.url)
    for expected in (b"1", b"2"):
        with pytest.raises(redis.ConnectionError):
            client.incr("counter")
        assert redis_server.client().get("counter") == expected  # done before the client knew
    assert client.incr("counter") == 3
    assert way.cuts == 2
    assert way.connections == 3


def test_lost_request(redis_server: RedisServer, proxy: MakeProxy) -> None:
    way = proxy(redis_server)
    way.cut_before_request(b"counter")
    client = fragile(way.url)
    with pytest.raises(redis.ConnectionError):
        client.incr("counter")
    assert client.incr("counter") == 1


def test_lost_reply_of_a_request_that_comes_in_several_chunks(redis_server: RedisServer, proxy: MakeProxy) -> None:
    way = proxy(redis_server)
    way.cut_after_request(b"bigkey")
    client = fragile(way.url)
    with pytest.raises(redis.ConnectionError):
        client.set("bigkey", b"x" * (4 << 20))
    assert redis_server.client().strlen("bigkey") == 4 << 20


def test_cut_and_refuse(redis_server: RedisServer, proxy: MakeProxy) -> None:
    way = proxy(redis_server)
    client = fragile(way.url)
    client.ping()
    way.refuse()
    assert client.ping()  # an open connection stays
    assert way.cut() == 1
    for _ in range(2):
        with pytest.raises(redis.ConnectionError):
            client.ping()
    way.accept()
    assert client.ping()


def test_blackhole_swallows_and_resets_at_its_end(redis_server: RedisServer, proxy: MakeProxy) -> None:
    way = proxy(redis_server)
    client = fragile(way.url, socket_timeout=0.1, socket_connect_timeout=1)
    client.ping()
    way.blackhole(True)
    for _ in range(2):  # the open connection, and a new one
        with pytest.raises(redis.TimeoutError):
            client.incr("a")
    way.blackhole(False)
    assert client.incr("a") == 1


def test_blackhole_with_hold_delivers_later(redis_server: RedisServer, proxy: MakeProxy) -> None:
    way = proxy(redis_server)
    client = fragile(way.url)
    client.ping()
    way.blackhole(True, hold=True)
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(client.incr("a")))
    thread.start()
    thread.join(0.1)
    assert not got
    way.blackhole(False)
    thread.join(10)
    assert got == [1]


def test_delay(redis_server: RedisServer, proxy: MakeProxy) -> None:
    way = proxy(redis_server)
    client = fragile(way.url)
    client.ping()
    way.delay(0.1)
    start = time.monotonic()
    assert client.ping()
    assert 0.2 <= time.monotonic() - start < 2
    way.delay(0)
    watch = Starved()
    assert client.ping()
    assert watch.spent < 0.1


# --- helpers


def test_wait_until_says_what_it_saw_last() -> None:
    values = iter([0, [], "there"])
    assert wait_until(lambda: next(values)) == "there"
    with pytest.raises(AssertionError, match=r"the door opens; last value: 0"):
        wait_until(lambda: 0, timeout=0.02, message="the door opens")


def test_spawn_kills_the_whole_group_and_keeps_the_output() -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('child', child.pid); print('oops', file=sys.stderr); time.sleep(600)"
    )
    with spawn("-c", code, env={"A": "1"}) as process:
        child = int(process.wait_line("child").split()[1])
        wait_until(lambda: process.stderr == "oops\n")
        assert is_alive(child)
        assert process.returncode is None
        assert {child, process.pid} <= set(our_processes())
    assert process.process.returncode == -signal.SIGKILL
    wait_until(lambda: not is_alive(child))


def test_spawn_finds_the_repository() -> None:
    with spawn("-c", "import streamtask.errors, tests.helpers; print('fine')", cwd="/") as process:
        assert process.wait() == 0, str(process)
        assert process.lines == ["fine"]


def test_what_a_test_leaves_behind_is_seen_even_as_a_daemon() -> None:
    code = "import os, time\nif os.fork() == 0:\n    os.setsid(); print(os.getpid(), 'up', flush=True); time.sleep(60)"
    with spawn("-c", code) as process:
        daemon = int(process.wait_line("up").split()[0])
        assert process.wait() == 0
        assert daemon in our_processes()
        os.kill(daemon, signal.SIGKILL)
        wait_until(lambda: daemon not in our_processes())


def test_a_redis_server_left_behind_as_a_daemon_is_seen(tmp_path: Path) -> None:
    binary = list(server_binaries().values())[-1]
    code = (
        "import subprocess, sys; print(subprocess.Popen([sys.argv[1], '--port', '0', '--unixsocket', 's', '--dir', "
        "sys.argv[2]], stdout=subprocess.DEVNULL, start_new_session=True).pid, 'up')"
    )
    with spawn("-c", code, binary, tmp_path) as process:
        daemon = int(process.wait_line("up").split()[0])
        assert process.wait() == 0
    wait_until((tmp_path / "s").exists)
    assert daemon in our_processes()
    os.kill(daemon, signal.SIGKILL)
    wait_until(lambda: daemon not in our_processes())


def test_popen_from_a_thread() -> None:
    started: list[Any] = []
    thread = threading.Thread(target=lambda: started.append(popen(["sleep", "600"])))
    thread.start()
    thread.join()
    assert started[0].poll() is None
    started[0].kill()
    started[0].wait()
