"""What Redis' error replies mean: the one table that decides what workers, producers and the kombu transport do about them.

A reply begins with a code, as ``BUSY`` or ``NOPERM``. What is not known here is a ``ReplyError``: whoever made the call backs
off and says so; it ends no process and no body that runs. ``docs/operations.md`` has the same table for those who see one.
"""

from __future__ import annotations

import re
from enum import Enum

from ..errors import AccessRefused, BrokerOutOfMemory, BrokerUnavailable, Misconfigured, ReplyError, StreamTaskError


class Kind(Enum):
    """What to do about a reply."""

    AWAY = "Redis is there, but does not serve now: as when it can't be reached. Wait, connect anew, try again"
    FULL = "its memory limit is reached"
    ACCESS = "the user or password is refused"
    SETTING = (
        "its ACL refuses a command or key, or it is a node of a Cluster: a wrong setting, until somebody changes it"
    )
    OTHER = "something of that key, or of that call: it alone is put off"


KINDS = {
    "BUSY": Kind.AWAY,  # a script runs for longer than busy-reply-threshold
    "UNKILLABLE": Kind.AWAY,
    "LOADING": Kind.AWAY,
    "MASTERDOWN": Kind.AWAY,  # a replica that has lost its master, with replica-serve-stale-data no
    "READONLY": Kind.AWAY,  # a master that became a replica
    "UNBLOCKED": Kind.AWAY,  # it became one while a call was blocked; or its slot moved
    "REDIRECT": Kind.AWAY,  # Valkey's word for the same
    "NOREPLICAS": Kind.AWAY,  # min-replicas-to-write
    "MISCONF": Kind.AWAY,  # it can't write its snapshot or append-only file
    "CLUSTERDOWN": Kind.AWAY,
    "TRYAGAIN": Kind.AWAY,
    "OOM": Kind.FULL,
    "NOAUTH": Kind.ACCESS,
    "WRONGPASS": Kind.ACCESS,
    "DENIED": Kind.ACCESS,  # protected mode
    "NOPERM": Kind.SETTING,
    "MOVED": Kind.SETTING,  # on a Cluster whose URL says so: AWAY, see ``ClusterLink``
    "ASK": Kind.SETTING,
}
TOO_MANY_CLIENTS = "max number of clients"
NO_ID_LEFT = "exhausted the last possible ID"
EXHAUSTED = "EXHAUSTED"
"""Our code for it: a stream whose last id is the largest there is."""
EXHAUSTED_ADVICE = (
    "when it is empty (XLEN says 0: workers drain it), DEL it; and see who may append with ids of his own"
)

_FIRST = re.compile(r"-?([A-Z][A-Z0-9]{2,}) ")
_IN_SCRIPT = re.compile(r"[-\s]([A-Z][A-Z0-9]{2,})(?= )")


def code_of(text: str) -> str:
    """The code of an error reply: ``ERR`` where it has none of its own, NOGROUP also where XINFO misses a stream."""
    if "no such key" in text:
        return "NOGROUP"
    text = text.removeprefix("ERR ")
    first = _FIRST.match(text)
    if first is None and "user_script" in text:
        # Redis 6.2 says before the error of a command where in the script it was.
        first = _IN_SCRIPT.search(text)
    return first[1] if first is not None else "ERR"


def kind_of(text: str) -> Kind:
    """What to do about an error reply, as Redis wrote it."""
    if "OOM command not allowed" in text:
        return Kind.FULL
    if TOO_MANY_CLIENTS in text:
        return Kind.AWAY
    return KINDS.get(code_of(text), Kind.OTHER)


def translate_reply(text: str, where: str) -> StreamTaskError:
    """An error reply, as Redis wrote it, as one of our errors."""
    kind = kind_of(text)
    if kind is Kind.AWAY:
        error = BrokerUnavailable(f"Redis at {where} does not serve now: {text.removeprefix('ERR ')}")
        error.code = code_of(text)
        error.in_doubt = False
        return error
    if kind is Kind.FULL:
        return BrokerOutOfMemory(
            f"Redis at {where} refuses writes: its memory limit (maxmemory) is reached and nothing was stored. "
            "Raise maxmemory, or let workers drain the queues"
        )
    if kind is Kind.ACCESS:
        return AccessRefused(f"Redis at {where} refused the user or password: {text}")
    if NO_ID_LEFT in text:
        return ReplyError(
            f"a stream in Redis at {where} takes no more messages: one with the largest id that there is was appended to it. "
            f"'doctor' names it; {EXHAUSTED_ADVICE}",
            EXHAUSTED,
        )
    code = code_of(text)
    if kind is Kind.SETTING and code == "NOPERM":
        text = f"Redis at {where} refuses the user a command or a key, which its ACL must allow: {text}"
        return Misconfigured(text, code)
    if kind is Kind.SETTING:
        return Misconfigured(
            f"Redis at {where} is a node of a Redis Cluster: its URL must begin with redis+cluster:// "
            "(of a Celery app with streamtask+cluster://)",
            code,
        )
    if "DB index" in text:
        return Misconfigured(
            f"Redis at {where} has no database of that number: name a lower one at the URL's end, as in /0, or raise databases "
            "in redis.conf",
            code,
        )
    if "unknown command" in text and "SENTINEL" in text:
        return Misconfigured(
            f"what answers at {where} is no Sentinel: the URL must name Sentinels and their port (26379), or begin with redis://",
            code,
        )
    if "unknown command" in text and re.search("EVALSHA|SMEMBERS", text, re.IGNORECASE):
        return Misconfigured(
            f"what answers at {where} keeps no data: of a Sentinel the URL begins with redis+sentinel:// ({text})", code
        )
    return ReplyError(text.removeprefix("ERR "), code)
