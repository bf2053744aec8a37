"""What executors get, and how much of it; and what they have ended. How fast that goes is known here alone."""

from __future__ import annotations

from ..clock import mono_s
from ..coordination.shared import MAX_BATCH, SharedMemory
from ..errors import LeaseLost, ReplyError
from ..queue.backlog import Batch
from ..queue.consumer import ShardConsumer
from ..queue.delivery import Kind
from .executor import SequentialExecutor
from .outbox import Outbox
from .owned import Executor, Owned, Shards
from .ports import WorkerSettings
from .writing import Writing

FEW = 4
"""Messages that are started before the next are fetched, where no more wait."""

AHEAD_S = 0.05
"""How much work of shared streams is read ahead, as bodies have gone lately: others could do it."""

LYING_S = 0.01
"""How much work lies with executors that run side by side, beyond what runs, as bodies have gone lately."""


class Handing:
    """See the module."""

    def __init__(
        self,
        settings: WorkerSettings,
        memory: SharedMemory,
        executor: Executor,
        shards: Shards,
        outbox: Outbox,
        writing: Writing,
    ) -> None:
        self._settings = settings
        self._memory = memory
        self._executor = executor
        self._shards = shards
        self._outbox = outbox
        self._writing = writing
        self._parallel = settings.concurrency > 1
        self.progress_at: float | None = None
        """When (monotonic) to see how far a batch has come."""
        self.pace_s = 0.0
        """After which time one more body has ended, while there was work; 0: not known yet."""
        self.moved_at = 0.0
        """When the last one ended, or began where an executor was free."""

    def collect(self) -> None:
        """Takes what executors have ended."""
        executor = self._executor
        if isinstance(executor, SequentialExecutor):
            ended = self._collect_in_sequence(executor)
        else:
            ended = 0
            for batch in list(executor.out):
                ended += batch.backlog.collect_free(batch)
                # Those of what has ended are among them, whatever ends meanwhile.
                self._outbox.add(batch.take_results())
                if batch.collected == len(batch.ids):
                    executor.out.remove(batch)
        if ended:
            now = mono_s()
            # One that takes long is remembered through some that don't.
            self.pace_s = max((now - self.moved_at) / ended, self.pace_s / 2, 1e-6)
            self.moved_at = now

    def _collect_in_sequence(self, executor: SequentialExecutor) -> int:
        ended = 0
        while executor.ended:
            batch = executor.ended.popleft()
            executor.out.remove(batch)
            last, outcome = batch.outcomes[-1] if batch.outcomes else (0, None)
            # Unless it came back early. What was cut off is no part of it any more, and its last body has taken long.
            if outcome is None or outcome.kind is not Kind.UNSTARTED or last >= len(batch.ids):
                ended += len(batch.ids) - batch.collected
            self._outbox.add(batch.take_results())
            batch.backlog.complete(batch)
        if not executor.out:
            self.progress_at = None
            return ended
        batch = executor.out[0]
        position = min(executor.position(batch), len(batch.ids))
        if position > batch.collected and not executor.ended:
            self._outbox.add(batch.take_results())
            ended = position - batch.collected
            batch.backlog.collect(batch, position)
            self.progress_at = mono_s() + self._settings.ack_interval_s
        elif self.progress_at is not None and mono_s() >= self.progress_at:
            self.progress_at = None  # a long body: its end wakes this thread
        return ended

    def hand_out(self) -> bool:
        """Gives executors what can run. True if that is little, and all that there is to do."""
        executor = self._executor
        if self._parallel:
            most = self._settings.concurrency + self._lying() - self.out()
        elif executor.out:
            return False
        elif self._shards.shared:
            # Messages of shards that take long are not to keep out those of shared streams: each gets its turn after a while.
            most = max(1, int(AHEAD_S / self.pace_s) if self.pace_s else 0)
        else:
            most = MAX_BATCH
        if most <= 0:
            return False
        most = min(most, self._room())
        served: list[Owned] = []
        for owned in list(self._shards.turn_order):
            if most <= 0 or (served and not self._parallel):
                break
            if owned.takeover or owned.quiet_until > mono_s() or not owned.consumer.backlog.has_work():
                continue
            if self._memory.trusted[owned.number] <= mono_s():
                continue
            limit = min(most, self._room_of(owned.consumer))
            if limit <= 0:
                continue  # the answer to an acknowledgement makes room
            try:
                batch = self._batch_of(owned.consumer, limit)
            except LeaseLost:
                self._shards.suspect(owned)
                continue
            except ReplyError as exc:
                self._shards.refused(owned, exc)
                continue
            if batch is not None:
                if not self.busy():
                    self.moved_at = mono_s()
                executor.submit(batch)
                most -= len(batch.ids)
                served.append(owned)
        for owned in served:
            if owned in self._shards.turn_order:
                self._shards.turn_order.remove(owned)
                self._shards.turn_order.append(owned)
        if not served or self._parallel or len(executor.out[0].ids) > FEW:
            return False
        return not any(
            o.full or o.consumer.backlog.has_work() or o.consumer.has_to_write() for o in self._shards.turn_order
        )

    def _batch_of(self, consumer: ShardConsumer, limit: int) -> Batch | None:
        if self._parallel:
            # Of one shard after the other where bodies are short: a call that acknowledges is then of more messages.
            share = limit if len(self._shards.turn_order) == 1 or self._lying() >= limit else max(1, limit // 2)
            at_once = self._settings.concurrency - self.out()
            return consumer.hand_out_free(share, at_once=at_once, before_mark=self._writing.settle_first)
        self.progress_at = mono_s() + self._settings.ack_interval_s
        # A start mark is written for what starts now, not for what waits behind another batch.
        return consumer.hand_out(limit, may_mark=not self._executor.out, before_mark=self._writing.settle_first)

    def out(self) -> int:
        """How many messages are handed out."""
        return sum(len(batch.ids) - batch.collected for batch in self._executor.out)

    def _lying(self) -> int:
        """How many messages to hand out beyond those that run side by side: short bodies follow each other at once."""
        pace = max(self.pace_s, mono_s() - self.moved_at) if self.busy() else self.pace_s
        return int(LYING_S / pace) if pace else 0

    def busy(self) -> bool:
        """Whether whatever is handed out now waits for a body to end."""
        return (self.out() if self._parallel else len(self._executor.out)) >= self._settings.concurrency

    def left_in_batch(self, consumer: ShardConsumer) -> bool:
        if self._parallel:
            return False
        return any(b.backlog is consumer.backlog and len(b.ids) - b.collected > 1 for b in self._executor.out)

    def _room(self) -> int:
        """How many messages to hand out. Were this process to die now, no more than ``ack_batch`` may have ended and not be
        acknowledged: one half of these runs, or has ended, while the other's acknowledgement is on its way."""
        out = self.out()
        room = self._writing.half - out - self._ended()
        if room <= self._writing.half // 2:
            for owned in [o for o in self._shards.owned.values() if o.consumer.backlog.finished]:
                self._writing.write(owned, settle=True)
            room = self._writing.half - out - self._ended()
        return room

    def _room_of(self, consumer: ShardConsumer) -> int:
        """As ``_room``, of a shard: what is on its way may be refused, and with ``ack="each"`` a message waits for the
        acknowledgement of the one before the last."""
        ended = len(consumer.backlog.finished)
        if ended >= max(1, self._settings.consumer.ack_batch // 2):
            return 0
        out = sum(len(batch.ids) - batch.collected for batch in consumer.backlog.handed.values())
        return 2 * self._writing.half - out - ended - len(consumer.settler.settling)

    def _ended(self) -> int:
        # A shard whose acknowledgements are refused holds up no other.
        now = mono_s()
        return sum(len(o.consumer.backlog.finished) for o in self._shards.owned.values() if o.quiet_until <= now)
