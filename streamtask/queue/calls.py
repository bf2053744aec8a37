"""One produce call: as bytes for its shard, what an answer to it means, and how long it goes on.

Whoever sends it (``producer.py``, ``aproducer.py``, the kombu transport) asks here; nothing is sent from here.

A call is *in doubt* when it was sent and its reply was lost. It may be repeated then for as long as Redis knows its id, and
no longer: a repetition that comes later is a second message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from ..backoff import delays
from ..clock import mono_s
from ..errors import AccessRefused, BrokerUnavailable, InDoubt, QueueFull, ReplyError, StreamTaskError
from ..redis import wire
from ..redis.keys import ShardKeys
from ..redis.scripts import Code, as_text, script
from ..text import logger
from .queues import Queue
from .seen import PAGE, Pages, generation_keys

log = logger("streamtask.producer")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProducerSettings:
    """``produce_ttl_ms`` is how long a call may be repeated; ``timeout_s`` how long one is, by default."""

    max_backlog: int = 0
    produce_ttl_ms: int = 120_000
    dedupe_ttl_ms: int = 3_600_000
    max_dedupe_ids: int = 1_000_000
    timeout_s: float = 30.0


def _bulk(*parts: str | bytes | int) -> bytes:
    raw = [p if isinstance(p, bytes) else str(p).encode() for p in parts]
    return b"".join(b"$%d\r\n%b\r\n" % (len(p), p) for p in raw)


_NUMBERS = [_bulk(number) for number in range(PAGE)]
_SIZES = [b"$%d\r\n" % size for size in range(1024)]


class Target:
    """One shard as a producer sees it: its keys, its produce ids, and what of its next calls is prepared."""

    __slots__ = (
        "_next",
        "_pages",
        "_tail",
        "batches",
        "calls",
        "epoch",
        "keys",
        "layout",
        "links",
        "node",
        "settings",
    )

    def __init__(self, queue: Queue, shard: int | str, settings: ProducerSettings) -> None:
        self.keys: ShardKeys = queue.shard_keys(shard)
        self.epoch = queue.shape().epoch
        self.node = queue.broker.node(self.keys.stream)
        self.links = queue.pool.idle(self.keys.stream)
        self.calls = Pages("p")
        self.batches = Pages("b")
        self.layout = ""  # of the generations of dedupe ids, as Redis last told it
        self.settings = settings
        self._pages = Pages("p")
        self._next: Callable[[], tuple[bytes, bytes]] = iter(
            ()
        ).__next__  # start and number of a call, one step for threads
        self._tail = _bulk(settings.produce_ttl_ms, settings.max_backlog, wire.MSGPACK)

    def pack_append(self, envelope: bytes) -> bytes:
        """``produce.lua`` as bytes, with a produce id of its own: all but id and envelope is prepared once per page."""
        try:
            head, number = self._next()
        except StopIteration:
            head, number = self._turn_page()
        length = len(envelope)
        size = _SIZES[length] if length < 1024 else b"$%d\r\n" % length
        return b"".join((head, number, self._tail, size, envelope, b"\r\n"))

    def _turn_page(self) -> tuple[bytes, bytes]:
        """Where two threads turn it at once, one page stays nearly empty."""
        keys = self.keys
        seen = keys.seen(self._pages.name(self._pages.number()))
        called = _bulk("EVALSHA", script("produce").sha, 4, keys.state, seen, keys.stream, keys.delayed)
        calls = zip(repeat(b"*13\r\n" + called + _bulk(self.epoch)), _NUMBERS, strict=False)
        first = next(calls)
        self._next = calls.__next__
        return first

    def pack_many(self, envelopes: Sequence[bytes]) -> bytes:
        """``produce_many.lua``, with a produce id for the whole batch."""
        page, number = self.batches.take()
        keys, settings = self.keys, self.settings
        flat: list[bytes] = [wire.MSGPACK] * (2 * len(envelopes))
        flat[1::2] = envelopes
        head = as_text((self.epoch, number, settings.produce_ttl_ms, settings.max_backlog))
        return script("produce_many").pack_text(
            (keys.state, keys.seen(page), keys.stream, keys.delayed), (*head, *flat)
        )

    def pack_append_as(self, produce_id: tuple[str, int], envelope: bytes) -> bytes:
        """As ``pack_append``, with a produce id of the caller's."""
        page, number = produce_id
        keys, settings = self.keys, self.settings
        head = as_text((self.epoch, number, settings.produce_ttl_ms, settings.max_backlog))
        return script("produce").pack_text(
            (keys.state, keys.seen(page), keys.stream, keys.delayed), (*head, wire.MSGPACK, envelope)
        )

    def pack_delayed(
        self, envelope: bytes, due_ms: int, relative: bool, produce_id: tuple[str, int] | None = None
    ) -> bytes:
        """``produce_delayed.lua``, with the caller's produce id or one of its own."""
        page, number = self.calls.take() if produce_id is None else produce_id
        keys, settings = self.keys, self.settings
        return script("produce_delayed").pack(
            (keys.state, keys.seen(page), keys.stream, keys.delayed, keys.wake),
            (
                self.epoch,
                number,
                settings.produce_ttl_ms,
                settings.max_backlog,
                wire.MSGPACK,
                envelope,
                due_ms,
                1 if relative else 0,
            ),
        )

    def pack_deduped(
        self, id16: bytes, envelope: bytes, due_ms: int | None, relative: bool, call_id: bytes, repeated: bool = False
    ) -> bytes:
        """``produce_deduped.lua``. ``call_id``: random bytes that stand for this call and its repetitions;
        ``repeated``: whether an earlier try may have stored the message."""
        keys, settings = self.keys, self.settings
        return script("produce_deduped").pack(
            (keys.state, keys.stream, keys.delayed, keys.wake, *generation_keys(keys, "d", self.layout, id16)),
            (
                self.epoch,
                id16,
                settings.dedupe_ttl_ms,
                settings.max_backlog,
                wire.MSGPACK,
                envelope,
                "" if due_ms is None else due_ms,
                1 if relative else 0,
                self.layout,
                settings.max_dedupe_ids,
                # Two bytes in the id's hash: a wrong match is rare, and only a call that is repeated can meet it.
                int.from_bytes(call_id[:2], "big") & 0x7FFF,
                1 if repeated else 0,
            ),
        )

    def read(self, answer: Any, ours: bool) -> tuple[int, Code | None]:
        """What a produce script has answered: how many messages are stored and, where it is none, why. Raises the error that
        stands in the place of an answer.

        ``ours``: what is said to be stored already was stored by this very call, at an earlier try. Where the next try needs
        another layout of the dedupe ids, the target has it from then on.
        """
        if type(answer) is bytes:  # an entry's id
            return STORED
        if isinstance(answer, StreamTaskError):
            raise answer
        more = None
        if type(answer) is list and len(answer) == 2:
            answer, more = answer
        if type(answer) is int:
            if answer > 0:
                return answer, None
            if answer == Code.STORED_ALREADY and ours:
                return (1 if more is None else more), None
            if answer == Code.SEEN_LAYOUT and more is not None:
                self.layout = more.decode()
            if answer in _REFUSALS:
                return 0, Code(answer)
        raise ReplyError(f"unexpected answer of a produce script: {answer!r}")


