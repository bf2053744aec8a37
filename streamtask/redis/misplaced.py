"""Which key is of another type than ours, or holds what is none of ours: something else was stored under its name. Redis'
error says that there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..errors import ConfigError, ReplyError, StreamTaskError
from ..text import printable
from . import commands
from .keys import type_of
from .link import Link, Reply

WRONGTYPE = "WRONGTYPE"

Ask = Callable[[Sequence[tuple[str, bytes]]], Sequence[Reply]]
"""Sends prepared commands, each to the server that holds its key, and answers their replies."""


def by(link: Link) -> Ask:
    """Asks one server alone."""
    return lambda calls: link.pipeline([packed for _, packed in calls])


def of_one_key(error: object) -> bool:
    """Whether an error is a matter of one key, as one of a wrong type: what has other keys goes on."""
    return isinstance(error, ReplyError) and not isinstance(error, ConfigError)


def number(value: bytes | int | None, default: int, key: str, field: str) -> int:
    """A number that stands in a hash. Raises ``ReplyError`` where something else does."""
    try:
        return int(value or default)
    except ValueError:
        shown = printable(value, 60, lines=False)
        raise ReplyError(
            f"the field {field} of {key} is no number, but {shown}: put it right, or remove the key"
        ) from None


def misplaced(keys: Iterable[str], ask: Ask) -> dict[str, str]:
    """Of the keys those that are there with another type, and what is to be said of each."""
    wanted = {key: kind for key in keys if (kind := type_of(key)) is not None}
    found = ask([(key, commands.kind(key)) for key in wanted])
    kinds = {key: kind.decode() for key, kind in zip(wanted, found, strict=True) if isinstance(kind, bytes)}
    return {
        key: f"{key} is a {kind}, and has to be a {wanted[key]}"
        for key, kind in kinds.items()
        if kind not in ("none", wanted[key])
    }


def naming(exc: ReplyError, keys: Iterable[str], ask: Ask) -> str:
    """What an error of a call says, and which of its keys is at fault, where Redis can be asked."""
    try:
        said = "; ".join(misplaced(keys, ask).values()) if exc.code == WRONGTYPE else ""
    except StreamTaskError:
        said = ""
    return f"{said} (remove or rename it): {exc}" if said else str(exc)
