"""What Redis refuses of one queue alone, as when a key of it is of a wrong type: that rests and is tried again now and then,
and the other queues of the process go on."""

from __future__ import annotations

from collections.abc import Iterable

from ..clock import mono_s
from ..errors import ReplyError
from ..redis.misplaced import Ask, naming, of_one_key
from ..redis.outage import Rarely
from ..text import logger

log = logger("streamtask.transport")

REST_S = 1.0


def is_of_one_key(exc: ReplyError) -> bool:
    """Whether an error says nothing of other queues. An ACL that refuses is a wrong setting, and NOGROUP means a flush."""
    return of_one_key(exc) and exc.code != "NOGROUP"


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

    def say(self, what: str, exc: ReplyError, keys: Iterable[str], ask: Ask) -> None:
        """``keys``: those of which one may be at fault."""
        if self._said.worth_saying(str(exc)):
            log.error("Redis refused a call, %s rests and is tried again: %s", what, naming(exc, keys, ask))
