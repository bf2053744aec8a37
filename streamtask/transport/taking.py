"""Taking messages for good, without a lease: for consumers that don't acknowledge."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..clock import mono_s
from ..queue.delivery import Delivery
from ..redis import wire
from ..redis.keys import ShardKeys
from ..redis.link import Link
from ..redis.wire import id_order
from ..text import logger, said, short
from .consumed import Consumed
from .message import address, check, decode, expired
from .queues import GROUP, shared

if TYPE_CHECKING:
    from .session import Session

log = logger("streamtask.transport")


def take(session: Session, consumed: Consumed, most: int) -> list[tuple[dict[str, Any], str]]:
    """Up to ``most`` messages, the most urgent first, as (payload, delivery tag)."""
    queue = consumed.queue
    out: list[tuple[dict[str, Any], str]] = []
    consumed.rung = False
    due_at: list[float] = []
    for priority in queue.priorities:
        queue.open(shared(priority))
        names = queue.shard_keys(shared(priority))
        link = session.connections.links.at(names.stream)
        while len(out) < most:
            now_ms, last, rung, next_ms, again, fresh = link.run(
                "take",
                [names.stream, names.requeued(GROUP), names.delayed, names.state, names.wake, names.notes(GROUP)],
                [GROUP, most - len(out)],
            )
            if consumed.moved(names.prefix, last, rung):
                queue.recorded()
            for position, (entry_id, fields) in enumerate([*again, *fresh]):
                payload = _payload(link, queue.name, names, entry_id, fields)
                if payload is None or expired(payload, entry_id, int(now_ms)):
                    continue
                tag = session.new_tag()
                address(payload, tag, again=position < len(again))
                out.append((payload, tag))
            if not again and not fresh:
                if next_ms >= 0:
                    due_at.append(mono_s() + max(0, int(next_ms) - int(now_ms)) / 1000)
                break
    # A first keyed message has come: the next fetch joins those who share its shards out.
    consumed.rung = len(out) >= most or queue.keyed
    consumed.next_due = min(due_at, default=None)
    return out


def _payload(link: Link, queue: str, names: ShardKeys, entry_id: bytes, fields: list[bytes]) -> dict[str, Any] | None:
    """The message; None for junk, which goes to the dead letters."""
    try:
        delivery = Delivery(entry_id, wire.decode(fields))
        check(delivery.args)
        return decode(delivery)
    except Exception as exc:
        error = {
            "reason": "undecodable", "message": short(said(exc)), "traceback": None, "attempts": 0, "crashes": 0,
            "dead_at": id_order(entry_id)[0], "appended_at": id_order(entry_id)[0], "queue": queue, "shard": "shared",
        }  # fmt: skip
        dead: list[str | bytes] = ["error", json.dumps(error), "entry", entry_id, "group", GROUP, "held", "0", *fields]
        link.run("bury", [names.state, names.dlq], dead)
        log.error("dead letter: undecodable queue=%s entry=%s: %s", queue, entry_id.decode(), exc)
        return None
