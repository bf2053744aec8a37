"""Hooks around sending and running, called in the order in which the app names its middlewares.

``before_*`` hooks run in that order, ``after_*`` and ``on_*`` hooks in the reverse one, so that middlewares nest. A hook
that raises in ``before_send`` refuses the call; in ``before_run`` it fails the run as the body would; elsewhere it is
logged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..request import Request


@dataclass(slots=True)
class Outgoing:
    """A message about to be sent. ``headers`` may be changed by ``before_send``."""

    task: str
    id: str
    args: Any
    kwargs: Mapping[str, Any]
    queue: str
    shard_key: bytes | None
    headers: dict[str, Any] = field(default_factory=dict)


class Middleware:
    """Base of all middlewares: override what is wanted."""

    def before_send(self, message: Outgoing) -> None:
        """Called in the producer before a message is encoded."""

    def after_send(self, message: Outgoing, stored: bool) -> None:
        """Called when the message is stored; ``stored`` is False if its ``dedupe_id`` was known."""

    def before_run(self, request: Request) -> None:
        """Called before each run of a body, in the thread that runs it."""

    def after_run(self, request: Request, result: Any, error: BaseException | None) -> None:
        """Called after each run of a body, with its result or its exception."""

    def on_retry(self, request: Request, error: BaseException, delay: float) -> None:
        """Called when a run failed and will be repeated in ``delay`` seconds."""

    def on_dead(self, request: Request, reason: str, message: str) -> None:
        """Called when the message has become a dead letter."""


def overriding(middlewares: Iterable[Middleware], hook: str) -> list[Any]:
    """The bound hooks of those middlewares that override it, in order."""
    return [getattr(m, hook) for m in middlewares if getattr(type(m), hook) is not getattr(Middleware, hook)]
