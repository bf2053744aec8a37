"""Loads the Lua scripts and packs calls of them. One file is one atomic operation; ``--- @include NAME`` pulls in a
file of ``lua/include``.

A call is EVALSHA; a server that does not know the script (a restart, SCRIPT FLUSH) answers NOSCRIPT, upon which
``link.Link`` loads it and repeats the call.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from enum import IntEnum
from functools import cache
from importlib import resources

from hiredis import pack_command

from ..errors import ConfigError

_INCLUDE = re.compile(r"^--- @include (\w+)$", re.MULTILINE)


class Code(IntEnum):
    """What a script answers instead of doing its work (``lua/include/codes.lua``)."""

    STORED_ALREADY = 0
    LEASE_LOST = -1
    NO_STATE = -2
    SEALED = -3
    FULL = -4
    SEEN_LAYOUT = -5
    IDS_FULL = -6
    MORE_DUE = -7


def as_text(parts: Iterable[str | bytes | int | float]) -> list[str | bytes]:
    """The parts of a command, numbers as text: hiredis 3.5 turns a number into text itself, but crashes the process if a
    signal handler raises at that moment, as a soft time limit does."""
    return [part if isinstance(part, str | bytes) else str(part) for part in parts]


class Script:
    """One Lua script: its name, its whole source and its digest."""

    __slots__ = ("_head", "name", "sha", "source")

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.source = source
        self.sha = hashlib.sha1(source.encode()).hexdigest()
        self._head = ("EVALSHA", self.sha)

    def pack(self, keys: tuple[str | bytes, ...], args: tuple[str | bytes | int | float, ...]) -> bytes:
        """The call as bytes for the wire."""
        return self.pack_text(keys, as_text(args))

    def pack_text(self, keys: tuple[str | bytes, ...], args: Iterable[str | bytes]) -> bytes:
        """As ``pack``, where no argument is a number."""
        packed: bytes = pack_command((*self._head, str(len(keys)), *keys, *args))  # type: ignore[arg-type]  # hiredis' stub names a 1-tuple
        return packed

    def pack_load(self) -> bytes:
        """The command that makes the server know the script."""
        packed: bytes = pack_command(("SCRIPT", "LOAD", self.source))  # type: ignore[arg-type]
        return packed

    def __repr__(self) -> str:
        return f"<Script {self.name}>"


def _read(name: str) -> str:
    return (resources.files(__package__) / "lua" / name).read_text(encoding="utf-8")


def _expand(source: str, name: str) -> str:
    included: set[str] = set()

    def include(match: re.Match[str]) -> str:
        if match[1] in included:
            raise ConfigError(f"{name}.lua includes {match[1]} twice")
        included.add(match[1])
        return _read(f"include/{match[1]}.lua").rstrip("\n")

    return _INCLUDE.sub(include, source)


@cache
def script(name: str) -> Script:
    """The script of ``lua/NAME.lua``."""
    return Script(name, _expand(_read(f"{name}.lua"), name))


@cache
def by_sha() -> dict[bytes, Script]:
    """Every script by its digest, for the answer to NOSCRIPT."""
    found = {}
    for file in resources.files(__package__).joinpath("lua").iterdir():
        if file.name.endswith(".lua"):
            one = script(file.name.removesuffix(".lua"))
            found[one.sha.encode()] = one
    return found
