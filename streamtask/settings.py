"""Every setting of an app with its one default. Standard library only.

Durations are in seconds, sizes in bytes. Unknown names are refused.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from .errors import ConfigError

Seconds = float | dt.timedelta


class SettingsKeywords(TypedDict, total=False):
    """The fields of ``Settings``, for type checkers: keywords of ``StreamTask(...)``."""

    shards: int
    queue_shards: Mapping[str, int]
    namespace: str
    group: str
    serializer: str
    accept_content: Collection[str]
    max_message_bytes: int
    max_backlog: int
    send_timeout: Seconds
    produce_ttl: Seconds
    dedupe_ttl: Seconds
    max_dedupe_ids: int
    lease: Seconds
    handover_timeout: Seconds
    ack: Literal["batch", "each"]
    ack_batch: int
    ack_interval: Seconds
    prefetch: int
    max_crashes: int
    on_dead: Literal["continue", "hold"]
    on_expired: Literal["drop", "dead"]
    result_ttl: Seconds
    redis_timeout: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What ``StreamTask(...)`` takes beside its name and URLs."""

    shards: int = 8
    """Shards of a queue: the most processes that can work on its keyed messages at once."""
    queue_shards: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Shards of single queues, where they differ from ``shards``."""
    namespace: str = "streamtask"
    """First part of every key's name."""
    group: str = "workers"
    """The consumer group of this app's workers."""
    serializer: str = "msgpack"
    """``msgpack``, ``json``, or the name of another serializer registered with kombu."""
    accept_content: tuple[str, ...] = ()
    """Names of further serializers whose messages workers load. Only name pickle where every producer is trusted."""
    max_message_bytes: int = 1 << 20
    """Largest encoded message."""
    max_backlog: int = 0
    """Most messages of a shard that are not finished (lag, pending and delayed); 0 for no limit."""
    send_timeout: float = 30.0
    """How long a produce call waits for Redis and for room before it raises."""
    produce_ttl: float = 120.0
    """How long a repeated produce call is recognised."""
    dedupe_ttl: float = 3600.0
    """How long a ``dedupe_id`` is remembered."""
    max_dedupe_ids: int = 1_000_000
    """Most dedupe ids remembered per shard; above, calls with a ``dedupe_id`` raise ``QueueFull``."""
    lease: float = 5.0
    """How long a process that vanished keeps its shards."""
    handover_timeout: float = 10.0
    """How long an owner waits for running bodies before it gives a shard away; then it tries later."""
    ack: str = "batch"
    """``batch``: finished messages are acknowledged together; ``each``: one by one."""
    ack_batch: int = 200
    """Most finished messages that wait for their acknowledgement."""
    ack_interval: float = 0.005
    """Longest time that a finished message waits for it."""
    prefetch: int = 200
    """Messages of a shard that are read with one call."""
    max_crashes: int = 3
    """How many processes a body may take down; then its message is a dead letter."""
    on_dead: str = "continue"
    """``continue``: a dead letter leaves its lane; ``hold``: the lane stays closed until replay or drop."""
    on_expired: str = "drop"
    """``drop`` or ``dead``: what becomes of a message whose ``expires`` has passed."""
    result_ttl: float = 86400.0
    """How long a result is kept."""
    redis_timeout: float = 5.0
    """How long to wait for a connection or a reply."""

    def __post_init__(self) -> None:
        _positive(
            self, "shards", "max_message_bytes", "send_timeout", "produce_ttl", "dedupe_ttl", "lease", "result_ttl"
        )
        _positive(self, "ack_batch", "prefetch", "redis_timeout", "max_dedupe_ids")
        if not isinstance(self.namespace, str) or not re.fullmatch(r"[A-Za-z0-9_.:-]+", self.namespace):
            raise ConfigError(f"namespace must be made of letters, digits and _ . : -, not {self.namespace!r}")
        _one_of(self, "ack", "batch", "each")
        _one_of(self, "on_dead", "continue", "hold")
        _one_of(self, "on_expired", "drop", "dead")
        if self.ack_batch > 200 or self.prefetch > 200:
            raise ConfigError("ack_batch and prefetch are at most 200")
        if self.shards > 1024 or any(not 0 < n <= 1024 for n in self.queue_shards.values()):
            raise ConfigError("a queue has 1 to 1024 shards")


def _positive(settings: Settings, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ConfigError(f"the setting {name} must be a number above 0, not {value!r}")


def _one_of(settings: Settings, name: str, *values: str) -> None:
    if getattr(settings, name) not in values:
        raise ConfigError(f"the setting {name} must be one of {', '.join(values)}, not {getattr(settings, name)!r}")


def from_options(options: Mapping[str, Any]) -> Settings:
    """Settings from keyword arguments. Raises ``ConfigError`` naming what is unknown or wrong."""
    known = {field.name for field in dataclasses.fields(Settings)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ConfigError(
            f"unknown setting{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}: known are {', '.join(sorted(known))}"
        )
    return Settings(**options)
