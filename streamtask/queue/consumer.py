"""One shard (or shared stream) in the hands of its owner: what was read of it, what is written of it, and what comes to it.

The state machine of an owner, without a loop of its own and without knowing what a task is: the worker's control thread
calls it, and so does the inline runner of tests. Its parts are what they are for: ``backlog`` is memory alone, ``settler``
writes, ``arrivals`` and ``claimer`` read; here is what takes more than one of them. All that talk to Redis raise ``LeaseLost``
when the lease is no longer the owner's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

from ..coordination.lease import Lease
from .arrivals import Arrivals
from .backlog import Backlog, Batch
from .claimer import Claimer
from .decoder import Decoder
from .delivery import Delivery, Entry, deliveries_of
from .fence import Fence, LinksByKey
from .rules import ConsumerSettings
from .settler import Settler


@final
class ShardConsumer:
    """See the module. Used by one thread. ``links``: its connections, which others may share."""

    def __init__(
        self, lease: Lease, queue: str, shard: int | str, settings: ConsumerSettings, links: LinksByKey
    ) -> None:
        self.fence = Fence(lease, queue, shard, links)
        self.backlog = Backlog(lease, queue, shard, settings)
        self.settler = Settler(self.backlog, self.fence)
        self.arrivals = Arrivals(self.backlog, self.fence, Decoder(self.backlog, lease.group))
        self.claimer = Claimer(self.backlog, self.fence, self.settler, self.arrivals)

    def __repr__(self) -> str:
        return f"<ShardConsumer {self.fence.queue}/{self.fence.shard} token={self.fence.lease.token}>"

    def has_to_write(self) -> bool:
        """Whether there is anything to settle, write or hand over."""
        backlog = self.backlog
        return bool(backlog.finished or backlog.notes or backlog.dead or backlog.closing)

    # Handing out. What talks to Redis comes first, or is undone: an outage in the middle must not lose what was chosen.

    def hand_out(
        self, limit: int, *, may_mark: bool = True, before_mark: Callable[[], object] = lambda: None
    ) -> Batch | None:
        """A batch for an executor that runs it in sequence; None if nothing can run now. ``may_mark`` False: nothing
        that needs a start mark, for it would not start at once. ``before_mark`` is called before a start is written down: that
        body may take its process down."""
        backlog = self.backlog
        if backlog.halted or backlog.closing:
            return None
        batch = backlog.run_on(limit)
        if batch is not None:
            return batch
        self.arrivals.load(backlog.lacking(limit, in_sequence=True))
        chosen, mixed = backlog.choose(limit, may_mark)
        if not chosen:
            return None
        self._mark(chosen, before_mark)
        return backlog.hand(chosen, mixed)

    def hand_out_free(
        self, limit: int, *, at_once: int | None = None, before_mark: Callable[[], object] = lambda: None
    ) -> Batch | None:
        """Up to ``limit`` deliveries of different lanes, to be run side by side; None if nothing can run now. See
        ``Backlog.choose_free``."""
        backlog = self.backlog
        if backlog.halted or backlog.closing:
            return None
        self.arrivals.load(backlog.lacking(limit, in_sequence=False))
        chosen = backlog.choose_free(limit, at_once)
        self._mark(chosen, before_mark)
        return backlog.hand_free(chosen)

    def _mark(self, chosen: Sequence[Delivery | Entry], before_mark: Callable[[], object]) -> None:
        """Writes down that bodies start, where that is needed; where it fails, all of them go back."""
        notes = self.backlog.to_mark(chosen)
        if not notes:
            return
        try:
            before_mark()
            self.settler.write(notes)
        except BaseException:
            self.backlog.put_back(deliveries_of(chosen))
            raise

    def offer_again(self) -> int:
        """Puts what waits here of a shared stream on offer to all its consumers. Returns how many messages that are."""
        self.settler.write_notes()  # whoever takes them has to know of their attempts
        # Should an answer be lost, they are found among the pending ones.
        ids = self.backlog.give_away()
        for i in range(0, len(ids), 200):
            self.settler.requeue(ids[i : i + 200], self.fence.voided)
        if ids:
            self.arrivals.on_offer = True
        return len(ids)
