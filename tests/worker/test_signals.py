"""Whole workers are sent each signal, in each state; what bodies start is none of it; how worker processes end."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.helpers import Starved, is_alive, spawn, wait_until
from tests.parts import sampled
from tests.worker.rig import HEAD, TASKS

STARTS = (
    TASKS
    + """
import atexit, multiprocessing, subprocess

@app.task(name="write")
def write(n):
    # Buffered, as a metrics client does, and sent at exit.
    if n == 0:
        global _file
        _file = open("buffered", "a")
        atexit.register(lambda: open("at-exit", "a").write(f"{os.getpid()}\\n"))
    _file.write(f"line {n}\\n")
    note("E", None, n)

def double(x):
    return 2 * x

@app.task(name="children")
def children(n):
    note("S", None, n)
    process = subprocess.Popen(["sleep", "600"])
    process.terminate()
    ended = [process.wait()]
    process = subprocess.Popen(["sleep", "600"])
    process.send_signal(signal.SIGINT)
    ended.append(process.wait())
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    process.start()
    process.terminate()
    process.join()
    ended.append(process.exitcode)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        ended.append(pool.map(double, [1, 2]))
    note("E", None, n, ended=ended)

@app.task(name="holds_the_gil")
def holds_the_gil(n, seconds):
    note("S", None, n)
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    note("E", None, n)
"""
)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_what_a_body_starts_has_default_signals_and_a_warm_stop_lets_its_process_end(redis_server, site, concurrency):
    """Popen.terminate and wait, a Pool; then what was buffered is written, and what is registered at exit done."""
    site = site(redis_server, STARTS)
    pod = site.pod(1, concurrency)
    site.ready(1)
    (child,) = pod.children()
    site.task("children").delay(0)
    site.wait_ended(1)
    assert site.of("E", n=0)[0].more["ended"] == [-signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM, [2, 4]]
    for n in range(3):
        site.task("write").delay(n)
        wait_until(lambda n=n: len(site.of("E", n=n)) == (2 if n == 0 else 1))
    assert not Path(site.folder, "at-exit").exists()
    pod.stop()
    assert Path(site.folder, "buffered").read_text().splitlines() == ["line 0", "line 1", "line 2"]
    assert Path(site.folder, "at-exit").read_text().split() == [str(child)]
    assert "ERROR" not in pod.log
    site.wait_empty()


STAYS = """
@app.task(name="stays")
def stays(n):
    threading.Thread(target=time.sleep, args=(600,)).start()
    note("E", None, n)
