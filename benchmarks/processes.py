"""Starts processes that never outlive the run, and asks the kernel what they have used."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
stopped: list[int] = []


class BenchmarkFailed(Exception):
    """Something did not start, ended early or was too slow: the figures would be wrong."""


def stop(signum: int, frame: object) -> None:
    """A signal handler: ends the run by an exception, so that what was started is ended."""
    stopped.append(signum)
    sys.exit(128 + signum)


# Looked up here: between fork and exec little is safe to do.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
_parent = os.getpid()


def _die_with_parent() -> None:
    """In a child before its exec: the kernel kills it when the benchmark dies, also by kill -9."""
    if _prctl is not None:
        _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != _parent:
            os._exit(1)


@contextlib.contextmanager
def running(
    name: str, argv: Sequence[str], folder: Path, env: Mapping[str, str] | None = None, pipes: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own, that is killed with the block, together with its children.

    Killed, not ended: what it would tidy up lies in a server that is emptied before the next measurement.
    """
    with open(folder / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            argv,
            env={**os.environ, **(env or {})},
            cwd=folder,
            stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else log,
            stderr=log,
            text=True,
            start_new_session=True,  # a Ctrl-C is for us, who then stop it
            preexec_fn=_die_with_parent if _prctl is not None else None,
        )
    try:
        # An exception that a signal raises in the hooks around a fork is dropped by Python: ask again.
        if stopped:
            sys.exit(128 + signal.SIGTERM)
        yield process
    finally:
        kill(process)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def kill(process: subprocess.Popen[str]) -> None:
    """Kill -9 for the process and all that it has started, wherever that has gone."""
    family = tree(process.pid) if process.poll() is None else []
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in family:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def log_of(folder: Path, name: str) -> str:
    with contextlib.suppress(FileNotFoundError):
        return (folder / f"{name}.log").read_text(errors="replace")[-3000:]
    return ""


def wait_for(
    condition: Callable[[], bool],
    timeout: float,
    what: str,
    process: subprocess.Popen[str] | None = None,
    log: Callable[[], str] = str,
    poll: float = 0.002,
) -> None:
    """Raises if the process ends or the time is over before the condition is true."""
    deadline = time.monotonic() + timeout
    while not condition():
        if process is not None and process.poll() is not None:
            raise BenchmarkFailed(f"ended with status {process.returncode} before {what}\n{log()}")
        if time.monotonic() > deadline:
            raise BenchmarkFailed(f"waited {timeout:.0f} s in vain for {what}\n{log()}")
        time.sleep(poll)


# --- what the kernel knows; Linux only


def tree(pid: int) -> list[int]:
    """The process and all its descendants."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if sys.platform == "linux" else ():
        if name.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(name))
    found, todo = [], [pid]
    while todo:
        found.append(one := todo.pop())
        todo.extend(children.get(one, ()))
    return found


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of these processes, and of their children that have ended."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(fields[index]) for index in (11, 12, 13, 14))
    return ticks / os.sysconf("SC_CLK_TCK")


def exact_cpu_seconds(pids: Sequence[int]) -> float:
    """The same of their threads that live, to the nanosecond: for processes that hardly use any."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                total += int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0])
    return total / 1e9


def peak_rss(pid: int) -> int:
    """The most memory that the process has had, in bytes."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
