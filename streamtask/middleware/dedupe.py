"""Messages that were appended twice with one id."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable

from ..checks import TEXTS, check, seconds
from .base import Middleware


class Dedupe(Middleware):
    """Runs a message once though it was appended twice with one id: by a foreign producer, or after the window in which
    a produce call is recognised.

    ``ttl``: seconds for which an id is remembered, per group and shard. ``tasks``: names of the tasks; None for all.
    The first entry that carries an id runs, the others are acknowledged without running. Replayed dead letters run.
    """

    def __init__(self, *, ttl: float | dt.timedelta = 3600.0, tasks: Iterable[str] | None = None) -> None:
        self.ttl_ms = int(check("the ttl of Dedupe", seconds(0.1), ttl) * 1000)
        self.tasks = None if tasks is None else frozenset(check("tasks of Dedupe", TEXTS, tasks))
