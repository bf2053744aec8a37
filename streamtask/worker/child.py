"""A worker process: a control thread beside the executor, which has the main thread."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
import threading

from .control import Control
from .executor import ParallelExecutor, SequentialExecutor
from .ports import TaskRunner, WorkerSettings
from .shared import SharedMemory
from .wire import Closed, Wire

log = logging.getLogger("streamtask.worker")

PR_SET_PDEATHSIG = 1
ENV_FDS = "STREAMTASK_CHILD"
"""How the supervisor tells a child its descriptors: ``socket,memory,parent pid``."""


def bind_to_parent(parent_pid: int) -> None:
    """Lets the kernel end this process when its supervisor dies (Linux). Elsewhere the wire's end of file does it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)  # it died before we asked


class _SupervisorWire(Wire):
    def receive(self):  # type: ignore[no-untyped-def]
        try:
            yield from super().receive()
        except Closed:
            # The supervisor is dead, and with it who renews the leases.
            os._exit(0)


def run(settings: WorkerSettings, runner: TaskRunner, sock_fd: int, memory_fd: int) -> int:
    """Runs a worker process until its supervisor tells it to stop. Returns the exit status."""
    # The supervisor is told by the terminal, too, and says what is to be done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # The control thread asks for the GIL at every answer of Redis: quick bodies must not make it wait for milliseconds.
    sys.setswitchinterval(0.00005 if settings.concurrency == 1 else 0.001)
    memory = SharedMemory(memory_fd, settings.concurrency)
    wire = _SupervisorWire(socket.socket(fileno=sock_fd))
    control = Control(settings, runner, memory, wire)
    executor: SequentialExecutor | ParallelExecutor
    if settings.concurrency == 1:
        executor = SequentialExecutor(runner, memory, control.lease_number, control.wake)
        executor.signal_after_s = settings.ack_interval_s or 0.001
    else:
        executor = ParallelExecutor(settings.concurrency, runner, memory, control.lease_number, control.wake)
    control.executor = executor
    runner.process_started()
    thread = threading.Thread(target=control.run, name="streamtask-control", daemon=True)
    thread.start()
    wire.send("ready")
    executor.run_forever()
    return 0
