"""Stores messages in shards: append and id check are one atomic step, so that a repeated call adds nothing.

A produce call is repeated with the same id after a lost reply, an outage, or while Redis or the shard is full, until its
time is over. What stays in doubt then is said by the error.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..backoff import delays
from ..clock import mono_s
from ..errors import BrokerUnavailable, BulkSendError, ConfigError, QueueFull, ReplyError, StreamTaskError
from ..redis import wire
from ..redis.keys import SHARED, ShardKeys
from ..redis.link import REPLIES, Link
from ..redis.scripts import Code, as_text, script
from .declare import Queue
from .seen import PAGE, Pages, generation_keys

T = TypeVar("T")

BATCH = 250
"""Messages of one shard that ``send_many`` appends with one script call."""

BATCH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ProducerSettings:
    """``produce_ttl_ms`` is how long a call may be repeated; ``timeout_s`` how long one is, by default."""

    max_backlog: int = 0
    produce_ttl_ms: int = 120_000
    dedupe_ttl_ms: int = 3_600_000
    max_dedupe_ids: int = 1_000_000
    timeout_s: float = 30.0


_reset_after_fork: weakref.WeakSet[Any] = weakref.WeakSet()


def _after_fork() -> None:
    _ids.clear()
    for one in list(_reset_after_fork):
        one.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def new_ids() -> Iterator[bytes]:
    """As ``new_id``, without end, for many at once."""
    while True:
        block = os.urandom(16 * 256)
        yield from [block[i : i + 16] for i in range(0, len(block), 16)]


_ids: deque[bytes] = deque()


def new_id() -> bytes:
    """A random 16-byte id. They are drawn from the system 256 at a time; a forked child begins anew."""
    try:
        return _ids.pop()
    except IndexError:
        block = os.urandom(16 * 256)
        _ids.extend(block[i : i + 16] for i in range(16, len(block), 16))
        return block[:16]


def _bulk(*parts: str | bytes | int) -> bytes:
    raw = [p if isinstance(p, bytes) else str(p).encode() for p in parts]
    return b"".join(b"$%d\r\n%b\r\n" % (len(p), p) for p in raw)


_NUMBERS = [_bulk(number) for number in range(PAGE)]


class Target:
    """One shard as a producer sees it: its keys, its produce ids, and what of its next calls is prepared."""

    __slots__ = (
        "_page",
        "_settings",
        "_single",
        "_tail",
        "batches",
        "calls",
        "epoch",
        "keys",
        "layout",
        "links",
        "node",
    )

    def __init__(
        self, queue: Queue, shard: int | str, settings: ProducerSettings, idle: dict[str, list[Link]] | None = None
    ) -> None:
        self.keys: ShardKeys = queue.shard_keys(shard)
        self.epoch = queue.shape().epoch
        self.node = queue.broker.node(self.keys.stream)
        self.links = ({} if idle is None else idle).setdefault(
            self.node, []
        )  # idle ones, shared with others of the node
        self.calls = Pages(self.keys, "p")
        self.batches = Pages(self.keys, "b")
        self.layout = ""  # of the generations of dedupe ids, as Redis last told it
        self._settings = settings
        self._single = self.calls.number
        self._page = (-1, b"")  # a page's number, and the start of its calls
        self._tail = _bulk(settings.produce_ttl_ms, settings.max_backlog, wire.MSGPACK)

    def pack_append(self, envelope: bytes) -> bytes:
        """``produce.lua`` as bytes, with a produce id of its own: all but id and envelope is prepared once per page."""
        number = self._single()
        page = number // PAGE
        prepared, head = self._page
        if prepared != page:
            head = self._prepare(page)
        return b"".join((head, _NUMBERS[number % PAGE], self._tail, b"$%d\r\n" % len(envelope), envelope, b"\r\n"))

    def _prepare(self, page: int) -> bytes:
        keys = self.keys
        called = _bulk("EVALSHA", script("produce").sha, 4, keys.state, self.calls.key(page), keys.stream, keys.delayed)
        head = b"*13\r\n" + called + _bulk(self.epoch)
        # In one step: another thread may be at another page.
        self._page = (page, head)
        return head

    def pack_many(self, envelopes: Sequence[bytes]) -> bytes:
        """``produce_many.lua``, with a produce id for the whole batch."""
        page, number = self.batches.take()
        keys, settings = self.keys, self._settings
        flat: list[bytes] = [wire.MSGPACK] * (2 * len(envelopes))
        flat[1::2] = envelopes
        head = as_text((self.epoch, number, settings.produce_ttl_ms, settings.max_backlog))
        return script("produce_many").pack_text((keys.state, page, keys.stream, keys.delayed), (*head, *flat))

    def pack_append_as(self, produce_id: tuple[str, int], envelope: bytes) -> bytes:
        """As ``pack_append``, with a produce id of the caller's."""
        page, number = produce_id
        keys, settings = self.keys, self._settings
        head = as_text((self.epoch, number, settings.produce_ttl_ms, settings.max_backlog))
        return script("produce").pack_text(
            (keys.state, keys.seen(page), keys.stream, keys.delayed), (*head, wire.MSGPACK, envelope)
        )

    def pack_delayed(
        self, envelope: bytes, due_ms: int, relative: bool, produce_id: tuple[str, int] | None = None
    ) -> bytes:
        """``produce_delayed.lua``, with the caller's produce id or one of its own."""
        if produce_id is None:
            page, number = self.calls.take()
        else:
            page, number = self.keys.seen(produce_id[0]), produce_id[1]
        keys, settings = self.keys, self._settings
        return script("produce_delayed").pack(
            (keys.state, page, keys.stream, keys.delayed, keys.wake),
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
        keys, settings = self.keys, self._settings
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


@dataclass(slots=True)
class Call:
    """One produce call under way: what to send, until when, and what became of it."""

    queue: Queue
    shard: int | str
    envelope: bytes
    due_ms: int | None = None
    relative: bool = False
    dedupe: bytes | None = None
    message_id: bytes | str = b""
    call_id: bytes = b""  # where there is a dedupe id
    repeated: bool = False
    """Whether an earlier try may have stored it, its reply lost."""
    produce_id: tuple[str, int] | None = None
    """A page's name and the number in it, where the caller may repeat this call itself; else one of the target's own."""

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


class Waiting:
    """How long a produce call goes on. ``pause`` says how long to wait before the next try, or raises ``error``."""

    __slots__ = ("_deadline", "_delays", "_full_deadline")

    def __init__(self, timeout_s: float, full_timeout_s: float, started: float) -> None:
        self._deadline = started + timeout_s
        self._full_deadline = started + full_timeout_s
        self._delays: Iterator[float] = delays(0.01, 0.5)

    def pause(self, error: StreamTaskError) -> float:
        if isinstance(error, ConfigError):
            raise error  # a refused password
        deadline = self._full_deadline if isinstance(error, QueueFull) else self._deadline
        left = deadline - mono_s()
        if left <= 0:
            raise error
        return min(next(self._delays), left)


class Producer:
    """Stores messages; safe to share between threads and across a fork.

    ``full_timeout_s``: how long to wait for room where a call names no timeout of its own (0 inside a worker: a task
    that waits for room in the queue that it should drain waits for ever).
    """

    def __init__(self, settings: ProducerSettings) -> None:
        self.settings = settings
        self.full_timeout_s = settings.timeout_s
        self._targets: dict[tuple[Queue, int | str], Target] = {}
        self._idle: dict[str, list[Link]] = {}
        self._lock = threading.Lock()
        self._pid = os.getpid()
        _reset_after_fork.add(self)

    def check_process(self) -> None:
        """Where a server forks without Python's hooks (uWSGI), two processes must not draw the same ids."""
        if os.getpid() != self._pid:
            _after_fork()

    def after_fork(self) -> None:
        self._pid = os.getpid()
        # The child must not write on its parent's sockets; they close with the parent's objects.
        for queue, _ in self._targets:
            queue.after_fork()
        self._targets = {}
        self._idle = {}
        self._lock = threading.Lock()

    def target(self, queue: Queue, shard: int | str) -> Target:
        found = self._targets.get((queue, shard))
        if found is None:
            found = self._targets.setdefault((queue, shard), Target(queue, shard, self.settings, self._idle))
        return found

    def append(self, queue: Queue, shard: int | str, envelope: bytes) -> None:
        """Stores one message, now and with no dedupe id: ``send`` for what is nearly always sent."""
        started = mono_s()
        packed = None
        try:
            target = self._targets.get((queue, shard)) or self.target(queue, shard)
            packed = target.pack_append(envelope)
            answer = self._call(target, packed, queue)
            if type(answer) is bytes or answer == 1:
                return
        except (BrokerUnavailable, QueueFull):
            pass
        self.send(Call(queue, shard, envelope), started=started, packed=packed)

    def send(
        self, call: Call, timeout_s: float | None = None, *, started: float | None = None, packed: bytes | None = None
    ) -> bool:
        """Stores one message. True if it is new, False if its dedupe id was stored before.

        ``timeout_s``: how long to wait for Redis and for room, from ``started`` on. ``packed``: the call as it was sent
        before, in vain or with its reply lost. Raises ``QueueFull``, ``BrokerOutOfMemory``, ``BrokerUnavailable``.
        """
        if started is None:
            started = mono_s()
        waiting: Waiting | None = None
        while True:
            try:
                target = self.target(call.queue, call.shard)
                if packed is None or call.dedupe is not None:
                    # One page per call: the repetition must look where the first try may have left the id.
                    packed = call.pack(target)
                answer = self._call(target, packed, call.queue)
                # An entry id, 1, or STORED_ALREADY, which for a produce id is the answer to a repeated call.
                if type(answer) is bytes or answer == 1:
                    return True
                if answer == Code.STORED_ALREADY:
                    return call.dedupe is None
                error = self.refusal(call.queue, call.shard, answer)
                if error is None:
                    if type(answer) is int:
                        packed = None
                    continue
            except (BrokerUnavailable, QueueFull) as exc:
                error = exc
                call.repeated = True
                self.look_again(call.queue)
            if waiting is None:
                waiting = self.waiting(timeout_s, started)
            time.sleep(waiting.pause(error))

    def look_again(self, queue: Queue) -> None:
        """After an error: on a Cluster a shard may be at another server now. What was sent in vain stays as it is."""
        if queue.broker.is_cluster:
            self._targets.clear()

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

    def refusal(self, queue: Queue, shard: int | str, answer: Any) -> StreamTaskError | None:
        """What a script's refusal means: an error that may pass, or None where the cause is mended already."""
        if isinstance(answer, list) and answer[0] == Code.SEEN_LAYOUT:
            self.target(queue, shard).layout = answer[1].decode()
            return None
        if answer == Code.NO_STATE:
            # Never opened, or flushed: open it and go on.
            queue.forget()
            self._targets.pop((queue, shard), None)
            queue.shape()
            return None
        where = "the shared stream" if shard == SHARED else f"shard {shard}"
        if answer == Code.FULL:
            return QueueFull(
                f"{where} of queue {queue.name!r} holds {self.settings.max_backlog} messages, its max_backlog: start "
                "more workers, raise max_backlog, or remove a consumer group that nobody serves ('streamtask doctor')"
            )
        if answer == Code.IDS_FULL:
            return QueueFull(
                f"{where} of queue {queue.name!r} remembers {self.settings.max_dedupe_ids} dedupe ids, the most that "
                "max_dedupe_ids allows: raise it, or shorten dedupe_ttl"
            )
        if answer == Code.SEALED:
            queue.forget()
            self._targets.pop((queue, shard), None)
            return BrokerUnavailable(
                f"{where} of queue {queue.name!r} is being resharded; the call was repeated in vain"
            )
        raise ReplyError(f"unexpected answer of a produce script: {answer!r}")

    def send_many(self, queue: Queue, messages: Sequence[tuple[int | str, bytes]], timeout_s: float | None) -> None:
        """Stores messages ``(shard, envelope)``; within a shard in their order.

        One script call for some hundreds of messages of one shard, one call in flight per shard. Raises
        ``BulkSendError`` saying which are stored.
        """
        shards: dict[int | str, list[int]] = {}
        for index, (shard, _) in enumerate(messages):
            shards.setdefault(shard, []).append(index)
        runs = {shard: deque(_batches(messages, indexes)) for shard, indexes in shards.items()}
        Bulk(self, queue, messages, runs, self.waiting(timeout_s, mono_s())).run()

    def _call(self, target: Target, packed: bytes, queue: Queue) -> Any:
        links = target.links
        try:
            link = links.pop()
        except IndexError:
            link = queue.broker.link(target.keys.stream)
        try:
            answer = link.call(packed)
        except BaseException as exc:
            if isinstance(exc, REPLIES):
                links.append(link)
            else:
                # It may still owe an answer, which its next user must not read; on a Cluster it may be another node's.
                link.close()
            raise
        links.append(link)
        return answer

    def take_link(self, node: str, queue: Queue, key: str) -> Link:
        try:
            return self._idle[node].pop()
        except (KeyError, IndexError):
            return queue.broker.link(key)

    def give_link(self, node: str, link: Link) -> None:
        self._idle.setdefault(node, []).append(link)

    def close(self) -> None:
        idle, self._idle = self._idle, {}
        self._targets = {}
        for links in idle.values():
            for link in links:
                link.close()


def _batches(messages: Sequence[tuple[int | str, bytes]], indexes: list[int]) -> Iterator[list[int]]:
    """The messages of one shard, in parts that one script call takes."""
    for start in range(0, len(indexes), BATCH):
        batch = indexes[start : start + BATCH]
        if sum(len(messages[index][1]) for index in batch) <= BATCH_BYTES:
            yield batch
            continue
        part: list[int] = []
        size = 0
        for index in batch:
            if part and size + len(messages[index][1]) > BATCH_BYTES:
                yield part
                part, size = [], 0
            part.append(index)
            size += len(messages[index][1])
        yield part


class Bulk:
    """One ``send_many`` under way."""

    def __init__(
        self,
        producer: Producer,
        queue: Queue,
        messages: Sequence[tuple[int | str, bytes]],
        runs: dict[int | str, deque[list[int]]],
        waiting: Waiting,
    ) -> None:
        self.producer = producer
        self.queue = queue
        self.messages = messages
        self.runs = runs
        self.waiting = waiting
        self.stored: list[int] = []
        self.unknown: set[int] = set()
        self.prepared: dict[int | str, tuple[list[int], bytes]] = {}  # what is sent, or was in vain
        self._upcoming: dict[int | str, tuple[list[int], bytes]] = {}

    def _prepare(self, shard: int | str, batch: list[int]) -> tuple[list[int], bytes]:
        target = self.producer.target(self.queue, shard)
        return batch, target.pack_many([self.messages[index][1] for index in batch])

    def run(self) -> None:
        while self.runs:
            errors: list[StreamTaskError] = []
            try:
                for node, shards in self._by_node().items():
                    errors += self._round(node, shards)
            except (BrokerUnavailable, QueueFull) as exc:
                if isinstance(exc, ConfigError) and not (self.stored or self.unknown):
                    raise
                errors.append(exc)
                self.producer.look_again(self.queue)
            except ReplyError as exc:
                if not (self.stored or self.unknown):
                    raise
                self._fail(exc)
            if errors:
                try:
                    time.sleep(self.waiting.pause(errors[0]))
                except StreamTaskError as exc:
                    self._fail(exc)
            self.runs = {shard: batches for shard, batches in self.runs.items() if batches}

    def _by_node(self) -> dict[str, list[int | str]]:
        nodes: dict[str, list[int | str]] = {}
        for shard in self.runs:
            nodes.setdefault(self.producer.target(self.queue, shard).node, []).append(shard)
        return nodes

    def _round(self, node: str, shards: list[int | str]) -> list[StreamTaskError]:
        """One batch of each shard in one write; one call in flight per shard keeps the order."""
        packed = []
        for shard in shards:
            if shard not in self.prepared:
                batch = self.runs[shard][0]
                upcoming = self._upcoming.pop(shard, None)
                # After a refusal the batch before it comes first, or what is left of that.
                usable = upcoming is not None and upcoming[0] is batch
                self.prepared[shard] = upcoming if usable else self._prepare(shard, batch)  # type: ignore[assignment]
            packed.append(self.prepared[shard][1])
        key = self.producer.target(self.queue, shards[0]).keys.stream
        link = self.producer.take_link(node, self.queue, key)
        try:
            link.send(b"".join(packed))
            for shard in shards:
                # While Redis is at work.
                if len(self.runs[shard]) > 1 and shard not in self._upcoming:
                    self._upcoming[shard] = self._prepare(shard, self.runs[shard][1])
            answers = link.answers(packed)
        except BaseException as exc:
            link.close()  # what it still has to say is nobody's
            if isinstance(exc, BrokerUnavailable) and not isinstance(exc, ConfigError):
                for shard in shards:
                    self.unknown.update(self.prepared[shard][0])
            raise
        self.producer.give_link(node, link)
        errors: list[StreamTaskError] = []
        fatal: StreamTaskError | None = None
        for shard, answer in zip(shards, answers, strict=True):
            batch, _ = self.prepared.pop(shard)
            self.unknown.difference_update(batch)
            if isinstance(answer, int) and answer > 0:
                self.stored += batch[:answer]
                if answer < len(batch):
                    # The shard had room for a part: the rest is a batch of its own.
                    self.runs[shard][0] = batch[answer:]
                else:
                    self.runs[shard].popleft()
            elif isinstance(answer, QueueFull):
                errors.append(answer)
            elif isinstance(answer, ConfigError | ReplyError):
                fatal = fatal or answer
            else:
                try:
                    error = self.producer.refusal(self.queue, shard, answer)
                except (BrokerUnavailable, QueueFull) as exc:
                    error = exc
                except StreamTaskError as exc:
                    fatal, error = fatal or exc, None
                if error is not None:
                    errors.append(error)
                # What is wrong may be the epoch: nothing that was prepared is right then.
                self._upcoming.pop(shard, None)
        # Only now: what the other shards have answered is stored, whatever one of them said.
        if fatal is not None:
            self._fail(fatal)
        return errors

    def _fail(self, cause: StreamTaskError) -> None:
        left = sorted(index for batches in self.runs.values() for batch in batches for index in batch)
        raise BulkSendError(
            f"{len(self.stored)} of {len(self.messages)} messages are stored, then: {cause}. "
            "The error's 'stored', 'failed' and 'unknown' have the positions",
            stored=sorted(self.stored),
            failed=[index for index in left if index not in self.unknown],
            unknown=sorted(self.unknown),
        ) from cause
