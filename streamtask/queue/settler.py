"""What an owner writes of its messages: acknowledgements, notes and dead letters."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, final

from ..errors import BrokerUnavailable
from ..redis import commands, wire
from ..redis.scripts import script
from ..redis.wire import Note, id_order
from ..text import MOST, harmless, logger, short
from .backlog import Backlog
from .delivery import Dead, Delivery, Outcome
from .fence import Fence

log = logger("streamtask.consumer")

MOST_ACKED = 200
"""Ids in one call that acknowledges."""

SENT_S = 3.0
"""How long what was acknowledged is remembered: Redis' append-only file loses a second or two, should the machine die."""

MOST_SENT = 10_000


@final
class Settler:
    """See the module. ``pack``: the call that acknowledges entries, if that is not ``pack_settle``; ``settled`` is told of the
    entries of a call, with its answer."""

    def __init__(
        self,
        backlog: Backlog,
        fence: Fence,
        *,
        pack: Callable[[Sequence[bytes]], bytes] | None = None,
        settled: Callable[[list[bytes], Any], None] | None = None,
    ) -> None:
        self._backlog = backlog
        self._fence = fence
        self.settling: list[bytes] = []
        """What was sent to be acknowledged, and is not answered yet."""
        self.died: list[tuple[Delivery, Outcome]] = []
        """Dead letters that were stored, until somebody has seen to their results."""
        self.sent: deque[tuple[float, bytes]] = deque(maxlen=MOST_SENT)  # when, and the calls of the last SENT_S
        keys = fence.keys
        self.keys = (fence.lease.key, keys.stream, keys.state, keys.notes(fence.group))
        """Those of a call that settles."""
        self._pack = pack or self.pack_settle
        self._settled = settled

    def idle(self) -> bool:
        """Nothing is handed out and nothing is left to write."""
        backlog = self._backlog
        return not (backlog.handed or backlog.finished or self.settling or backlog.has_writes())

    # Acknowledging

    def settle(self) -> int:
        """Acknowledges and removes what is finished, at most ``MOST_ACKED`` messages a call. Returns how many."""
        count = 0
        while self._backlog.finished:
            packed = self.begin()
            count += len(self.settling)
            try:
                self.end(self._fence.link.call(packed))
            except BaseException:
                self.lost()
                raise
        return count

    def begin(self) -> bytes:
        """The call that settles the first of what is finished; to be answered by ``end`` or ``lost`` before another begins."""
        self.settling = self._backlog.next_finished(MOST_ACKED)
        packed = self._pack(self.settling)
        now = self._backlog.finished_since
        sent = self.sent
        sent.append((now, packed))
        while sent[0][0] < now - SENT_S and not self._fence.needs_audit:
            sent.popleft()
        return packed

    def end(self, answer: Any) -> None:
        """Takes the answer; what ``settle.lua`` counts is not looked at. Raises ``LeaseLost``."""
        self._fence.checked(answer)
        ids, self.settling = self.settling, []
        if self._settled is not None:
            self._settled(ids, answer)

    def lost(self) -> None:
        """No answer came: what was sent is sent again, before anything later."""
        if self.settling:
            self._backlog.still_finished(self.settling)
            self.settling = []

    def pack_settle(self, ids: Sequence[bytes]) -> bytes:
        token, incarnation, group = self._fence.head
        return script("settle").pack_text(self.keys, (str(token), incarnation, group, *ids))

    # Notes and dead letters

    def flush(self) -> None:
        """Writes the notes and dead letters that ``collect`` and reading have left to do. None of them overtakes the
        acknowledgement of what ended before: a crash in between would run that again behind it."""
        backlog = self._backlog
        if backlog.has_writes():
            self.settle()
        self.write_notes()
        while backlog.dead:
            dead = backlog.dead[0]
            try:
                self.bury(dead)
            except BrokerUnavailable:
                dead.in_doubt = True
                raise
            backlog.dead.pop(0)

    def write_notes(self) -> None:
        backlog = self._backlog
        if backlog.notes:
            self.write(backlog.notes)
            backlog.notes = []

    def write(self, notes: Sequence[tuple[bytes, Note]]) -> None:
        fence = self._fence
        keys = (fence.lease.key, fence.keys.stream, fence.keys.notes(fence.group))
        for i in range(0, len(notes), 200):
            args: list[Any] = list(fence.head)
            for entry_id, note in notes[i : i + 200]:
                args += [entry_id, note.format()]
            fence.run("note", keys, args)

    def bury(self, dead: Dead) -> None:
        """Stores a dead letter."""
        backlog, fence = self._backlog, self._fence
        delivery, outcome = dead.delivery, dead.outcome
        note = (delivery.note if delivery else None) or Note()
        error: dict[str, Any] = {
            "reason": outcome.reason,
            "message": short(harmless(outcome.message)),
            "traceback": outcome.traceback and harmless(outcome.traceback),
            "attempts": note.attempt + (0 if outcome.reason in ("crashed", "expired", "undecodable") else 1),
            "crashes": note.crashes,
            "dead_at": backlog.redis_ms(),
            "appended_at": id_order(dead.entry_id)[0],
            "queue": fence.queue,
            "shard": fence.shard,
        }
        if delivery:
            error["task"] = delivery.task
            error["id"] = wire.id_text(delivery.id)
            error["key"] = None if delivery.key is None else delivery.key.decode("utf-8", "backslashreplace")
            # What is longer is read from the message, which the dead letter has whole.
            error |= {name: None for name in ("task", "id", "key") if len(error[name] or "") > MOST}
        held = None
        if backlog.settings.hold_on_dead and delivery is not None and delivery.lane is not None:
            held = Note(note.attempt, 0, note.crashes, 0, note.charged, 1)
        died = fence.run(
            "dead_letter",
            [*self.keys, fence.keys.dlq, fence.keys.replaced(fence.group)],
            [*fence.head, dead.entry_id, json.dumps(error), held.format() if held else ""],
        )
        # What is no longer pending, or held already, is no dead letter now, and is not said to be one.
        if died or (dead.in_doubt and self._lies_dead(dead.entry_id)):
            self._say(dead, note, error)
            if delivery is not None:
                self.died.append((delivery, outcome))
        backlog.buried(dead, held)

    def _say(self, dead: Dead, note: Note, error: dict[str, Any]) -> None:
        delivery = dead.delivery
        log.error(
            "dead letter: %s queue=%s shard=%s entry=%s task=%s id=%s: %s",
            dead.outcome.reason, self._fence.queue, self._fence.shard, dead.entry_id.decode(),
            delivery.task if delivery else "-", wire.id_text(delivery.id) if delivery else "-", error["message"],
            extra={
                "reason": dead.outcome.reason,
                **{name: error.get(name) for name in ("task", "id", "key")},
                "attempt": note.attempt,
                "error": error["message"],
                "traceback": dead.outcome.traceback,
            },
        )  # fmt: skip

    def _lies_dead(self, entry_id: bytes) -> bool:
        """Whether a call whose reply was lost has stored a dead letter, which is one of the last."""
        mine = [entry_id, self._fence.group.encode()]
        newest = self._fence.link.call(commands.newest(self._fence.keys.dlq, 10))
        return any([fields[3], fields[5]] == mine for _, fields in newest)

    # Giving away

    def requeue(self, ids: Sequence[bytes], voided: int | str) -> None:
        """Puts pending entries of a shared stream on offer to all its consumers. ``voided``: refuse it where the calls of this
        lease were made void more often than that."""
        fence = self._fence
        keys = (fence.lease.key, fence.keys.stream, fence.keys.requeued(fence.group), fence.keys.wake)
        fence.run("requeue", keys, [*fence.head, voided, *ids])
