"""Who takes part."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .bench import Contestant
from .venvs import NotInstalled, python_of

OURS = (
    Contestant("streamtask", "streamtask_", "streamtask"),
    Contestant("bare", "bare", "bare redis-py loop"),
    Contestant("socket", "bare_socket", "bare socket, prepared commands"),
)

# Each has adapters/NAME_.py and requirements/NAME.txt.
PEERS = ("celery", "dramatiq", "rq", "huey", "arq", "saq", "taskiq", "streaq", "ardiq", "tarsk", "docket")


def peers(names: Sequence[str], say: Callable[[str], None]) -> tuple[list[Contestant], dict[str, str]]:
    """Those that could be installed, and why the others could not."""
    found, missing = [], {}
    for name in names:
        say(f"installing {name}")
        try:
            found.append(Contestant(name, f"{name}_", name, python_of(name), peer=True))
        except NotInstalled as error:
            missing[name] = f"not installed: {error}"
    return found, missing
