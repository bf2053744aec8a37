"""What an owner writes of its messages: acknowledgements, notes and dead letters. And the connection on which a worker process
acknowledges: a call for each shard may be on its way, and its answer is taken when it comes.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from ..clock import mono_s
from ..errors import BrokerUnavailable, LeaseLost, ReplyError, StreamTaskError
from ..redis import wire
from ..redis.connection import Broker
from ..redis.link import Link
from ..redis.scripts import script
from ..redis.wire import Note, id_order
from ..text import MOST, harmless, logger, short
from .delivery import Delivery, Outcome
from .held import Held

log = logger("streamtask.consumer")

MOST_ACKED = 200
"""Ids in one call that acknowledges."""

SENT_S = 3.0
"""How long what was acknowledged is remembered: Redis' append-only file loses a second or two, should the machine die."""


class Settling(Held):
    """See the module."""

    def settle(self, link: Link) -> int:
        """Acknowledges and removes what is finished, at most ``MOST_ACKED`` messages a call. Returns how many."""
        count = 0
        while self.finished:
            packed = self.begin_settle()
            count += len(self.settling)
            try:
                self.end_settle(link.call(packed))
            except BaseException:
                self.settle_lost()
                raise
        return count

    def begin_settle(self) -> bytes:
        """The call that settles the first of what is finished; to be answered by ``end_settle`` or ``settle_lost`` before
        another begins."""
        if not self._in_order:
            self.finished.sort(key=id_order)
            self._in_order = True
        self.settling = self.finished[:MOST_ACKED]
        self.finished = self.finished[len(self.settling) :]
        self.finished_since = now = mono_s()
        packed = self.pack_settle(self.settling)
        sent = self._sent
        sent.append((now, packed))
        while sent[0][0] < now - SENT_S and not self.needs_audit:
            sent.popleft()
        return packed

    def end_settle(self, answer: Any) -> None:
        """Takes the answer. Raises ``LeaseLost``."""
        self._owned(answer)
        self.settling = []

    def settle_lost(self) -> None:
        """No answer came: what was sent is sent again, before anything later."""
        if self.settling:
            self.finished = self.settling + self.finished
            self.settling = []
            self._in_order = False

    def pack_settle(self, ids: Sequence[bytes]) -> bytes:
        token, incarnation, group = self._head
        return script("settle").pack_text(self._settle_keys, (str(token), incarnation, group, *ids))

    def flush(self, link: Link) -> None:
        """Writes the notes and dead letters that ``collect`` and reading have left to do. None of them overtakes the
        acknowledgement of what ended before: a crash in between would run that again behind it."""
        if self.has_writes():
            self.settle(link)
        self.write_notes(link)
        while self._dead:
            item, _, outcome = self._dead[0]
            try:
                self._dead_letter(link, item, outcome)
            except BrokerUnavailable:
                outcome.in_doubt = True
                raise
            self._dead.pop(0)

    def write_notes(self, link: Link) -> None:
        if self._notes:
            self._write_notes(link, self._notes)
            self._notes = []

    def has_writes(self) -> bool:
        return bool(self._notes or self._dead)

    def has_to_write(self) -> bool:
        """Whether there is anything to settle, write or hand over."""
        return bool(self.finished or self._notes or self._dead or self.closing)

    def idle(self) -> bool:
        """Nothing is handed out and nothing is left to write."""
        return not (self.handed or self.finished or self.settling or self.has_writes())

    def _write_notes(self, link: Link, notes: Sequence[tuple[bytes, Note]]) -> None:
        for i in range(0, len(notes), 200):
            args: list[Any] = list(self._head)
            for entry_id, note in notes[i : i + 200]:
                args += [entry_id, note.format()]
            self._run(link, "note", [self.lease.key, self.keys.stream, self.keys.notes(self.settings.group)], args)

    def _dead_letter(self, link: Link, item: Delivery | bytes, outcome: Outcome) -> None:
        delivery = item if isinstance(item, Delivery) else None
        entry_id = item.entry_id if isinstance(item, Delivery) else item
        note = (delivery.note if delivery else None) or Note()
        error: dict[str, Any] = {
            "reason": outcome.reason,
            "message": short(harmless(outcome.message)),
            "traceback": outcome.traceback and harmless(outcome.traceback),
            "attempts": note.attempt + (0 if outcome.reason in ("crashed", "expired", "undecodable") else 1),
            "crashes": note.crashes,
            "dead_at": self.redis_ms(),
            "appended_at": id_order(entry_id)[0],
            "queue": self.queue,
            "shard": self.shard,
        }
        if delivery:
            error["task"] = delivery.task
            error["id"] = wire.id_text(delivery.id)
            error["key"] = None if delivery.key is None else delivery.key.decode("utf-8", "backslashreplace")
            # What is longer is read from the message, which the dead letter has whole.
            error |= {name: None for name in ("task", "id", "key") if len(error[name] or "") > MOST}
        held = ""
        if self.settings.hold_on_dead and delivery is not None and delivery.lane is not None:
            held = Note(note.attempt, 0, note.crashes, 0, note.charged, 1).format()
        died = self._run(
            link,
            "dead_letter",
            [*self._settle_keys, self.keys.dlq, self.keys.replaced(self.settings.group)],
            [*self._head, entry_id, json.dumps(error), held],
        )
        if not died and not (outcome.in_doubt and self._lies_dead(link, entry_id)):
            # It is no longer pending, or held already: what is no dead letter now is not said to be one.
            self._after_death(delivery, held)
            return
        log.error(
            "dead letter: %s queue=%s shard=%s entry=%s task=%s id=%s: %s",
            outcome.reason, self.queue, self.shard, entry_id.decode(),
            delivery.task if delivery else "-", wire.id_text(delivery.id) if delivery else "-", error["message"],
            extra={
                "reason": outcome.reason,
                **{name: error.get(name) for name in ("task", "id", "key")},
                "attempt": note.attempt,
                "error": error["message"],
                "traceback": outcome.traceback,
            },
        )  # fmt: skip
        if delivery is not None:
            self.on_dead(self, delivery, outcome)
        self._after_death(delivery, held)

    def _lies_dead(self, link: Link, entry_id: bytes) -> bool:
        """Whether a call whose reply was lost has stored a dead letter, which is one of the last."""
        mine = [entry_id, self._group]
        newest = link.command("XREVRANGE", self.keys.dlq, "+", "-", "COUNT", 10)
        return any([fields[3], fields[5]] == mine for _, fields in newest)

    def _after_death(self, delivery: Delivery | None, held: str) -> None:
        if delivery is None:
            return
        lane = self.lanes.get(delivery.lane_key)
        if held:
            delivery.note = Note.parse(held.encode())
            self.lanes.close(delivery.lane_key, delivery, None)
        elif lane is not None:
            self.lanes.open(lane)

    def on_dead(self, consumer: Held, delivery: Delivery, outcome: Outcome) -> None:
        """Told of each dead letter once it is stored; the worker sets this."""


