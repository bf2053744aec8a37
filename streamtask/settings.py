"""Every setting of an app and option of a task with its one default. Standard library only.

Durations are in seconds, sizes in bytes. Unknown names are refused.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from .checks import EXCEPTIONS, FLAG, TEXT, TEXTS, Rule, check_fields, either, one_of, optional, seconds, whole
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
        check_fields(self, RULES, "the setting")


def _namespace(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_.:-]+", value):
        raise ValueError
    return value


def _queue_shards(value: Any) -> dict[str, int]:
    return {TEXT.take(queue): SHARDS.take(shards) for queue, shards in dict(value).items()}


SHARDS = whole(1, 1024)
RULES: Mapping[str, Rule] = {
    "shards": SHARDS,
    "queue_shards": Rule("a mapping from names of queues to whole numbers from 1 to 1024", _queue_shards),
    "namespace": Rule("made of letters, digits and _ . : -", _namespace),
    "group": TEXT,
    "serializer": TEXT,
    "accept_content": TEXTS,
    "max_message_bytes": whole(1),
    "max_backlog": whole(0),
    "send_timeout": seconds(above=True),
    "produce_ttl": seconds(0.1),
    "dedupe_ttl": seconds(0.1),
    "max_dedupe_ids": whole(1),
    # Below, a keeper is late with its renewals on a machine that is but a little busy, and nothing runs.
    "lease": seconds(0.2),
    "handover_timeout": seconds(),
    "ack": one_of("batch", "each"),
    "ack_batch": whole(1, 200),
    "ack_interval": seconds(),
    "prefetch": whole(1, 200),
    "max_crashes": whole(0),
    "on_dead": one_of("continue", "hold"),
    "on_expired": one_of("drop", "dead"),
    "result_ttl": seconds(0.1),
    "redis_timeout": seconds(0.01),
}
"""What each may be."""


def from_options(options: Mapping[str, Any]) -> Settings:
    """Settings from keyword arguments. Raises ``ConfigError`` naming what is unknown or wrong."""
    known = {field.name for field in dataclasses.fields(Settings)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ConfigError(
            f"unknown setting{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}: known are {', '.join(sorted(known))}"
        )
    return Settings(**options)


ShardKey = str | Callable[..., Any] | None
Exceptions = type[BaseException] | Collection[type[BaseException]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """What ``@app.task`` takes. Durations are in seconds."""

    queue: str = "default"
    shard_key: ShardKey = None
    ordered: bool = True
    bind: bool = False
    max_retries: int | None = 3
    retry_backoff: bool | float = True
    retry_backoff_max: float = 600.0
    retry_jitter: bool = True
    autoretry_for: tuple[type[BaseException], ...] | None = None
    dont_autoretry_for: tuple[type[BaseException], ...] = ()
    soft_time_limit: float | None = None
    time_limit: float | None = None
    expires: float | None = None
    ignore_result: bool = False
    serializer: str | None = None
    rate_limit: str | float | None = None

    def __post_init__(self) -> None:
        check_fields(self, TASK_RULES, "the task option")
        soft, hard = self.soft_time_limit, self.time_limit
        if soft is not None and hard is not None and soft > hard:
            raise ConfigError(
                f"the task option soft_time_limit must be at most the time_limit ({hard:g} s), not {soft:g} s: the process "
                "would have ended before"
            )

    def rate_per_s(self) -> float | None:
        """``rate_limit`` as starts per second."""
        return None if self.rate_limit is None else _per_s(self.rate_limit)


def _rate(rate: Any) -> str | float:
    if isinstance(rate, bool) or not 0 < _per_s(rate) < math.inf:
        raise ValueError
    found: str | float = rate
    return found


def _per_s(rate: str | float) -> float:
    if not isinstance(rate, str):
        return float(rate)
    count, _, unit = rate.partition("/")
    return float(count) / {"": 1, "s": 1, "m": 60, "h": 3600}.get(unit, math.nan)


TASK_RULES: Mapping[str, Rule] = {
    "queue": TEXT,
    "ordered": FLAG,
    "bind": FLAG,
    "max_retries": optional(whole(0), " for no limit"),
    "retry_backoff": either(FLAG, seconds()),
    "retry_backoff_max": seconds(),
    "retry_jitter": FLAG,
    "autoretry_for": optional(EXCEPTIONS),
    "dont_autoretry_for": EXCEPTIONS,
    "soft_time_limit": optional(seconds(above=True)),
    "time_limit": optional(seconds(above=True)),
    "expires": optional(seconds(above=True)),
    "ignore_result": FLAG,
    "serializer": optional(TEXT),
    "rate_limit": optional(Rule("a number of starts per second, or text such as '10/s', '100/m' or '1000/h'", _rate)),
}
"""What each may be; ``shard_key`` is looked at with the function's arguments (``sharding.compile_key``)."""


class TaskKeywords(TypedDict, total=False):
    """The fields of ``TaskOptions``, for type checkers: the keywords of ``@app.task``, but for ``bind``."""

    queue: str
    shard_key: ShardKey
    ordered: bool
    max_retries: int | None
    retry_backoff: bool | Seconds
    retry_backoff_max: Seconds
    retry_jitter: bool
    autoretry_for: Exceptions | None
    dont_autoretry_for: Exceptions
    soft_time_limit: Seconds | None
    time_limit: Seconds | None
    expires: Seconds | None
    ignore_result: bool
    serializer: str | None
    rate_limit: str | float | None
