"""Stores messages in shards: append and id check are one atomic step, so that a repeated call adds nothing.

A produce call is repeated with the same id after a lost reply, an outage, or while Redis or the shard is full, until its
time is over, or that for which Redis knows the id. What stays in doubt then is said by the error.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from .. import fork
from ..clock import mono_s
from ..errors import BrokerUnavailable, QueueFull, ReplyError, StreamTaskError
from ..redis.keys import SHARED
from ..redis.link import REPLIES, Link, too_late
from ..redis.links import Pool
from ..redis.scripts import Code
from ..text import counted, logger
from .calls import Call, ProducerSettings, Target, Waiting, window_s
from .queues import Queue
from .seen import Pages

log = logger("streamtask.queue")
T = TypeVar("T")

MOST_TARGETS = 2048
"""Shards and shared streams that a producer remembers when it has used them lately, and as many of those before: who sends
to ever new queues, as of replies, must not grow for ever. Of one that was forgotten all is made anew, at its next use."""


def new_ids() -> Iterator[bytes]:
    """As ``new_id``, without end, for many at once: to be used at once, for a copy of the process would have the same."""
    while True:
        block = os.urandom(16 * 256)
        yield from [block[i : i + 16] for i in range(0, len(block), 16)]


def new_id() -> bytes:
    """A random 16-byte id. Each is asked of the system: what is kept for later would be the same in a copy of this process."""
    return os.urandom(16)


def put_away(link: Link, idle: list[Link], exc: BaseException) -> None:
    """A link whose call has failed."""
    if isinstance(exc, REPLIES):
        idle.append(link)
    else:
        # It may still owe an answer, which its next user must not read; on a Cluster it may be another node's.
        link.close()


class Producer:
    """Stores messages; safe to share between threads and across a fork.

    ``full_timeout_s``: how long to wait for room where a call names no timeout of its own (0 inside a worker: a task
    that waits for room in the queue that it should drain waits for ever).
    """

    def __init__(self, settings: ProducerSettings, pool: Pool) -> None:
        self.settings = settings
        self.pool = pool
        self.full_timeout_s = settings.timeout_s
        self._is_copy = False
        self._begin()
        fork.in_child(fork.Turn.PRODUCERS, self._begin)

    def _begin(self) -> None:
        """Draws its produce ids anew."""
        self._targets: dict[tuple[Queue, int | str], Target] = {}
        self._older: dict[tuple[Queue, int | str], Target] = {}
        self.ids = Pages("k")
        """For callers that may repeat a call themselves: see ``Call.produce_id``."""

    def target(self, queue: Queue, shard: int | str) -> Target:
        key = (queue, shard)
        found = self._targets.get(key)
        if found is None:
            if len(self._targets) >= MOST_TARGETS:
                self._older, self._targets = self._targets, {}
            known = self._older.pop(key, None)
            found = self._targets.setdefault(key, known or Target(queue, shard, self.settings))
        return found

    def _forget(self, queue: Queue, shard: int | str) -> None:
        """What Redis has recorded of a queue is another now."""
        queue.forget()
        self._targets.pop((queue, shard), None)
        self._older.pop((queue, shard), None)

    def append(self, queue: Queue, shard: int | str, envelope: bytes) -> None:
        """Stores one message, now and with no dedupe id: ``send`` for what is nearly always sent."""
        started = mono_s()
        packed = None
        failure: StreamTaskError | None = None
        try:
            target = self._targets.get((queue, shard)) or self.target(queue, shard)
            packed = target.pack_append(envelope)
            links = target.links
            try:
                link = links.pop()
            except IndexError:
                link = self.pool.new(target.keys.stream)
            try:
                answer = link.call(packed)
            except BaseException as exc:
                put_away(link, links, exc)
                raise
            links.append(link)
            if type(answer) is bytes:
                return
        except (BrokerUnavailable, QueueFull) as exc:
            failure = exc
        except ReplyError as exc:
            raise queue.named(exc) from None
        call = Call(queue, shard, envelope, packed=packed)
        if packed is not None and failure is not None:
            call.tried_at = started
            call.failed(failure)
        self.send(call, started=started)

    def send(self, call: Call, timeout_s: float | None = None, *, started: float | None = None) -> bool:
        """Stores one message. True if it is new, False if its dedupe id was stored before.

        ``timeout_s``: how long to wait for Redis and for room, from ``started`` on. Raises ``QueueFull``,
        ``BrokerOutOfMemory``, ``BrokerUnavailable``, and of these ``InDoubt`` where it may not be repeated any longer.
        """
        if started is None:
            started = mono_s()
        while True:
            try:
                target = self.target(call.queue, call.shard)
                answer = self._call(target, call.next_try(target), call.queue, self.until(call))
                outcome = call.outcome(target, answer)
                if isinstance(outcome, bool):
                    return outcome
                error = self.refused(call, outcome)
                if error is None:
                    continue
            except (BrokerUnavailable, QueueFull) as exc:
                error = exc
            except ReplyError as exc:
                raise call.queue.named(exc) from None
            time.sleep(self.pause(call, error, timeout_s, started))

    def send_together(self, calls: Sequence[Call]) -> None:
        """As ``send``, of many calls for one server in one write. What that does not store is sent call by call."""
        started, queue = mono_s(), calls[0].queue
        answers: Sequence[Any] = [None] * len(calls)
        for _ in range(2):  # the first connection may be stale
            until = min((until for call in calls if (until := self.until(call)) is not None), default=None)
            try:
                packed = [call.next_try(self.target(call.queue, call.shard)) for call in calls]
                answers = self.exchange(self.target(queue, calls[0].shard).keys.stream, packed, until)
                break
            except BrokerUnavailable as exc:
                for call in calls:
                    call.failed(exc)
        for call, answer in zip(calls, answers, strict=True):
            if isinstance(answer, StreamTaskError):
                call.failed(answer)
            elif answer is not None:
                target = self.target(call.queue, call.shard)
                if isinstance(call.outcome(target, answer), bool):
                    continue
            self.send(call, started=started)

    def exchange(
        self,
        key: str,
        packed: Sequence[bytes],
        until: float | None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> list[Any]:
        """Calls scripts of one server in one write, for which nobody else may use the connection; error replies stay in the
        list. ``key``: one of that server's. ``until``: not to be sent later than that; ``meanwhile``: what to do while Redis is
        at work."""
        sent = False
        try:
            with self.pool.borrow(key) as link:
                link.connect()
                if until is not None and mono_s() > until:
                    raise too_late()
                sent = True
                try:
                    link.send(b"".join(packed))
                    meanwhile()
                    return link.answers(packed)
                except BaseException:
                    link.close()  # what it still has to say is nobody's
                    raise
        except BrokerUnavailable as exc:
            # Where one of them was refused, the others may have been done.
            exc.in_doubt = exc.in_doubt or (sent and len(packed) > 1)
            raise

    def until(self, call: Call) -> float | None:
        """Until when it may be repeated; None if it is not in doubt."""
        if call.sent_at is None:
            return None
        return call.sent_at + window_s(self._ttl_ms(call), call.queue.broker.timeout_s)

    def _ttl_ms(self, call: Call) -> int:
        return self.settings.produce_ttl_ms if call.dedupe is None else self.settings.dedupe_ttl_ms

    def window(self, ttl_ms: int) -> str:
        """The setting that says how long a repeated call is recognised, for an error."""
        name = "produce_ttl" if ttl_ms == self.settings.produce_ttl_ms else "dedupe_ttl"
        return f"{name} ({ttl_ms / 1000:g} s)"

    def pause(self, call: Call, error: StreamTaskError, timeout_s: float | None, started: float) -> float:
        """How long to wait before the next try; raises the error if there is none."""
        call.failed(error)
        self.look_again(call.queue)
        if call.waiting is None:
            call.waiting = self.waiting(timeout_s, started)
        return call.waiting.pause(error, self.until(call), self.window(self._ttl_ms(call)))

    def look_again(self, queue: Queue) -> None:
        """After an error: on a Cluster a shard may be at another server now. What was sent in vain stays as it is."""
        if queue.broker.is_cluster:
            self._targets.clear()
            self._older.clear()

    def declare(self, queue: Queue, timeout_s: float | None = None) -> None:
        """Declares a queue that this process has not used yet; waits for Redis as ``send`` does."""
        if not queue.declared:
            self.patiently(queue.shape, timeout_s)

    def patiently(self, call: Callable[[], T], timeout_s: float | None = None) -> T:
        """A call that may be repeated; waits for Redis as ``send`` does."""
        waiting = self.waiting(timeout_s, mono_s())
        while True:
            try:
                return call()
            except (BrokerUnavailable, QueueFull) as exc:
                time.sleep(waiting.pause(exc))

    def waiting(self, timeout_s: float | None, started: float) -> Waiting:
        """``started``: when the call began, also where the first try has taken a while to fail."""
        if timeout_s is not None:
            return Waiting(timeout_s, timeout_s, started)
        return Waiting(self.settings.timeout_s, self.full_timeout_s, started)

    def refused(self, call: Call, code: Code) -> StreamTaskError | None:
        """As ``refusal``, of one call."""
        error = self.refusal(call.queue, call.shard, code)
        if code in (Code.NO_STATE, Code.SEALED, Code.STORED_ALREADY):
            call.renew()  # what was packed is of another epoch, or has another's id
            if code == Code.STORED_ALREADY and call.produce_id is not None:
                call.produce_id = self.ids.take()
        return error

    def _is_a_copy(self) -> None:
        """An id that was used for the first time is known: draws new ones."""
        self._begin()
        if self._is_copy:
            return
        self._is_copy = True
        log.warning(
            "this process seems to be a copy of another one (a snapshot of its machine, CRIU, SnapStart): the ids of its "
            "produce calls were in use. It has drawn new ones and goes on; nothing was left out"
        )

    def refusal(self, queue: Queue, shard: int | str, code: Code) -> StreamTaskError | None:
        """What a script's refusal means: an error that may pass, or None where the cause is mended already."""
        if code == Code.STORED_ALREADY:
            self._is_a_copy()
            return None
        if code in (Code.MORE_DUE, Code.SEEN_LAYOUT):
            # The delayed messages that are due go first, some of them with each call; the target knows the layout now.
            return None
        if code == Code.NO_STATE:
            # Never opened, or flushed: open it and go on.
            self._forget(queue, shard)
            queue.shape()
            return None
        where = "the shared stream" if shard == SHARED else f"shard {shard}"
        if code == Code.FULL:
            return QueueFull(
                f"{where} of queue {queue.name!r} holds {counted(self.settings.max_backlog, 'message')}, its max_backlog: "
                "start more workers, raise max_backlog, or remove a consumer group that nobody serves ('streamtask doctor')"
            )
        if code == Code.IDS_FULL:
            return QueueFull(
                f"{where} of queue {queue.name!r} remembers {counted(self.settings.max_dedupe_ids, 'dedupe id')}, the most "
                "that max_dedupe_ids allows: raise it, or shorten dedupe_ttl"
            )
        self._forget(queue, shard)  # SEALED
        return BrokerUnavailable(f"{where} of queue {queue.name!r} is being resharded; the call was repeated in vain")

    def _call(self, target: Target, packed: bytes, queue: Queue, until: float | None = None) -> Any:
        """``until``: not to be sent later than that."""
        links = target.links
        try:
            link = links.pop()
        except IndexError:
            link = self.pool.new(target.keys.stream)
        try:
            if until is not None:
                # What it takes to connect must not count.
                link.connect()
                if mono_s() > until:
                    raise too_late()
            answer = link.call(packed)
        except BaseException as exc:
            put_away(link, links, exc)
            raise
        links.append(link)
        return answer

    def close(self) -> None:
        self._targets = {}
        self._older = {}
        self.pool.close()