STORED = 1, None
_REFUSALS = frozenset(Code) - {Code.LEASE_LOST}


@dataclass(slots=True)
class Call:
    """One produce call under way: what to send, and what became of it so far."""

    queue: Queue
    shard: int | str
    envelope: bytes
    due_ms: int | None = None
    relative: bool = False
    dedupe: bytes | None = None
    message_id: bytes | str = b""
    call_id: bytes = b""  # where there is a dedupe id
    produce_id: tuple[str, int] | None = None
    """A page's name and the number in it, where the caller may repeat this call itself; else one of the target's own."""
    packed: bytes | None = None
    """As it was sent, for its repetition, which must look where the first try may have left the id."""
    repeated: bool = False
    """Whether an earlier try with this id may have stored it: only then is "stored already" an answer to this call. Else
    another process has its ids, of which one is a copy."""
    sent_at: float | None = None
    """Since when it is in doubt."""
    tried_at: float | None = None
    """When the try began that was not answered yet."""
    waiting: Waiting | None = None

    def pack(self, target: Target) -> bytes:
        if self.dedupe is not None:
            return target.pack_deduped(
                self.dedupe, self.envelope, self.due_ms, self.relative, self.call_id, self.repeated
            )
        if self.due_ms is not None:
            return target.pack_delayed(self.envelope, self.due_ms, self.relative, self.produce_id)
        if self.produce_id is not None:
            return target.pack_append_as(self.produce_id, self.envelope)
        return target.pack_append(self.envelope)

    def next_try(self, target: Target) -> bytes:
        """What to send now."""
        if self.packed is None or self.dedupe is not None:
            self.packed = self.pack(target)
        self.tried_at = mono_s()
        return self.packed

    @property
    def ours(self) -> bool:
        """Whether what is said to be stored already was stored by this call."""
        return self.repeated and self.dedupe is None

    def outcome(self, target: Target, answer: Any) -> bool | Code:
        """True: it is stored; False: its dedupe id was before; a ``Code``: neither, and why."""
        _, refusal = target.read(answer, self.ours)
        if refusal is None:
            return True
        if refusal is Code.STORED_ALREADY and self.dedupe is not None:
            return False
        self.tried_at = None
        if refusal is not Code.SEEN_LAYOUT:
            self.sent_at = None  # whatever was in doubt: it is not stored
        return refusal

    def failed(self, error: StreamTaskError) -> None:
        """The try had no answer. A refusal for want of memory says nothing of the tries before it."""
        if self.tried_at is not None and isinstance(error, BrokerUnavailable) and error.in_doubt:
            self.repeated = True
            if self.sent_at is None:
                self.sent_at = self.tried_at
        self.tried_at = None

    def renew(self) -> None:
        """Its next try has another id."""
        self.packed = None
        self.repeated = self.repeated and (self.dedupe is not None or self.produce_id is not None)


