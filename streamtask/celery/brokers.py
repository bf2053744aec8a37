"""Whether an app's broker is ours: with another one, shard keys keep no order."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from ..text import logger
from .keys import declared_key

log = logger("streamtask.celery")


_looked_at: weakref.WeakSet[Any] = weakref.WeakSet()


def is_ours(transport: type) -> bool:
    return any(base.__module__.startswith("streamtask.transport") for base in transport.__mro__)


def look_at_broker(app: Any, names: Sequence[str]) -> None:
    """Says once per app that its broker is not ours. Connects to nothing."""
    if app in _looked_at:
        return
    _looked_at.add(app)
    kind = app.connection_for_write().get_transport_cls()
    if not is_ours(kind):
        log.warning(
            "The broker of app %r does not keep the order of shard keys (%s): %s run in any order. Set broker_url to "
            "streamtask://HOST:PORT/DB, or take shard_key out",
            app.main,
            kind.__module__,
            ", ".join(names),
        )


def on_worker_setup(instance: Any, **_: Any) -> None:
    names = sorted(name for name, task in instance.app.tasks.items() if declared_key(task) is not None)
    if names:
        look_at_broker(instance.app, names)
