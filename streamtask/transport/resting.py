"""What Redis refuses of one queue alone, as when a key of it is of a wrong type: that rests and is tried again now and then,
and the other queues of the process go on."""

from __future__ import annotations

from ..clock import mono_s
from ..errors import ConfigError, ReplyError
from ..text import logger
from ..worker.outage import Rarely

log = logger("streamtask.transport")

REST_S = 1.0


def is_of_one_key(exc: ReplyError) -> bool:
    """Whether an error says nothing of other queues. An ACL that refuses is a wrong setting, and NOGROUP means a flush."""
    return not isinstance(exc, ConfigError) and exc.code != "NOGROUP"


class Rest:
    """Whether a queue, or a shard, rests. True while it does."""

    __slots__ = ("_said", "until")

    def __init__(self) -> None:
        self.until = 0.0
        self._said = Rarely()

    def __bool__(self) -> bool:
        return mono_s() < self.until

    def begin(self) -> None:
        self.until = mono_s() + REST_S

    def say(self, what: str, why: str) -> None:
        if self._said.worth_saying(why):
            log.error("Redis refused a call, %s rests and is tried again: %s", what, why)