def window_s(ttl_ms: int, timeout_s: float) -> float:
    """How long after a call was first sent, with its reply lost, a repetition may be sent: Redis has to get it while it
    knows the id."""
    ttl_s = ttl_ms / 1000
    return ttl_s - min(timeout_s, ttl_s / 2)


class Waiting:
    """How long a produce call goes on. ``pause`` says how long to wait before the next try, or raises ``error``."""

    __slots__ = ("_deadline", "_delays", "_full_deadline", "_started")

    def __init__(self, timeout_s: float, full_timeout_s: float, started: float) -> None:
        self._started = started
        self._deadline = started + timeout_s
        self._full_deadline = started + full_timeout_s
        self._delays: Iterator[float] = delays(0.01, 0.5)

    def pause(self, error: StreamTaskError, until: float | None = None, window: str = "") -> float:
        """``until``: when the window ends in which a call that is in doubt may be repeated; ``window``: how the setting is
        named that says so."""
        if isinstance(error, AccessRefused):
            raise error  # waiting does not mend a wrong password
        now = mono_s()
        deadline = self._full_deadline if isinstance(error, QueueFull) else self._deadline
        left = deadline - now
        if until is not None:
            if now >= until:
                raise InDoubt(
                    "whether the message is stored is not known: the reply to this call was lost, and Redis would not "
                    f"recognise another repetition of it, after {window}, so that the call was given up. Look whether the "
                    "message is there before you send it again, or raise that setting. The last error: "
                    f"{error}"
                ) from error
            if left <= 0 and isinstance(error, QueueFull):
                raise BrokerUnavailable(
                    "whether the message is stored is not known: the reply to this call was lost, and its repetition was "
                    f"refused: {error}"
                ) from error
            left = min(left, until - now) if left > 0 else left
        if left <= 0:
            raise error
        pause = next(self._delays)
        if now >= self._started + SAY_AFTER_S and left >= SAY_FROM_S and _worth_saying(error, now):
            log.warning("a produce call waits, for up to %.1f s: %s", left, error)
        return min(pause, left)


SAY_AFTER_S = 0.05
"""What passes sooner, as a connection that Redis has closed meanwhile, is not worth a word."""
SAY_FROM_S = 1.0
"""What ends sooner is said by its error."""
SAY_AGAIN_S = 10.0
_said: dict[type, float] = {}


def _worth_saying(error: StreamTaskError, now: float) -> bool:
    """Many calls may wait for the same: it is said now and then."""
    if now < _said.get(type(error), -SAY_AGAIN_S) + SAY_AGAIN_S:
        return False
    _said[type(error)] = now
    return True
