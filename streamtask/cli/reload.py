"""``worker --reload``: tells of changed source files, for development."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
from collections.abc import Callable

from ..errors import ConfigError
from ..text import logger

log = logger("streamtask.supervisor")

INSTALLED = {"site-packages", "dist-packages"}


def source_folders() -> list[str]:
    """Where the modules lie that have been imported so far, but for Python's own and what is installed."""
    pythons = tuple(os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib"))
    ours = os.path.realpath(os.path.dirname(os.path.dirname(__file__))) + os.sep
    found = set()
    for module in list(sys.modules.values()):
        path = os.path.realpath(getattr(module, "__file__", None) or "")
        if path.endswith(".py") and not path.startswith((*pythons, ours)) and INSTALLED.isdisjoint(path.split(os.sep)):
            found.add(os.path.dirname(path))
    return sorted(found)


def watch(changed: Callable[[], None]) -> None:
    """Calls ``changed``, in a thread, whenever a source file of what has been imported so far changes, or one beside it."""
    try:
        import watchfiles
    except ImportError:
        raise ConfigError("worker --reload needs watchfiles: pip install 'streamtask[reload]'") from None
    folders = source_folders()
    log.info("a change of a source file restarts the worker folders=%s", ",".join(folders))

    def run() -> None:
        for changes in watchfiles.watch(*folders, watch_filter=watchfiles.PythonFilter(), recursive=False):
            log.info("changed: %s", ", ".join(sorted({path for _, path in changes})))
            changed()

    threading.Thread(target=run, name="streamtask-reload", daemon=True).start()
