"""What a worker's processes do with signals.

The supervisor follows them (``Signals``). Its children leave them to it, for a terminal or an orchestrator may send them to
all at once. What children start has the default handling again: who terminates a process of his own waits for its end.
"""

from __future__ import annotations

import ctypes
import faulthandler
import signal
import socket
import sys
import threading
from collections import deque
from types import FrameType

from .. import fork

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
FOLLOWED = (*STOPS, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STUCK = getattr(signal, "SIGRTMIN", signal.SIGXCPU)
"""Makes a child write its stacks though something holds Python's lock."""

Handler = signal.Handlers | int | None


class Signals:
    """The supervisor's: from its making on they come here, to be taken by its loop, one by one.

    Until ``started`` one that stops ends the process at once: nothing has begun yet. Where hang-ups were ignored
    (``nohup``) they still are.
    """

    def __init__(self) -> None:
        self._starting = True
        self._came: deque[int] = deque()
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self._install()

    def started(self) -> None:
        """From now on one that stops is taken like the others; whatever the app's modules have set."""
        self._starting = False
        self._install()

    def _install(self) -> None:
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in FOLLOWED:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)
        signal.signal(signal.SIGCHLD, _left_alone)  # it wakes the loop, which looks after its children in each round
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FOLLOWED)

    def fileno(self) -> int:
        """Readable when one has come, or a child has changed its state."""
        return self._read.fileno()

    def take(self) -> list[int]:
        """Those that have come since."""
        try:
            while len(self._read.recv(4096)) == 4096:
                pass
        except BlockingIOError:
            pass
        return [self._came.popleft() for _ in range(len(self._came))]

    def post(self, number: int) -> None:
        """As if it had come; from any thread."""
        self._came.append(number)
        try:
            self._write.send(b"\0")
        except BlockingIOError:
            pass  # it is readable

    def hold(self) -> bool:
        """What comes from now on waits for the program that is executed in place of this one. False if one that stops has come
        that nobody has taken: there is to be no other."""
        signal.pthread_sigmask(signal.SIG_BLOCK, FOLLOWED)
        return not any(number in STOPS for number in self.take())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._starting and number in STOPS:
            raise SystemExit(0)
        self._came.append(number)


def leave_to_supervisor(stacks: int = -1) -> None:
    """In a child: no signal that its supervisor follows does anything. ``stacks``: a descriptor to which SIGUSR1 writes what
    all threads do, once the main thread can; ``STUCK`` does so at once.

    That is for who does not answer alone: frames of threads that run meanwhile change under the hands of who reads them
    without Python's lock, and that has ended processes."""
    for number in FOLLOWED:
        if number == signal.SIGUSR1:
            if stacks >= 0:
                signal.signal(number, _StacksTo(stacks))
                faulthandler.register(STUCK, file=stacks, all_threads=True)
                _widen_signal_stack()
        elif number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            # No SIG_IGN, which what is started from here would inherit.
            signal.signal(number, _left_alone)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*FOLLOWED, STUCK))


def _widen_signal_stack() -> None:
    """``faulthandler`` gives the main thread a stack of its own for signals, on which Python's handlers run, too. It holds one
    or two: where a processor has many registers, as with AMX, a few different signals at once would end the process."""
    if sys.platform != "linux":
        return

    class Stack(ctypes.Structure):  # stack_t of sigaltstack(2)
        _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

    stack = Stack(ctypes.addressof(_signal_stack), 0, ctypes.sizeof(_signal_stack))
    ctypes.CDLL(None, use_errno=True).sigaltstack(ctypes.byref(stack), None)


_signal_stack = (ctypes.c_char * (1 << 18))()
"""Its pages are not there before they are used."""


class _StacksTo:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __call__(self, number: int, frame: FrameType | None) -> None:
        faulthandler.dump_traceback(self._fd, all_threads=True)


def default_in_forks() -> None:
    """Processes that this one forks (multiprocessing) have the default handling, but where somebody has set a handler. A signal
    that comes before waits for that."""
    masks = threading.local()

    def before() -> None:
        masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, FOLLOWED)

    def after() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.before)

    def in_fork() -> None:
        faulthandler.unregister(STUCK)
        for number in FOLLOWED:
            handler = signal.getsignal(number)
            if handler is _left_alone or isinstance(handler, _StacksTo):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if hasattr(masks, "before"):  # else Python's hooks did not run
            after()

    fork.around(before, after)
    fork.in_child(fork.Turn.SIGNALS, in_fork)


def _left_alone(number: int, frame: FrameType | None) -> None:
    pass
