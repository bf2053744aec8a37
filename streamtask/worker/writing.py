"""What is written of a process's shards: results, then notes and dead letters, then acknowledgements, of all at once."""

from __future__ import annotations

from collections.abc import Callable

from ..clock import mono_s
from ..errors import LeaseLost, ReplyError
from ..queue.acknowledger import Acknowledger
from ..queue.backlog import Backlog
from ..queue.fetcher import Fetcher
from ..redis.link import Link
from .outbox import Outbox
from .owned import Executor, Owned, Shards
from .ports import WorkerSettings


class Writing:
    """See the module."""

    def __init__(
        self,
        settings: WorkerSettings,
        executor: Executor,
        shards: Shards,
        outbox: Outbox,
        fetcher: Fetcher,
        listen: Callable[[Link, Callable[[], None]], None],
    ) -> None:
        """``listen``: has a function called when a link has something to read."""
        self._settings = settings
        self._executor = executor
        self._shards = shards
        self._outbox = outbox
        self._fetcher = fetcher
        self._listen = listen
        self._acknowledger = Acknowledger(settings.broker)
        # Of ``ack_batch``; with ack="each" one, or one for each executor.
        most_ended, concurrency = settings.consumer.ack_batch // 2, settings.concurrency
        self.half = max(most_ended, concurrency + min(most_ended, concurrency // 2))
        """How many messages may have ended, or run, before the next are handed out."""

    def drop(self) -> None:
        """Closes the connection that acknowledges."""
        self._acknowledger.drop()

    def settle_first(self) -> None:
        """Before something that may take this process down: what has ended is on its way to be acknowledged, or each new death
        would run it again, or charge it."""
        for owned in self._shards.owned.values():
            self._outbox.add_unrun(owned.consumer)
        if not self._outbox.send():
            return
        for owned in list(self._shards.owned.values()):
            consumer = owned.consumer
            while consumer.settler.settling and consumer.backlog.finished:
                self.receive_settled()
            if consumer.backlog.finished and owned.quiet_until <= mono_s():
                self._acknowledger.ask(consumer)
        self.acknowledge()

    def write(self, owned: Owned, settle: bool = False) -> None:
        try:
            self._write_now(owned, settle)
        except LeaseLost:
            self._shards.suspect(owned)
        except ReplyError as exc:
            self._shards.refused(owned, exc)

    def _write_now(self, owned: Owned, settle: bool) -> None:
        consumer = owned.consumer
        if owned.quiet_until > mono_s() or owned.takeover:
            if consumer.backlog.closing and owned.takeover:
                self._shards.handed_over(owned)
            return
        self._outbox.add_unrun(consumer)
        stored = self._outbox.send()
        backlog, settler = consumer.backlog, consumer.settler
        if stored and backlog.has_writes():
            while settler.settling:
                self.receive_settled()
            try:
                settler.flush()
            finally:
                self._outbox.add_unrun(consumer)
            self._shards.look_at = mono_s()  # a lane may be open now
        if stored and backlog.finished and not settler.settling and (settle or self._settle_now(backlog)):
            self._acknowledger.ask(consumer)  # sent at the end of the turn
        if backlog.closing and settler.idle() and consumer not in (self._fetcher.asked or ()):
            self._shards.handed_over(owned)

    def _settle_now(self, backlog: Backlog) -> bool:
        if len(backlog.finished) >= self.half or backlog.closing:
            return True
        if not self._executor.out:
            return True  # nothing runs that could be acknowledged with it
        return mono_s() >= backlog.finished_since + self._settings.ack_interval_s

    def acknowledge(self) -> None:
        if self._acknowledger.send():
            self._listen(self._acknowledger.link, self.receive_settled)

    def receive_settled(self) -> None:
        for consumer, exc in self._acknowledger.receive():
            owned = self._shards.of(consumer)
            if owned is not None and isinstance(exc, LeaseLost):
                self._shards.suspect(owned)
            elif owned is not None and isinstance(exc, ReplyError):
                self._shards.refused(owned, exc)