"""


@pytest.mark.slow
def test_a_process_that_does_not_end_by_itself_is_killed(redis_server, site):
    site = site(redis_server, TASKS + STAYS)
    pod = site.pod(2)
    site.ready(2)
    site.task("stays").delay(0)
    site.wait_ended(1)
    took = pod.stop()
    assert took > 4
    assert "it did not end by itself" in pod.log
    site.wait_empty()


def _fails(module: Path) -> None:
    module.write_text("raise RuntimeError('a broken deployment')\n" + module.read_text())


def _mends(module: Path) -> None:
    module.write_text(module.read_text().partition("\n")[2])


def _module(site) -> Path:
    return Path(site.folder, "sut1.py")


def test_a_replacement_that_cannot_start_harms_nobody(redis_server, site):
    """A broken deployment under running workers: those that work go on, it is said aloud, and tried again and again."""
    site = site(redis_server)
    pod = site.pod(2)
    site.ready(2)
    first, second = pod.children()
    _fails(_module(site))
    site.send_gated("a", 0)
    busy = site.wait_started("a", 0).pid
    idle = second if busy == first else first
    pod.kill_child(idle)
    wait_until(lambda: pod.log.count("could not be made ready") >= 2, 30, lambda: pod.log)
    assert "a broken deployment" in pod.log
    assert "1 of 2 are at work" in pod.log
    assert is_alive(busy)
    # SIGHUP restarts nothing that could not start.
    pod.spawned.signal(signal.SIGHUP)
    wait_until(lambda: "no restart" in pod.log, 30, lambda: pod.log)
    site.open_gate(0)
    wait_until(lambda: site.of("E", "a", 0))
    assert busy in pod.children()
    _mends(_module(site))
    site.ready(2, 30)
    assert site.check().repeated == 0
    pod.stop()
    # Where none could start at all there is nothing to wait for.
    with _module(site).open("a") as file:
        file.write("\nif 'worker-process' in sys.argv: raise RuntimeError('only there')\n")
    ends = site.pod(2)
    assert ends.spawned.wait() == 1
    assert "the app can't be loaded in a worker process" in ends.log


@pytest.mark.parametrize("state", sampled(["idle", "busy"], "busy"))
def test_each_signal_does_what_users_of_celery_expect(redis_server, site, state):
    """HUP restarts warmly, USR1 shows what all threads do, USR2 does nothing, also where children get them, too; QUIT
    stops cold. None of them makes a message a dead letter, or charges one."""
    site = site(redis_server, STARTS)
    pod = site.pod(2, 2)
    site.ready(2)
    before = pod.children()
    if state == "busy":
        site.send_gated("a", 0)
        site.wait_started("a", 0)
        site.task("holds_the_gil").delay(1, 2.5)
        site.wait_started(None, 1)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        pod.spawned.signal(number)
    wait_until(
        lambda: {int(pid) for pid in re.findall(r"stacks pid=(\d+)", pod.log)} == set(before), 15, lambda: pod.log
    )
    wait_until(lambda: "SIGUSR2 does nothing" in pod.log)
    if state == "busy":
        wait_until(lambda: re.search(r"stacks pid=\d+   File .* in gated", pod.log), 15, lambda: pod.log)
        wait_until(lambda: re.search(r"stacks pid=\d+   File .* in holds_the_gil", pod.log), 15, lambda: pod.log)
        assert re.search(r"runs pid=\d+ queue=default shard=\S+ entry=\d+-\d+", pod.log)
    # To the children alone, as somebody in a hurry does.
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM, signal.SIGINT):
        for pid in before:
            os.kill(pid, number)
    # A closed session, or a service manager: all get it.
    pod.spawned.signal_group(signal.SIGHUP)
    wait_until(lambda: "warm restart" in pod.log, 30, lambda: pod.log)
    if state == "busy":
        site.send("a", range(1, 5))
        time.sleep(0.2)
        assert any(map(is_alive, before))
        site.open_gate(0)
        site.wait_ended(6)
    after = wait_until(
        lambda: len(pod.children()) == 2 and not set(before) & set(pod.children()) and pod.children(), 30
    )
    site.ready(2)
    assert pod.spawned.returncode is None
    assert len(site.of("S", "a", 0)) == (state == "busy")
    # Cold: nobody is charged, and what was cut off runs again.
    site.send_gated("b", 7)
    site.wait_started("b", 7)
    watch = Starved()
    pod.spawned.signal_group(signal.SIGQUIT)
    assert pod.spawned.wait() == 0
    assert watch.spent < 3
    assert not any(map(is_alive, after))
    site.open_gate(7)
    last = site.pod(1)
    wait_until(lambda: site.of("E", "b", 7), 20)
    assert [event.attempt for event in site.of("S", "b", 7)] == [0, 0]
    site.wait_empty()
    assert site.dead() == []
    last.stop()


def test_showing_stacks_ends_nobody(redis_server, site):
    """However often they are asked for, and whatever runs meanwhile: frames come and go in four threads."""
    site = site(
        redis_server,
        TASKS
        + """
def deep(n):
    return n and 1 + deep(n - 1)

@app.task(name="dives", max_retries=0)
def dives(n):
    note("S", None, n)
    until = time.monotonic() + 2
    while time.monotonic() < until:
        [deep(m) for m in range(0, 300, 7)]
    note("E", None, n)
