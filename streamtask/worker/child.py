"""A worker process: the control loop, and the executor beside it or taking turns with it."""

from __future__ import annotations

import ctypes
import gc
import io
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import NamedTuple

from .. import fork
from ..coordination.orders import Closed, Order, Ready, Wire
from ..coordination.shared import SharedMemory
from ..text import logger
from .control import Control
from .executor import SequentialExecutor
from .owned import Executor
from .ports import TaskRunner, WorkerSettings
from .running import Running
from .side_by_side import ParallelExecutor
from .signals import default_in_forks, leave_to_supervisor
from .turns import LoopTurns, Turns

log = logger("streamtask.worker")

PR_SET_PDEATHSIG, PR_GET_CHILD_SUBREAPER = 1, 37
ENV_FDS = "STREAMTASK_CHILD"
"""How the supervisor tells a child its descriptors: ``socket,memory,stacks,parent pid``."""


class Fds(NamedTuple):
    """What a child has of its supervisor: a socket, the memory that they share, and a pipe for the stacks of its threads."""

    socket: int
    memory: int
    stacks: int


def begin() -> Fds | None:
    """The first thing that a child does, before the app is imported; None if it has no part in a worker."""
    text = os.environ.pop(ENV_FDS, "")
    if not text:
        leave_to_supervisor()
        return None
    *fds, parent = map(int, text.split(","))
    bind_to_parent(parent)
    for fd in fds:
        os.set_inheritable(fd, False)
    found = Fds(*fds)
    leave_to_supervisor(found.stacks)
    default_in_forks()
    return found


def bind_to_parent(parent_pid: int) -> None:
    """Lets the kernel end this process when its supervisor dies (Linux). Elsewhere the wire's end of file does it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)  # it died before we asked


def print_whole_lines() -> None:
    """Makes each line that a body prints one write. Otherwise the blocks of several processes would be mixed in the middle of
    lines, where they share a file or a pipe, and with ``python -u`` the parts of a print."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)


def reaps_orphans() -> bool:
    """Whether processes become this one's children when their parents die, and stay zombies unless they are waited for."""
    found = ctypes.c_int(0)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(found))
    return os.getpid() == 1 or bool(found.value)


class _SupervisorWire(Wire):
    def receive(self) -> Iterator[Order]:
        try:
            yield from super().receive()
        except Closed:
            # The supervisor is dead, and with it who renews the leases.
            os._exit(0)


def collect_garbage_less() -> None:
    """What is there after start-up stays for good and is not looked at again; and a collection for each 700 objects, the
    default of Python before 3.12, would be one for each hundred messages."""
    gc.collect()
    gc.freeze()
    if gc.get_threshold()[0] in (700, 2000):  # nobody has chosen another
        gc.set_threshold(10_000, *gc.get_threshold()[1:])


def run(settings: WorkerSettings, runner: TaskRunner, fds: Fds) -> None:
    """Runs a worker process until its supervisor lets it end."""
    leave_to_supervisor(fds.stacks)  # whatever the app's modules have set
    memory = SharedMemory(fds.memory, settings.concurrency)
    wire = _SupervisorWire(socket.socket(fileno=fds.socket))
    runner.process_started()

    def executor_of(running: Running) -> Executor:
        if settings.concurrency > 1:
            return ParallelExecutor(settings.concurrency, runner, running)
        executor = SequentialExecutor(runner, memory)
        executor.signal_after_s = settings.ack_interval_s or 0.001
        return executor

    control = Control(settings, runner, memory, wire, executor_of)
    executor = control.executor
    collect_garbage_less()
    # A process that a body forks must not work with its parent's connections when it comes back out of the body.
    fork.in_child(fork.Turn.WORKERS, control.forked)
    fork.in_child(fork.Turn.WORKERS, executor.forked)
    wire.send(Ready())
    if isinstance(executor, SequentialExecutor):
        Turns(control, executor).run()
    else:
        # The control loop asks for the GIL at every answer of Redis: bodies must not make it wait for milliseconds.
        sys.setswitchinterval(0.001)
        if executor.drivers is not None:
            LoopTurns(control, executor.drivers).run()
        else:
            control.run()
    # What the app's modules hold is freed at the exit, as in other programs, and files that are open are written: nothing of
    # ours may hold on to that.
    executor.close()
    gc.unfreeze()
