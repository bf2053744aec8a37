"""The two clocks: wall time for what is stored, monotonic time for what is waited for. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

mono_s: Callable[[], float]
"""Seconds on the monotonic clock, which all processes of one machine share. It goes on while the machine is suspended, as a
lease does in Redis; only where the system has no such clock it stands still meanwhile."""
try:
    mono_s = partial(time.clock_gettime, time.CLOCK_BOOTTIME)
    mono_s()
except (AttributeError, OSError):  # not Linux, or a sandbox that refuses it
    mono_s = time.monotonic


def wall_ms() -> int:
    """Milliseconds since the epoch on this machine's clock. Deadlines use Redis' clock instead."""
    return time.time_ns() // 1_000_000
