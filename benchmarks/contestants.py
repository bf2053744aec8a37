"""Who takes part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from .bench import Contestant
from .venvs import NotInstalled, python_of

OURS = (
    Contestant("streamtask", "streamtask_", "streamtask"),
    Contestant("bare", "bare", "bare redis-py loop"),
    Contestant("socket", "bare_socket", "bare socket, prepared commands"),
    Contestant("alone", "alone", "Python alone, without a queue"),
)

# Each has adapters/NAME_.py and requirements/NAME.txt.
PEERS = ("celery", "dramatiq", "rq", "huey", "arq", "saq", "taskiq", "streaq", "ardiq", "tarsk", "docket")


# Where the transport and the plugin are measured: Celery on both, from one environment.
CELERY = (
    Contestant("redis", "celery_stock", "Celery on kombu's redis transport", peer=True, options={"broker": "redis"}),
    Contestant("streamtask", "celery_stock", "Celery on our transport", options={"broker": "streamtask"}),
    Contestant("memory", "celery_stock", "Celery on kombu's memory transport", options={"broker": "memory"}),
)


def celery(python: str, say: Callable[[str], None]) -> list[Contestant]:
    """All run by this interpreter, or by one in an environment of their own. Raises ``NotInstalled``."""
    if not python:
        say("installing celery")
        python = python_of("celery")
    return [replace(one, python=python) for one in CELERY]


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
