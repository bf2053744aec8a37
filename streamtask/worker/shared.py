"""Memory that a supervisor shares with one child.

The supervisor writes until when the child may trust each of its leases; the child writes which entries it runs. So the
check before a body and the record of a crash cost a store or a load each, no system call.

Layout, in 8-byte cells: ``MAX_LEASES`` floats ``trusted_until``; then for each executor slot ``[index, count, deadline]``
and up to ``MAX_BATCH`` triples ``(lease, ms, seq)``. A slot runs entry ``index`` while ``index < count``.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence

MAX_LEASES = 1024
MAX_BATCH = 256
_HEAD = 3
_SLOT = _HEAD + 3 * MAX_BATCH


def _size(slots: int) -> int:
    return 8 * (MAX_LEASES + slots * _SLOT)


def create_file(slots: int) -> int:
    """A file descriptor of zeroed memory, to be inherited by the child."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("streamtask")
    else:
        fd, path = tempfile.mkstemp(prefix="streamtask-")
        os.unlink(path)
    os.ftruncate(fd, _size(slots))
    return fd


class SharedMemory:
    """Both sides' view of the memory."""

    def __init__(self, fd: int, slots: int) -> None:
        self._map = mmap.mmap(fd, _size(slots))
        view = memoryview(self._map)
        self.trusted = view[: 8 * MAX_LEASES].cast("d")
        self._ints = view[8 * MAX_LEASES :].cast("q")
        self._floats = view[8 * MAX_LEASES :].cast("d")
        self.slots = slots

    def slot(self, number: int) -> Slot:
        start = number * _SLOT
        return Slot(self._ints[start : start + _SLOT], self._floats[start : start + _SLOT])

    def running(self) -> list[tuple[int, int, str]]:
        """(slot, lease, entry id) of every body that runs, as its process left it."""
        found = []
        for number in range(self.slots):
            cells = self._ints[number * _SLOT : (number + 1) * _SLOT]
            index, count = cells[0], cells[1]
            if 0 <= index < count <= MAX_BATCH:
                lease, ms, seq = cells[_HEAD + 3 * index : _HEAD + 3 * index + 3]
                found.append((number, lease, f"{ms}-{seq}"))
        return found

    def overdue(self, now: float) -> list[int]:
        """The slots whose body is past its ``time_limit``."""
        return [n for n in range(self.slots) if 0.0 < self._floats[n * _SLOT + 2] <= now]


class Slot:
    """One executor's cells. ``cells[0] = i`` says that entry i of the batch runs and those before it have ended."""

    __slots__ = ("_floats", "cells")

    def __init__(self, cells: memoryview[int], floats: memoryview[float]) -> None:
        self.cells = cells
        self._floats = floats

    def begin(self, lease: int, entry_ids: Sequence[bytes]) -> None:
        cells = self.cells
        cells[1] = 0
        cells[0] = 0
        at = _HEAD
        for entry_id in entry_ids:
            ms, _, seq = entry_id.partition(b"-")
            cells[at] = lease
            cells[at + 1] = int(ms)
            cells[at + 2] = int(seq)
            at += 3
        cells[1] = len(entry_ids)

    def end(self) -> None:
        self.cells[0] = self.cells[1]

    def clear(self) -> None:
        self.cells[1] = 0

    def set_deadline(self, deadline: float) -> None:
        """When (monotonic) the supervisor ends the process for this body; 0 for never."""
        self._floats[2] = deadline
