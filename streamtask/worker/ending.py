"""How a worker process ends after an error that nobody foresaw: at once, and loudly. What it holds is another's to take over.

Nothing may go on without one of its threads: what that thread had would wait for ever.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from ..text import logger

log = logger("streamtask.worker")

EXIT_BROKEN = 70


def end_process(what: str) -> NoReturn:
    """Called where the error is handled. ``what`` has failed."""
    try:
        log.critical("%s failed; the process ends", what, exc_info=sys.exc_info())
    finally:
        os._exit(EXIT_BROKEN)


def start_thread(name: str, what: str, run: Callable[[], None]) -> threading.Thread:
    """Starts a thread that is to run for as long as its process."""

    def guarded() -> None:
        try:
            run()
        except BaseException:
            end_process(what)

    thread = threading.Thread(target=guarded, name=name, daemon=True)
    thread.start()
    return thread
