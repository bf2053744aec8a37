"""What tests of all layers use: waiting for a condition, free ports, child processes that never outlive a test."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar

ROOT = Path(__file__).resolve().parents[1]
MARK = "STREAMTASK_TEST_RUN"

T = TypeVar("T")


class Starved:
    """How long something on this machine has waited for a CPU since this was made.

    What a test measures on a busy machine includes such times; they say nothing of the code. On a quiet one they are
    next to nothing, so a bound that has them added is as tight there as it looks.
    """

    def __init__(self) -> None:
        self._began, self._before = time.monotonic(), _pressure()

    @property
    def seconds(self) -> float:
        now = _pressure()
        if now is None or self._before is None:
            # Not known: as on a machine that is three times as busy as it can be.
            return (time.monotonic() - self._began) * 2 / 3
        return now - self._before

    @property
    def spent(self) -> float:
        """The seconds since this was made, less those: what a quiet machine would have spent."""
        return time.monotonic() - self._began - self.seconds


def _pressure() -> float | None:
    """Linux' count of the seconds in which some task was ready to run and had no CPU."""
    try:
        with open("/proc/pressure/cpu") as file:
            return int(file.readline().rpartition("total=")[2]) / 1e6
    except (OSError, ValueError):
        return None


def wait_until(
    condition: Callable[[], T],
    timeout: float = 10,
    message: str | Callable[[], str] = "",
    poll: float = 0.005,
    progress: Callable[[], object] | None = None,
) -> T:
    """Polls until the condition is truthy and returns its value; AssertionError with the last value after the timeout.

    The timeout is that of a quiet machine: time in which something here waited for a CPU does not count, up to five
    times as long. With ``progress`` it begins anew whenever that value changes: what gets on is waited for.

    An exception of the condition other than AssertionError goes straight through: it is a bug, not "not yet".
    """
    began, starved = time.monotonic(), Starved()
    at = progress() if progress else None
    while True:
        last: object
        try:
            value = condition()
            if value:
                return value
            last = value
        except AssertionError as error:
            last = error
        if (spent := time.monotonic() - began) >= timeout:
            if progress and (now_at := progress()) != at:
                began, starved, at = time.monotonic(), Starved(), now_at
            elif spent - starved.seconds >= timeout or spent >= 6 * timeout:
                text = (message() if callable(message) else message) or repr(condition)
                raise AssertionError(f"not within {spent:.1f} s: {text}; last value: {last!r}")
        # Whoever has waited for long looks less often: the looking takes its time from what is waited for.
        time.sleep(max(poll, min(0.03, spent / 50)))


class Record(Generic[T]):
    """What the bodies under test wrote down, a line of JSON per event; each is read and parsed once."""

    def __init__(self, path: Path, make: Callable[..., T], final: Callable[[T], object]) -> None:
        self._path, self._make, self._final = path, make, final
        self._read = 0
        self._events: list[T] = []
        self._ended: set[object] = set()
        self._lock = threading.Lock()

    def events(self) -> list[T]:
        """All whole lines so far; a last line without its end is still being written."""
        with self._lock:
            if self._path.exists():
                with open(self._path, "rb") as file:
                    file.seek(self._read)
                    data = file.read()
                whole = data[: data.rfind(b"\n") + 1]
                self._read += len(whole)
                for line in whole.splitlines():
                    event = self._make(*json.loads(line))
                    self._events.append(event)
                    if what := self._final(event):
                        self._ended.add(what)
            return list(self._events)

    def ended(self) -> set[object]:
        """What the final events among them are of."""
        self.events()
        with self._lock:
            return set(self._ended)


_ports: deque[int] = deque(maxlen=1000)


def free_port() -> int:
    """A TCP port on 127.0.0.1 that was free a moment ago, and that this process was not given lately."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        # The kernel may give a port again before its first taker has come to use it.
        if port not in _ports:
            _ports.append(port)
            return port


# --- processes ---------------------------------------------------------------------------------------------------

session_processes: set[int] = set()
"""Pids that are meant to live longer than one test."""

run_folders: set[str] = set()
"""Where this run has its tests' temporary folders."""

# Looked up here: between fork and exec little is safe to do.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
_spawner: ThreadPoolExecutor | None = None
_spawner_pid = 0
_spawner_lock = threading.Lock()


