"""Capped exponential back-off with jitter. Standard library only."""

from __future__ import annotations

import random
from collections.abc import Iterator


def delays(base_s: float = 0.02, cap_s: float = 1.0) -> Iterator[float]:
    """Endless waits in seconds: each up to twice the one before, between half and all of its bound ("equal jitter").

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    bound = base_s
    while True:
        yield bound * (0.5 + random.random() / 2)
        bound = min(cap_s, bound * 2)


def retry_delay_s(attempt: int, *, base_s: float, cap_s: float, jitter: bool) -> float:
    """The wait before the retry that follows attempt number ``attempt`` (from 0): ``base_s * 2**attempt``, at most
    ``cap_s``; with jitter a random part of that between half and all of it."""
    bound = min(cap_s, base_s * 2.0 ** min(attempt, 60))
    return bound * (0.5 + random.random() / 2) if jitter else bound
