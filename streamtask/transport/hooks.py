"""What the transport asks of the framework above it, which it does not know: ``streamtask.celery`` fills these in."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

before_publish: list[Callable[[dict[str, Any]], None]] = []
"""Called with the prepared message of every publish to a queue: body, content-type, content-encoding, headers, properties."""

before_failure: list[Callable[[], None]] = []
"""Called before an error of the connection reaches kombu's event loop, which forgets what it was reading."""

keep_on_close: list[Callable[[Collection[str]], Collection[str]]] = []
"""Asked, when a channel closes, which of its delivery tags are still being worked on: these wait for their ack."""

worked_on: list[Callable[[Collection[str]], Collection[str]]] = []
"""Asked now and then which of the deliveries that outlived their channel are still being worked on: what is not, though nobody
has acknowledged it, is delivered again."""

still_owned: Callable[[dict[str, Any]], bool] | None = None
"""Asks Redis whether the shard of a keyed delivery is still the receiver's; False where there is no answer. Set by the
transport, also for forked children."""

trusted_until: Callable[[str], float] | None = None
"""By its tag, until when (monotonic) the keeper vouches that a delivery's shard is the receiver's. Set as ``begin``."""

not_begun: list[Callable[[Collection[str]], Collection[str]]] = []
"""Asked which of these deliveries wait to begin, and say so with ``begin`` when they do: their shard can go to another process
without them."""

withdraw: Callable[[], None] | None = None
"""Gives back what is not begun of all shards, as ``not_begun`` knows it. Set by the transport as ``begin``."""

spare: Callable[[], None] | None = None
"""Says that this process was told to end: if it is killed then, that is no crash of what runs. Set as ``begin``."""

begin: Callable[[str, bool, bool], bool] | None = None
"""Says by its tag that the body of a delivery is about to start, that a pool gets it, or that it is acknowledged: False if it
was given back before. With True as the second argument it stays this process' from now on, also when its channel closes; as
the third, its body runs in this very process, whose death is counted if it was delivered before. Set by the transport where
the process that asks is the one that received it; None elsewhere (a forked pool process)."""
