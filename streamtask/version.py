"""The installed version; pyproject.toml is where it is written."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed() -> str:
    """The version of the installed distribution, or ``unknown`` in a bare checkout."""
    try:
        return version("streamtask")
    except PackageNotFoundError:
        return "unknown"