""",
    )
    pod = site.pod(1, 4)
    site.ready(1)
    (child,) = pod.children()
    for n in range(4):
        site.task("dives").delay(n)
    for n in range(4):
        site.wait_started(None, n)
    for _ in range(1500):
        os.kill(child, signal.SIGUSR1)
        time.sleep(0.001)
    site.wait_ended(4)
    assert pod.children() == [child], pod.log[-3000:]
    pod.stop()


@pytest.mark.parametrize("number", sampled([signal.SIGTERM, signal.SIGINT, signal.SIGQUIT], signal.SIGTERM))
def test_a_worker_that_starts_ends_at_once(redis_server, site, number):
    """The app is being imported, by the supervisor; what restarts or shows something waits until it has started."""
    site = site(
        redis_server, "import os, time\nfor _ in range(600 if os.path.exists('slow') else 0): time.sleep(0.1)\n" + TASKS
    )
    slow = Path(site.folder, "slow")
    slow.touch()
    pod = site.pod(1)
    wait_until(lambda: _follows(pod.pid, signal.SIGCHLD), 20)  # the last to be set
    for harmless in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        pod.spawned.signal(harmless)
    pod.spawned.signal(number)
    assert pod.spawned.wait() == 0
    assert "Traceback" not in pod.log
    # And by its processes, which a terminal or a service manager tells, too.
    _module(site).write_text(SLOW_CHILD + HEAD + TASKS)
    pod = site.pod(2)
    pids = wait_until(lambda: len(found := pod.children()) == 2 and found, 20)
    for harmless in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        pod.spawned.signal_group(harmless)
    wait_until(lambda: len(set(re.findall(r"stacks pid=(\d+)", pod.log))) == 2, 20, lambda: pod.log)
    assert set(pids) <= set(pod.children())
    pod.spawned.signal_group(number)
    assert pod.spawned.wait() == 0
    assert "Traceback" not in pod.log
    assert not any(map(is_alive, pids))


def _follows(pid: int, number: int) -> bool:
    """Whether the process handles a signal."""
    caught = int(re.search(r"SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())[1], 16)
    return bool(caught >> (number - 1) & 1)


@pytest.mark.parametrize("away", sampled(["refused", "silent"], "silent"))
def test_a_stop_while_redis_is_away_ends(own_server, site, away):
    """Also where something has ended that could not be acknowledged: it runs again."""
    site = site(own_server, redis_timeout=1.0)
    pod = site.pod(3)
    site.ready(3)
    site.send_gated("a", 0)
    pid = site.wait_started("a", 0).pid
    if away == "silent":
        own_server.pause()
    else:
        own_server.kill()
    for harmless in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        pod.spawned.signal(harmless)
    wait_until(lambda: "no restart" in pod.log, 30, lambda: pod.log)
    wait_until(lambda: f"stacks pid={pid}" in pod.log)
    pod.spawned.signal(signal.SIGTERM)
    wait_until(lambda: "warm shutdown" in pod.log, 15, lambda: pod.log)
    time.sleep(0.3)
    assert is_alive(pid), "a body runs"
    site.open_gate(0)
    wait_until(lambda: site.of("E", "a", 0))
    watch = Starved()
    assert pod.spawned.wait(30) == 0
    print(f"it ended {watch.spent:.1f} s after the last body")
    assert watch.spent < 15
    assert "could not give back its shards" in pod.log
    if away == "silent":
        own_server.resume()
    else:
        own_server.restart()
    site.pod(1)
    site.wait_ended(1)
    site.wait_empty(20)
    assert site.dead() == []


SLOW_CHILD = """
import sys, time
for _ in range(600 if "worker-process" in sys.argv else 0):
    time.sleep(0.1)
"""

PID_1 = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER, as the first process of a container is by nature
os.execv(sys.executable, [sys.executable, "-m", "streamtask", *sys.argv[1:]])
"""

