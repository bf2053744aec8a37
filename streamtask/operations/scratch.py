"""A redis-server that one command starts for itself, and leaves nothing of."""

from __future__ import annotations

from pathlib import Path

from ..redis import embedded


def url_in(folder: Path) -> str:
    """The URL of a server in an empty folder: who uses it first starts it, and with the last user it stops."""
    return f"embedded://{folder}/redis"


def remove(folder: Path, timeout_s: float) -> None:
    """Removes that server's data, when it has stopped."""
    embedded.remove(f"{folder}/redis", timeout_s)
