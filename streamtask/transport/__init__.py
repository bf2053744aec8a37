"""A kombu transport on sharded streams: ``broker_url = "streamtask://localhost:6379/0"`` for an existing Celery app.

Importing this registers the schemes with kombu; a Celery process does so by itself (the entry point below is how kombu
finds it, though its group is for serializers).
"""

from __future__ import annotations

from typing import Any

from kombu.transport import TRANSPORT_ALIASES

SCHEMES = (
    "streamtask", "streamtasks",
    # What kombu makes of URLs with a plus when it goes on to the next of a failover list.
    "streamtask+redis", "streamtask+rediss", "streamtask+unix", "streamtask+socket", "streamtask+sentinel",
    "streamtask+cluster", "streamtask+redis+sentinel", "streamtask+redis+cluster",
)  # fmt: skip

for scheme in SCHEMES:
    TRANSPORT_ALIASES[scheme] = "streamtask.transport.transport:SchemeTransport"

__all__ = ["Transport"]


def __getattr__(name: str) -> Any:
    # kombu imports this module while it is being imported itself, so its virtual transport comes later.
    if name == "Transport":
        from .transport import Transport

        return Transport
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
