"""Who takes part."""

from __future__ import annotations

from .bench import Contestant

OURS = (
    Contestant("streamtask", "streamtask_", "streamtask"),
    Contestant("bare", "bare", "bare redis-py loop"),
    Contestant("socket", "bare_socket", "bare socket, prepared commands"),
)
