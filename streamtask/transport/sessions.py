"""The sessions of this process, one for each broker with its settings, and the little that a framework above may ask of them:
each of its questions goes by a delivery tag, which says nothing of the session that the delivery came from."""

from __future__ import annotations

import threading
from typing import Any

from .. import fork
from ..redis.connection import Broker
from .message import HEARD
from .options import Options
from .session import Session

_sessions: dict[tuple[Any, ...], Session] = {}
_lock = threading.RLock()
"""It may be taken again: a signal handler may publish in the midst of the first use."""
_active = False


def session_of(broker: Broker, options: Options) -> Session:
    """The session of this process for a broker, made at its first use."""
    global _active
    fork.check()
    key = (broker.url, tuple(sorted(map(str, broker.options.items()))), options)
    with _lock:
        found = _sessions.get(key)
        if found is None:
            found = _sessions[key] = Session(broker, options)
        _active = True  # also where a forked child uses what it has inherited
        return found


def every() -> list[Session]:
    """All sessions of this process, also those that a forked child has inherited and not used."""
    return list(_sessions.values())


# What a framework may ask


def active() -> bool:
    """Whether this process is one that receives by itself. A forked pool process is not: what it is handed its parent has
    received, and of that nothing is known here."""
    return _active


def begin(tag: str, hold: bool, here: bool) -> bool:
    """Says by its tag that the body of a delivery is about to start, that a pool gets it, or that it is acknowledged: False if
    it was given back before. With ``hold`` it stays this process' from now on, also when its channel closes; with ``here`` its
    body runs in this very process, whose death is counted if it was delivered before."""
    if not _active or tag.startswith(HEARD):
        return True
    return any(session.start(tag, hold, here) for session in every())


def trusted_until(tag: str) -> float:
    """By its tag, until when (monotonic) the keeper vouches that a delivery's shard is the receiver's."""
    if not _active:
        return 0.0
    return max((session.trusted_until(tag) for session in every()), default=0.0)


def still_owned(delivery: dict[str, Any]) -> bool:
    """Asks Redis whether the shard of a keyed delivery is still its receiver's, also in a forked child; False where there is
    no answer."""
    asked = [session for session in every() if session.address == delivery["broker"]]
    return bool(asked) and all(session.still_owned(delivery) for session in asked)


def withdraw() -> None:
    """Gives back what is not begun of all shards, as ``hooks.not_begun`` knows it."""
    if _active:
        for session in every():
            session.deliveries.withdraw()


def shutting_down() -> None:
    """Says that this process was told to end: if it is killed then, that is no crash of what runs."""
    if _active:
        for session in every():
            session.shutting_down()


def _after_fork() -> None:
    global _active, _lock
    _lock = threading.RLock()
    _active = False
    for session in every():
        session.after_fork()  # connections that the child has inherited go on with it


fork.in_child(fork.Turn.SESSIONS, _after_fork)
