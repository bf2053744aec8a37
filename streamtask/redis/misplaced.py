"""Which key is of another type than ours: something else was stored under its name. Redis' error says that there is one."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import ReplyError
from .keys import type_of
from .link import Link, pack

WRONGTYPE = "WRONGTYPE"


def misplaced(link: Link, keys: Iterable[str]) -> list[str]:
    """Of the keys those that are there with another type, each as a sentence that names it."""
    wanted = {key: kind for key in keys if (kind := type_of(key)) is not None}
    found = link.pipeline([pack("TYPE", key) for key in wanted])
    kinds = {key: kind.decode() for key, kind in zip(wanted, found, strict=True) if isinstance(kind, bytes)}
    return [
        f"{key} is a {kind}, and has to be a {wanted[key]}"
        for key, kind in kinds.items()
        if kind not in ("none", wanted[key])
    ]


def named(link: Link, exc: ReplyError, keys: Iterable[str]) -> str:
    """What an error of a call says, and which of its keys is at fault."""
    said = "; ".join(misplaced(link, keys)) if exc.code == WRONGTYPE else ""
    return f"{said} (remove or rename it): {exc}" if said else str(exc)