ORPHANS = (
    TASKS
    + """
import subprocess

@app.task(name="orphan")
def orphan(n):
    # A daemon: its parent ends before it.
    text = subprocess.run(["sh", "-c", "sleep 0.2 & echo $!"], stdout=subprocess.PIPE, text=True).stdout
    note("E", None, n, pid=int(text))
"""
)


def test_orphans_are_reaped(redis_server, site):
    site = site(redis_server, ORPHANS)
    argv = ["-A", "sut1:app", "worker", "-p", "1"]
    with spawn("-c", PID_1, *argv, env=site._env(redis_server.url), cwd=site.folder) as spawned:
        site.ready(1)
        for n in range(3):
            site.task("orphan").delay(n)
        wait_until(lambda: len(site.of("E")) == 3, 20, lambda: str(spawned))
        pids = [event.more["pid"] for event in site.of("E")]
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 15)
        spawned.signal(signal.SIGTERM)
        assert spawned.wait() == 0


IN_TERMINAL = """
import os, sys
os.dup2(os.open(sys.argv[1], os.O_RDWR), 0)  # the first that a session's leader opens is its terminal
os.execv(sys.executable, [sys.executable, "-m", "streamtask", *sys.argv[2:]])
"""


def test_a_terminal_that_is_closed_stops_warmly(redis_server, site):
    """By the time its signal comes it is no terminal any more."""
    site = site(redis_server)
    master, slave = os.openpty()
    argv = [os.ttyname(slave), "-A", "sut1:app", "worker", "-p", "1"]
    with spawn("-c", IN_TERMINAL, *argv, env=site._env(redis_server.url), cwd=site.folder) as spawned:
        site.ready(1)
        os.close(slave)
        site.send_gated("a", 0)
        site.wait_started("a", 0)
        os.close(master)
        wait_until(lambda: "warm " in spawned.stderr, 15, lambda: str(spawned))
        assert "warm shutdown: the terminal was closed" in spawned.stderr
        site.open_gate(0)
        assert spawned.wait() == 0
    assert site.check().repeated == 0
    site.wait_empty()


TOLD_LATE = """
from streamtask.worker.supervisor import Supervisor

def end(self, end=Supervisor._end):
    end(self)
    os.kill(os.getpid(), signal.SIGTERM)

if "pytest" not in sys.modules:
    Supervisor._end = end
"""


@pytest.mark.slow
def test_a_stop_at_the_end_of_a_warm_restart_is_not_lost(redis_server, site):
    site = site(redis_server, TASKS + TOLD_LATE)
    pod = site.pod(1)
    site.ready(1)
    pod.spawned.signal(signal.SIGHUP)
    wait_until(lambda: "warm restart" in pod.log, 15, lambda: pod.log)
    wait_until(lambda: pod.log.count(" -- streamtask ") == 2 or pod.spawned.returncode is not None, 15, lambda: pod.log)
    assert pod.spawned.returncode == 0


def test_reload_restarts_with_the_new_code(redis_server, site):
    site = site(redis_server, TASKS + "\n@app.task(name='says')\ndef says(n):\n    note('E', 'old', n)\n")
    module = _module(site)
    argv = ["worker", "-p", "1", "--reload"]
    with site.command(*argv) as spawned:
        site.ready(1)
        wait_until(lambda: str(site.folder) in spawned.stderr, 15, lambda: str(spawned))
        site.task("says").delay(0)
        wait_until(lambda: site.of("E", "old"), 15)
        text = module.read_text()
        module.write_text(text.replace("'old'", "'new"))
        wait_until(lambda: "no restart" in spawned.stderr, 20, lambda: str(spawned))
        site.task("says").delay(1)
        wait_until(lambda: site.of("E", "old", 1), 15)
        module.write_text(text.replace("'old'", "'new'"))
        wait_until(lambda: spawned.stderr.count(" -- streamtask ") == 2, 20, lambda: str(spawned))
        site.task("says").delay(2)
        wait_until(lambda: site.of("E", "new", 2), 20, lambda: str(spawned))
        spawned.signal(signal.SIGTERM)
        assert spawned.wait() == 0
