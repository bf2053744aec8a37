"""What holds of a queue's messages, for whoever consumes them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from ..redis import wire
from .lanes import MAX_WAITING


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerSettings:
    """``deduped``: time to live (ms) of the dedupe middleware's ids by task name; ``dedupe_all_ms``: for all others.
    ``max_waiting``: messages of a shard that wait in this process, beyond which reading stops. ``max_message_bytes``: what is
    larger is not decoded. ``accepts``: which content types a task's messages may have."""

    group: str = "workers"
    fetch_count: int = 200
    ack_batch: int = 200
    max_crashes: int = 3
    hold_on_dead: bool = False
    max_dedupe_ids: int = 1_000_000
    unordered: frozenset[str] = frozenset()
    deduped: Mapping[str, int] = field(default_factory=dict)
    dedupe_all_ms: int = 0
    max_waiting: int = MAX_WAITING
    max_message_bytes: int = 1 << 40
    accepts: Callable[[str], Collection[str]] = wire.only_safe
