"""How long a queue lives: for ever once it is declared, or while it is in use (``x-expires``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..redis import keys
from ..redis.link import Link, pack

if TYPE_CHECKING:
    from .session import Session


class Touched:
    """A queue with ``x-expires`` that this process has declared: when its end has to be put off again, and when it is over if
    nobody else does that."""

    __slots__ = ("again_at", "expires_ms", "over_at")

    def __init__(self, expires_ms: int, at: float) -> None:
        self.expires_ms = expires_ms
        self.put_off(at)

    def put_off(self, at: float) -> None:
        self.again_at = at + self.expires_ms / 3000
        self.over_at = at + self.expires_ms / 1000


def is_declared(session: Session, name: str) -> bool:
    """Whether a queue is declared, and has not expired."""
    options = session.options
    declared = keys.app_queues(options.namespace, options.app)
    expiring = keys.expiring(options.namespace, options.app)

    def ask(link: Link) -> bool:
        there, until, (seconds, micros) = link.pipeline(
            [pack("SISMEMBER", declared, name), pack("ZSCORE", expiring, name), pack("TIME")]
        )
        return bool(there) and (until is None or float(until) > int(seconds) * 1000 + int(micros) // 1000)

    return bool(session.connections.once_more(ask, declared))


def touch(session: Session, name: str, expires_ms: int) -> None:
    """A queue with ``x-expires`` is in use."""
    key = keys.expiring(session.options.namespace, session.options.app)
    session.connections.run("touch_queues", [key], [expires_ms, name])