def popen(args: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """``Popen`` of a process that the kernel kills when this one dies, also by kill -9 (on Linux).

    Linux ties the death signal to the *thread* that forked, so forking from a test's short-lived thread would kill
    the process with the thread: such calls go through a thread that lives as long as we do.
    """
    global _spawner, _spawner_pid
    parent = os.getpid()

    def die_with_parent() -> None:
        if _prctl is not None:
            _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(1)

    def start() -> subprocess.Popen[bytes]:
        with warnings.catch_warnings():
            # Python 3.12 warns of a fork in a process with threads; the child does only the above before its exec.
            warnings.simplefilter("ignore", DeprecationWarning)
            return subprocess.Popen(args, preexec_fn=die_with_parent, **options)

    if threading.current_thread() is threading.main_thread():
        return start()
    with _spawner_lock:
        # One, whoever comes first: a second one in its place would end, and with it all that it has started.
        if _spawner is None or _spawner_pid != parent:
            _spawner, _spawner_pid = ThreadPoolExecutor(1, "spawner"), parent
    return _spawner.submit(start).result()


def is_alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return _stat(pid)[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):  # it ended just now, or there is no /proc
        return not Path("/proc/self").exists()


def _stat(pid: int) -> tuple[str, int]:
    """State and parent of a process, from /proc."""
    text = Path(f"/proc/{pid}/stat").read_text()
    state, parent = text.rpartition(")")[2].split()[:2]
    return state, int(parent)


def our_processes() -> dict[int, str]:
    """Pid and command of the running processes that this test run started, except those of the whole session.

    Our children, all that carry our mark in their environment, and all that work in a test's folder: what has made
    itself a daemon is no child any more, what was forked without exec has no mark, and a redis-server overwrites its
    environment with its title. Empty where there is no /proc.
    """
    found: dict[int, str] = {}
    me = os.getpid()
    mark = f"{MARK}={os.environ.get(MARK)}".encode()
    try:
        names = os.listdir("/proc")
    except FileNotFoundError:
        return found
    for name in names:
        if not name.isdigit() or int(name) == me or int(name) in session_processes:
            continue
        pid = int(name)
        with contextlib.suppress(OSError, ValueError):
            state, parent = _stat(pid)
            if state in "ZX":
                continue
            if parent != me and not any(os.readlink(f"/proc/{pid}/cwd").startswith(folder) for folder in run_folders):
                with open(f"/proc/{pid}/environ", "rb") as file:
                    if mark not in file.read():
                        continue
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                command = file.read().replace(b"\0", b" ").decode(errors="replace").strip()
            # One helper of multiprocessing, which lives until the interpreter ends.
            if "multiprocessing.resource_tracker" not in command and "multiprocessing.forkserver" not in command:
                found[pid] = command[:300]
    return found


class Spawned:
    """A process that ``spawn`` started."""

    def __init__(self, process: subprocess.Popen[bytes], stdout: Path, stderr: Path) -> None:
        self.process = process
        self.pid = process.pid
        self._stdout, self._stderr = stdout, stderr

    @property
    def stdout(self) -> str:
        """What it has written so far; readable after its end, inside the ``with`` block."""
        return self._stdout.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self._stderr.read_text(errors="replace")

    @property
    def lines(self) -> list[str]:
        """The whole lines of stdout so far."""
        return self.stdout.split("\n")[:-1]

    @property
    def returncode(self) -> int | None:
        return self.process.poll()

    def wait(self, timeout: float = 20) -> int:
        """Its exit status; AssertionError with its output when it does not end in time (see ``wait_until``)."""
        wait_until(lambda: self.process.poll() is not None, timeout, lambda: f"the end of the process\n{self}")
        status: int = self.process.returncode
        return status

    def wait_line(self, text: str, timeout: float = 20) -> str:
        """The first whole line of stdout that contains the text, as soon as it is there."""

        def found() -> str | None:
            ended = self.process.poll() is not None
            line = next((line for line in self.lines if text in line), None)
            if line is None and ended:
                raise RuntimeError(f"ended without writing {text!r}\n{self}")
            return line or None

        line = wait_until(found, timeout, lambda: f"no line with {text!r}\n{self}")
        assert line is not None
        return line

    def signal(self, number: int) -> None:
        """To the process alone."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the process alone, and reaps it; its children go on, as after the OOM killer."""
        self.process.kill()
        self.process.wait()

    def signal_group(self, number: int) -> None:
        """To the process and all its children that stayed in its process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def kill_group(self) -> None:
        self.signal_group(signal.SIGKILL)
        self.process.wait()

    def __str__(self) -> str:
        return (
            f"pid {self.pid}, exit status {self.process.poll()}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"
        )


@contextlib.contextmanager
def spawn(
    *args: str | os.PathLike[str],
    env: Mapping[str, str | None] | None = None,
    cwd: str | os.PathLike[str] | None = None,
) -> Iterator[Spawned]:
    """Runs ``python ARGS`` in a session and process group of its own; the whole group is killed at the end.

    The repository's root comes first in PYTHONPATH. ``env`` is added to our environment, None removes a name.
    """
    words = [str(arg) for arg in args]
    values = dict(os.environ, PYTHONUNBUFFERED="1")
    values["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), values.get("PYTHONPATH")]))
    for name, value in (env or {}).items():
        if value is None:
            values.pop(name, None)
        else:
            values[name] = value
    with tempfile.TemporaryDirectory(prefix="streamtask-test-") as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            process = popen(
                [sys.executable, *words],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=values,
                cwd=cwd,
                start_new_session=True,
            )
        spawned = Spawned(process, out, err)
        try:
            yield spawned
        except BaseException:
            # pytest shows it beside the failure.
            print(f"--- spawned {' '.join(words)[:200]}\n{spawned}", file=sys.stderr)
            raise
        finally:
            spawned.kill_group()


def end_batch(batch, odd=()):
    """All of a batch has ended; ``odd``: (position, outcome) of those that did not end well."""
    if batch.ended is None:
        batch.outcomes += odd
        batch.backlog.complete(batch)
    else:
        batch.odd.update(odd)
        batch.ended += [position for position in range(len(batch.ids)) if position not in batch.ended]
        batch.backlog.collect_free(batch)
