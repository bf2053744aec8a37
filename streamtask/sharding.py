"""From a shard key to a shard: ``crc32(canonical(key)) mod N``.

The canonical form is part of the wire contract (``docs/protocol.md``, ``docs/vectors.json``): two keys with equal
canonical bytes are one key, in whatever language they are produced. How a task's calls get their key is said by its
``shard_key``. Standard library only.
"""

from __future__ import annotations

import inspect
import keyword
import uuid
from collections.abc import Callable, Mapping
from typing import Any
from zlib import crc32

from .checks import shown
from .errors import ConfigError, ShardKeyError


def canonical(key: object) -> bytes:
    """The bytes that stand for a shard key.

    str: its UTF-8; int: decimal ASCII; UUID: lower-case, hyphenated; bytes as they are. Subclasses (``IntEnum``)
    count by value. ``42`` and ``"42"`` are one key.

    Raises ``ShardKeyError`` for None, bool and any other type, for an empty key, and for text that is not valid Unicode.
    """
    if type(key) is int:
        return b"%d" % key
    if type(key) is str:
        text = key
    elif isinstance(key, bool) or key is None:
        raise ShardKeyError(
            f"the shard key is {key!r}: it must be a str, int, UUID or bytes. Give the task call a value whose order "
            "must hold, or declare the task without shard_key if none must"
        )
    elif isinstance(key, int):
        return b"%d" % int(key)
    elif isinstance(key, str):
        text = str.__str__(key)
    elif isinstance(key, bytes | bytearray | memoryview):
        raw = bytes(key)
        if not raw:
            raise ShardKeyError("the shard key is empty: give it a value whose order must hold")
        return raw
    elif isinstance(key, uuid.UUID):
        return str(key).encode()
    else:
        raise ShardKeyError(
            f"the shard key is of type {type(key).__name__}: it must be a str, int, UUID or bytes. "
            "Use a callable as shard_key to make one of these from the arguments"
        )
    try:
        raw = text.encode()
    except UnicodeEncodeError as exc:
        raise ShardKeyError(f"the shard key {text!r} is not valid Unicode text: {exc.reason}") from None
    if not raw:
        raise ShardKeyError("the shard key is empty: give it a value whose order must hold")
    return raw


def shard_of(canonical_key: bytes, shards: int) -> int:
    """The shard of a canonical key: CRC-32 (the zlib, PKZIP polynomial) modulo the number of shards."""
    return crc32(canonical_key) % shards


def compile_key(
    function: Callable[..., Any], name: str, shard_key: str | Callable[..., Any] | None, *, bind: bool = False
) -> Callable[..., bytes | None]:
    """A function with the task's own signature that returns the canonical shard key: Python itself then binds the
    arguments, which is the fastest way, and refuses those that don't fit. ``bind``: its first argument is the task."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:
        raise ConfigError(
            f"the arguments of task {name} can't be told from {shown(function)}: wrap it in a def"
        ) from None
    if bind:
        if not parameters or parameters[0].kind not in (
            inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
        ):  # fmt: skip
            raise ConfigError(
                f"task {name} has bind=True, so its first argument must be the task, as in def pay(self, ...)"
            )
        if parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
            parameters = parameters[1:]
    if shard_key is None:
        return _with_signature(parameters, "None", name, {})
    if callable(shard_key):
        return _with_signature(
            parameters, f"_st_canonical(_st_key({_forward(parameters)}))", name, {"_st_key": shard_key}
        )
    if not isinstance(shard_key, str) or not all(part.isidentifier() for part in shard_key.split(".")):
        raise ConfigError(f"shard_key of task {name} must be an argument's name, a path such as 'a.b', or a callable")
    first, *path = shard_key.split(".")
    named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    rest = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    if first in named:
        source = first
    elif rest is not None:
        source = f"_st_need({rest}, {first!r}, _st_name)"
    else:
        raise ConfigError(f"task {name} has no argument {first!r}, which its shard_key names")
    if path:
        source = f"_st_walk({source}, {tuple(path)!r}, {shard_key!r}, _st_name)"
    if source == first:
        # An int, as most keys are, without another call.
        made = f"b'%d' % {first} if _st_type({first}) is _st_int else _st_canonical({first})"
        return _with_signature(parameters, made, name, {})
    return _with_signature(parameters, f"_st_canonical({source})", name, {})


def _with_signature(
    parameters: list[inspect.Parameter], result: str, name: str, extra: dict[str, Any]
) -> Callable[..., bytes | None]:
    scope: dict[str, Any] = {
        "_st_canonical": canonical,
        "_st_int": int,
        "_st_type": type,
        "_st_need": _need,
        "_st_walk": _walk,
        "_st_name": name,
        **extra,
    }
    bare = []
    for i, parameter in enumerate(parameters):
        if parameter.default is not parameter.empty:
            scope[f"_st_default{i}"] = parameter.default
        bare.append(parameter.replace(annotation=inspect.Parameter.empty, default=inspect.Parameter.empty))
    pieces, seen_star = [], False
    for i, (parameter, plain) in enumerate(zip(parameters, bare, strict=True)):
        text = str(plain)
        if parameter.kind is parameter.KEYWORD_ONLY and not seen_star:
            pieces.append("*")
            seen_star = True
        seen_star = seen_star or parameter.kind is parameter.VAR_POSITIONAL
        if parameter.default is not parameter.empty:
            text += f"=_st_default{i}"
        pieces.append(text)
        following = parameters[i + 1].kind if i + 1 < len(parameters) else None
        if parameter.kind is parameter.POSITIONAL_ONLY and following is not parameter.POSITIONAL_ONLY:
            pieces.append("/")
    short = name.rpartition(".")[2]
    short = short if short.isidentifier() and not keyword.iskeyword(short) else "task"
    exec(f"def {short}({', '.join(pieces)}):\n    return {result}", scope)
    made: Callable[..., bytes | None] = scope[short]
    return made


def _forward(parameters: list[inspect.Parameter]) -> str:
    parts = []
    for p in parameters:
        if p.kind is p.VAR_POSITIONAL:
            parts.append(f"*{p.name}")
        elif p.kind is p.VAR_KEYWORD:
            parts.append(f"**{p.name}")
        elif p.kind is p.KEYWORD_ONLY:
            parts.append(f"{p.name}={p.name}")
        else:
            parts.append(p.name)
    return ", ".join(parts)


def _need(kwargs: Mapping[str, Any], key: str, name: str) -> Any:
    if key not in kwargs:
        raise ShardKeyError(f"task {name} needs the argument {key!r}: it is its shard key")
    return kwargs[key]


def _walk(value: Any, path: tuple[str, ...], whole: str, name: str) -> Any:
    for part in path:
        try:
            value = value[part] if isinstance(value, Mapping) else getattr(value, part)
        except (KeyError, AttributeError):
            raise ShardKeyError(
                f"task {name}: its shard key {whole!r} is not in the arguments: {part!r} is missing"
            ) from None
    return value
