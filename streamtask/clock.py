"""The two clocks: wall time for what is stored, monotonic time for what is waited for. Standard library only."""

from __future__ import annotations

import time

mono_s = time.monotonic
"""Seconds on the monotonic clock, which all processes of one machine share (CLOCK_MONOTONIC)."""


def wall_ms() -> int:
    """Milliseconds since the epoch on this machine's clock. Deadlines use Redis' clock instead."""
    return time.time_ns() // 1_000_000