class Settler:
    """See the module. Used by one thread."""

    def __init__(self, broker: Broker) -> None:
        self.link = broker.link()
        self._where = broker.safe_url
        self._asked: deque[Settling] = deque()  # whose calls are on their way, in order

    def send(self, consumer: Settling) -> None:
        """Sends the call that settles the first of what a shard has finished; none of its calls is on its way."""
        packed = consumer.begin_settle()
        self._asked.append(consumer)
        self.link.send(packed)

    def take(self, link: Link) -> Iterator[tuple[Settling, LeaseLost | ReplyError]]:
        """Takes the answers that have come; waits for one. Shows what was refused: that is sent again. Raises
        ``BrokerUnavailable``."""
        if not self._asked:
            raise BrokerUnavailable(f"Redis at {self._where} closed the connection")
        while self._asked:
            answer = self.link.read_quietly()
            consumer = self._asked.popleft()
            try:
                if not isinstance(answer, StreamTaskError):
                    consumer.end_settle(answer)
                elif isinstance(answer, ReplyError) and answer.code == "NOSCRIPT":
                    consumer.settle_lost()
                    link.call(script("settle").pack_load())
                else:
                    raise answer
            except (LeaseLost, ReplyError) as exc:
                consumer.settle_lost()
                yield consumer, exc
            except StreamTaskError:
                consumer.settle_lost()
                raise
            if not self.link.buffered():
                return

    def drop(self) -> None:
        """Closes the connection. What was not answered is sent again, before anything later."""
        self.link.close()
        for consumer in self._asked:
            consumer.settle_lost()
        self._asked.clear()
