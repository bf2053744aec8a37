"""Memory that who keeps leases shares with their owner: a supervisor with each child, a keeper with its client.

One writes until when each lease may be trusted; the owner writes which entries it runs. So the
check before a body and the record of a crash cost a store or a load each, no system call.

Layout: a float ``trusted_until`` for each lease; then for each executor slot five 8-byte cells ``[index, count, deadline,
lease, length]`` and the batch's entry ids as text, parted by spaces. A slot runs entry ``index`` while ``index < count``. One
slot more is that of the control loop, for the entries that it reads again: a message may take its process down before any body.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence

MAX_LEASES = 8192
"""The most that a process owns: eight queues of as many shards as a queue can have, or so."""
MAX_BATCH = 200
_HEAD = 5
_TEXT = MAX_BATCH * 42  # two 64-bit numbers, a hyphen and a space
_SLOT = 8 * _HEAD + _TEXT


def _size(slots: int, leases: int) -> int:
    return 8 * leases + (slots + 1) * _SLOT


def create_file(slots: int, leases: int = MAX_LEASES) -> int:
    """A file descriptor of zeroed memory, for both processes."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("streamtask")
    else:
        fd, path = tempfile.mkstemp(prefix="streamtask-")
        os.unlink(path)
    os.ftruncate(fd, _size(slots, leases))
    return fd


class SharedMemory:
    """Both sides' view of the memory."""

    def __init__(self, fd: int, slots: int, leases: int = MAX_LEASES) -> None:
        self._map = mmap.mmap(fd, _size(slots, leases))
        view = memoryview(self._map)
        self.trusted = view[: 8 * leases].cast("d")
        *self._slots, self._reads = [_slot(view[8 * leases + n * _SLOT :][:_SLOT]) for n in range(slots + 1)]

    def slot(self, number: int) -> Slot:
        return self._slots[number]

    def running(self) -> list[tuple[int, int, str]]:
        """(slot, lease, entry id) of every body that runs, as its process left it."""
        found = []
        for number, slot in enumerate(self._slots):
            entry = slot.running()
            if entry is not None:
                found.append((number, *entry))
        return found

    def reading(self, lease: int) -> Read:
        """For a lease's owner, to write down which of its entries it reads."""
        return Read(self._reads, lease)

    def being_read(self) -> tuple[int, str] | None:
        """(lease, entry id) of the entry that a process was reading again when it died. That is to blame then, and no body:
        reading takes so little of the time that one which ends its process hardly ever does it just then."""
        return self._reads.running()

    def overdue(self, now: float) -> list[int]:
        """The slots whose body is past its ``time_limit``."""
        return [number for number, slot in enumerate(self._slots) if 0.0 < slot.deadline() <= now]


class Read:
    """See ``queue.arrivals.Reading``."""

    __slots__ = ("_lease", "_slot")

    def __init__(self, slot: Slot, lease: int) -> None:
        self._slot = slot
        self._lease = lease

    def begin(self, entry_id: bytes) -> None:
        self._slot.begin(self._lease, [entry_id])

    def end(self) -> None:
        self._slot.clear()


def _slot(view: memoryview[int]) -> Slot:
    head = view[: 8 * _HEAD]
    return Slot(head.cast("q"), head.cast("d"), view[8 * _HEAD :])


class Slot:
    """One executor's cells. ``cells[0] = i`` says that entry i of the batch runs and those before it have ended."""

    __slots__ = ("_floats", "_text", "cells")

    def __init__(self, cells: memoryview[int], floats: memoryview[float], text: memoryview[int]) -> None:
        self.cells = cells
        self._floats = floats
        self._text = text

    def begin(self, lease: int, entry_ids: Sequence[bytes]) -> None:
        cells = self.cells
        # Not running while it is written, for a crash in between must not charge what is half there.
        cells[1] = 0
        cells[0] = 0
        text = b" ".join(entry_ids)
        self._text[: len(text)] = text
        cells[3] = lease
        cells[4] = len(text)
        cells[1] = len(entry_ids)

    def running(self) -> tuple[int, str] | None:
        """(lease, entry id) of the body that runs."""
        index, count, _, lease, length = self.cells
        if not 0 <= index < count:
            return None
        entry_ids = bytes(self._text[:length]).split(b" ")
        return (lease, entry_ids[index].decode()) if index < len(entry_ids) else None

    def end(self) -> None:
        self.cells[0] = self.cells[1]

    def clear(self) -> None:
        self.cells[1] = 0

    def set_deadline(self, deadline: float) -> None:
        """When (monotonic) the process is to be ended for this body; 0 for never."""
        self._floats[2] = deadline

    def deadline(self) -> float:
        return self._floats[2]
