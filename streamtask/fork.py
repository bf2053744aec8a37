"""What begins anew in a forked child, and in which order.

A child has a copy of all that its parent held, and none of its parent's threads: it must not write on the parent's sockets,
settle what was delivered to the parent, draw the ids that the parent draws, or wait for a lock whose thread did not come along.
Whatever keeps such a thing says here how it begins anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from enum import IntEnum
from inspect import ismethod
from types import MethodType
from weakref import ref


class Turn(IntEnum):
    """Who begins anew before whom."""

    LOCKS = 0
    """Before all that may take them."""
    CONNECTIONS = 1
    """The child's copies are closed."""
    PRODUCERS = 2
    """They draw ids of their own."""
    SESSIONS = 3
    """Of kombu's transport."""
    POLLERS = 4
    """After their session: what its parent had lost or held is nothing to it then."""
    WORKERS = 5
    """What runs bodies: nothing more starts there."""
    SIGNALS = 6
    """They may come again when nothing is half-done."""


Call = Callable[[], object]

_calls: dict[Turn, dict[object, Callable[[], Call | None]]] = {turn: {} for turn in Turn}
_pid = os.getpid()


def in_child(turn: Turn, call: Call) -> None:
    """It is called in each forked child. What a method is of is not kept alive by that."""
    calls, key = _calls[turn], object()
    if not ismethod(call):
        calls[key] = lambda: call
        return
    # No WeakMethod with a callback: one that lives to the end of its process has it called without itself, and says so.
    function, owner = call.__func__, ref(call.__self__, lambda _: calls.pop(key, None))

    def alive() -> Call | None:
        holder = owner()
        return None if holder is None else MethodType(function, holder)

    calls[key] = alive


def around(before: Call, in_parent: Call) -> None:
    """One is called before each fork, the other after it in the parent."""
    os.register_at_fork(before=before, after_in_parent=in_parent)


def check() -> None:
    """To be called before what must not be done with something of a parent's: a server may have forked without Python's hooks
    (uWSGI), and two processes would draw the same ids."""
    if os.getpid() != _pid:
        _begin_anew()


def _begin_anew() -> None:
    global _pid
    _pid = os.getpid()
    with ExitStack() as stack:  # makes all of its calls, the last one first, whatever one of them raises
        for turn in reversed(Turn):
            for alive in reversed(_calls[turn].copy().values()):
                call = alive()
                if call is not None:
                    stack.callback(call)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
