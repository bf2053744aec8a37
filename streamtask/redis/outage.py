"""An outage of Redis, as who waits for its end sees it: how long to wait before the next try, and what was said of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from ..backoff import delays
from ..clock import mono_s
from ..errors import AccessRefused, BrokerUnavailable, StreamTaskError

AGAIN_S = 60.0


class Rarely:
    """What is met again and again is said when it changes, and every ``AGAIN_S`` seconds."""

    def __init__(self) -> None:
        self._said = ""
        self._at = 0.0

    def worth_saying(self, what: str) -> bool:
        now = mono_s()
        if what == self._said and now < self._at + AGAIN_S:
            return False
        self._said, self._at = what, now
        return True


class Outage:
    """See the module. The waits grow from ``base_s`` to ``cap_s`` seconds; the log has one line for each kind of error."""

    def __init__(self, log: logging.Logger, base_s: float, cap_s: float) -> None:
        self._log = log
        self._base_s = base_s
        self._cap_s = cap_s
        self._delays: Iterator[float] | None = None
        self._said: set[tuple[type, str]] = set()

    def __bool__(self) -> bool:
        """Whether there is one."""
        return self._delays is not None

    def met(self, exc: StreamTaskError) -> float:
        """Redis did not answer, did not serve, or did not let us in. Returns how many seconds to wait."""
        if self._delays is None:
            self._delays = delays(self._base_s, self._cap_s)
        kind = (type(exc), getattr(exc, "code", ""))
        if kind not in self._said:
            # A refused password does not mend itself, nor does what is not known to pass.
            passes = isinstance(exc, BrokerUnavailable) and not isinstance(exc, AccessRefused)
            self._log.log(logging.WARNING if passes else logging.ERROR, "%s", exc)
            self._said.add(kind)
        return next(self._delays)

    def over(self, where: str) -> None:
        """Redis has answered."""
        if self:
            self._log.info("connected again broker=%s", where)
            self._delays = None
            self._said.clear()
