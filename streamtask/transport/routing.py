"""What is declared: queues, their bindings to exchanges, and when an unused queue expires. Nothing here has a time to live of
its own, so no binding can vanish; a queue whose time is over is removed by whoever uses it next, or declares any."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from ..clock import mono_s
from ..errors import ReplyError
from ..redis import keys
from ..redis.keys import SHARED
from ..redis.link import Link
from ..text import logger
from .queues import GROUP
from .resting import is_of_one_key
from .session import Session

log = logger("streamtask.transport")

SEP = "\x06\x16"
FANOUT = "fanout"
"""In the place of a pattern: the binding is one of a fanout exchange, whose queues hear and have no streams."""
SWEEP_S = 10.0
"""How often this process looks for queues that have expired."""

Binding = tuple[str, str, str]
"""Routing key, pattern, queue."""

_swept_at: dict[int, float] = {}


def declare(session: Session, queue: str, expires_ms: int | None) -> None:
    """Records a queue. ``expires_ms``: how long it is kept unused, None for ever."""
    now = mono_s()
    while (epoch := _bind(session, queue, "", "", expires_ms or 0)) is None:
        drop_expired(session, queue)
    # Whoever deletes the one that had its name may not be done yet, and others may still publish to that.
    try:
        session.queue(queue).remove(epoch)
    except ReplyError as exc:
        if not is_of_one_key(exc):
            raise
        log.error("what is left of a deleted queue can't be looked at queue=%s: %s", queue, exc)
    session.declared(queue)
    if expires_ms:
        session.touched_at(queue, expires_ms, now)
    else:
        session.touched.pop(queue, None)
    if now - _swept_at.get(id(session), 0.0) > SWEEP_S:
        _swept_at[id(session)] = now
        sweep(session)


def bind(session: Session, exchange: str, binding: Sequence[str | None]) -> None:
    """Records a binding."""
    _bind(session, binding[2] or "", _escaped(exchange), _member(binding), "")


def _escaped(text: str | None) -> str:
    """A name that holds no SEP."""
    return (text or "").replace("\x06", "\x06\x15")


def _member(binding: Sequence[str | None]) -> str:
    return SEP.join(map(_escaped, binding))


def keep(session: Session, queue: str) -> None:
    """Who has declared a queue with ``x-expires`` uses it by publishing to it, too."""
    touched = session.touched.get(queue)
    if touched is not None and mono_s() >= touched.again_at:
        declare(session, queue, touched.expires_ms)


def drop_expired(session: Session, queue: str) -> None:
    """Removes a queue with all that is in it, if its time is over."""
    ended = _unbind(session, queue, "expired")
    if ended:
        log.info("queue %s has expired, unused", queue)
        _remove(session, queue, ended)


def _bind(session: Session, queue: str, exchange: str, member: str, expires_ms: int | str) -> int | None:
    """The queue's epoch, None where it has expired."""
    namespace, app = session.options.namespace, session.options.app
    names = [
        keys.app_queues(namespace, app), keys.expiring(namespace, app), keys.bound(namespace, app, queue),
        keys.bindings(namespace, app, exchange), keys.born(namespace, app), keys.epochs(namespace, app),
    ]  # fmt: skip
    bound = session.connections.run("bind_queue", names, [queue, expires_ms, exchange, member, SEP, uuid.uuid4().hex])
    if not bound:
        return None
    born, epoch = bound
    session.born = session.born or born
    return int(epoch)


def flushed(session: Session) -> bool:
    """Whether all was removed since this process first declared something."""
    name = keys.born(session.options.namespace, session.options.app)
    if not session.born or session.connections.once_more(lambda link: link.command("GET", name), name) == session.born:
        return False
    session.born = b""
    return True


def unbind(session: Session, queue: str, exchange: str, binding: Sequence[str | None]) -> None:
    """Takes one binding away."""
    _unbind(session, queue, _escaped(exchange) + SEP + _member(binding))


def _unbind(session: Session, queue: str, what: str) -> int:
    """Where the queue's declaration was taken away: all of its epochs before that have ended."""
    namespace, app = session.options.namespace, session.options.app
    names = [
        keys.app_queues(namespace, app), keys.expiring(namespace, app), keys.bound(namespace, app, queue),
        keys.epochs(namespace, app),
    ]  # fmt: skip
    args = [queue, keys.bindings(namespace, app, ""), SEP, what]
    while (done := session.connections.run("unbind_queue", names, args)) == 2:
        pass  # it has very many bindings
    return int(done[0]) if isinstance(done, list) else 0


def table(session: Session, exchange: str) -> list[Binding]:
    """The bindings of an exchange."""
    name = keys.bindings(session.options.namespace, session.options.app, _escaped(exchange))
    members = session.connections.once_more(lambda link: link.command("SMEMBERS", name), name)
    found = []
    for member in members:
        parts = [part.replace("\x06\x15", "\x06") for part in member.decode(errors="replace").split(SEP)]
        if len(parts) == 3:  # else somebody else has written it
            found.append((parts[0], parts[1], parts[2]))
    return found


def delete(session: Session, queue: str) -> None:
    """Removes a queue with its messages and bindings."""
    _remove(session, queue, _unbind(session, queue, "all"))


def _remove(session: Session, queue: str, before: int) -> None:
    session.drop_queue(queue)
    session.queue(queue).remove(before)
    session.queues.pop(queue, None)


def sweep(session: Session) -> None:
    """Removes the queues that have expired."""
    name = keys.expiring(session.options.namespace, session.options.app)

    def overdue(link: Link) -> list[bytes]:
        seconds, micros = link.command("TIME")
        now = int(seconds) * 1000 + int(micros) // 1000
        found: list[bytes] = link.command("ZRANGEBYSCORE", name, "-inf", now, "LIMIT", 0, 100)
        return found

    for member in session.connections.once_more(overdue, name):
        drop_expired(session, member.decode())


def size(session: Session, queue: str) -> int:
    """How many messages of a queue wait for a consumer or for their time."""
    found = session.queue(queue)
    total = 0
    for shard in found.recorded():
        prefix = found.shard_keys(shard)
        names = [prefix.stream, prefix.requeued(GROUP), prefix.delayed, prefix.state]
        total += int(session.connections.run("ready", names, [GROUP]))
    return total


PURGE_REQUEUED = 500
"""Entries on offer that one call removes: about 10 ms of Redis."""


def purge(session: Session, queue: str) -> int:
    """Removes what waits in a queue; what is being worked on stays. Returns how many messages were removed."""
    found = session.queue(queue)
    removed = 0
    for shard in found.recorded():
        prefix = found.shard_keys(shard)
        last = ""
        while True:
            entries, delayed, last = session.connections.run(
                "purge_shard", [prefix.stream, prefix.state, prefix.delayed], [1000, last, 1000]
            )
            last = last.decode()
            removed += int(entries) + int(delayed)
            if not entries and not delayed:
                break
        looked_at = PURGE_REQUEUED
        while looked_at == PURGE_REQUEUED:
            looked_at, gone = session.connections.run(
                "purge_requeued",
                [prefix.stream, prefix.requeued(GROUP), prefix.state, prefix.notes(GROUP)],
                [GROUP, PURGE_REQUEUED],
            )
            removed += int(gone)
    return removed


def consumers(session: Session, queue: str) -> int:
    """How many processes consume a queue."""
    found = session.queue(queue)
    if not found.recorded():
        return 0
    name = found.shard_keys(SHARED).consumers(GROUP)
    return int(session.connections.once_more(lambda link: link.command("ZCARD", name), name))
