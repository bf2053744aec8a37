"""``send_many``: batches of messages, one script call each, with at most one in flight for each shard.

A batch has a produce id of its own. One whose reply was lost is repeated as it is, before anything later of its shard.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..clock import mono_s
from ..errors import AccessRefused, BrokerUnavailable, BulkSendError, QueueFull, ReplyError, StreamTaskError
from ..redis.scripts import Code
from ..text import counted
from .calls import Waiting, window_s
from .producer import Producer
from .queues import Queue

BATCH = 250
"""Messages of one shard that one script call appends."""

BATCH_BYTES = 1 << 20


def send_many(
    producer: Producer, queue: Queue, messages: Sequence[tuple[int | str, bytes]], timeout_s: float | None
) -> None:
    """Stores messages ``(shard, envelope)``; within a shard in their order.

    One script call for some hundreds of messages of one shard, one call in flight per shard. Raises
    ``BulkSendError`` saying which are stored.
    """
    Bulk(producer, queue, messages, producer.waiting(timeout_s, mono_s())).run()


def batches(messages: Sequence[tuple[int | str, bytes]]) -> dict[int | str, deque[list[int]]]:
    """The positions of the messages of each shard, in parts that one script call takes."""
    shards: dict[int | str, list[int]] = {}
    for index, (shard, _) in enumerate(messages):
        shards.setdefault(shard, []).append(index)
    return {shard: deque(_batches(messages, indexes)) for shard, indexes in shards.items()}


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
        waiting: Waiting,
    ) -> None:
        self.producer = producer
        self.queue = queue
        self.messages = messages
        self.runs = batches(messages)
        self.waiting = waiting
        self.stored: list[int] = []
        self.unknown: set[int] = set()
        self.sent_at: dict[int | str, float] = {}
        """Of the shards whose batch is in doubt: since when."""
        self._repeated: set[int | str] = set()  # those of which a try may have stored it, or may still do so
        self._ttl_ms = producer.settings.produce_ttl_ms
        self._window_s = window_s(self._ttl_ms, queue.broker.timeout_s)
        self.prepared: dict[int | str, tuple[list[int], bytes]] = {}  # what is sent, or was in vain
        self._upcoming: dict[int | str, tuple[list[int], bytes]] = {}

    def _prepare(self, shard: int | str, batch: list[int]) -> tuple[list[int], bytes]:
        target = self.producer.target(self.queue, shard)
        return batch, target.pack_many([self.messages[index][1] for index in batch])

    def run(self) -> None:
        while self.runs:
            errors: list[StreamTaskError] = []
            try:
                for shards in self._by_node().values():
                    errors += self._round(shards)
            except (BrokerUnavailable, QueueFull) as exc:
                if isinstance(exc, AccessRefused) and not (self.stored or self.unknown):
                    raise
                errors.append(exc)
                self.producer.look_again(self.queue)
            except ReplyError as exc:
                if not (self.stored or self.unknown):
                    raise self.queue.named(exc) from None
                self._fail(exc)
            if errors:
                try:
                    time.sleep(
                        self.waiting.pause(errors[0], self._until(self.runs), self.producer.window(self._ttl_ms))
                    )
                except StreamTaskError as exc:
                    self._fail(exc)
            self.runs = {shard: batches for shard, batches in self.runs.items() if batches}

    def _by_node(self) -> dict[str, list[int | str]]:
        nodes: dict[str, list[int | str]] = {}
        for shard in self.runs:
            nodes.setdefault(self.producer.target(self.queue, shard).node, []).append(shard)
        return nodes

    def _round(self, shards: list[int | str]) -> list[StreamTaskError]:
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
        tried_at = mono_s()
        try:
            answers = self.producer.exchange(key, packed, self._until(shards), lambda: self._prepare_next(shards))
        except BrokerUnavailable as exc:
            if exc.in_doubt and not isinstance(exc, AccessRefused):
                for shard in shards:
                    self.unknown.update(self.prepared[shard][0])
                    self.sent_at.setdefault(shard, tried_at)
                    self._repeated.add(shard)
            raise
        errors: list[StreamTaskError] = []
        fatal: StreamTaskError | None = None
        for shard, answer in zip(shards, answers, strict=True):
            try:
                error = self._answered(shard, answer)
            except (BrokerUnavailable, QueueFull) as exc:
                error = exc
            except StreamTaskError as exc:
                fatal, error = fatal or exc, None
            if error is not None:
                errors.append(error)
        # Only now: what the other shards have answered is stored, whatever one of them said.
        if fatal is not None:
            self._fail(fatal)
        return errors

    def _prepare_next(self, shards: list[int | str]) -> None:
        for shard in shards:
            if len(self.runs[shard]) > 1 and shard not in self._upcoming:
                self._upcoming[shard] = self._prepare(shard, self.runs[shard][1])

    def _answered(self, shard: int | str, answer: Any) -> StreamTaskError | None:
        """Takes the answer to a shard's batch: returns an error that may pass, or raises one: what was in doubt still is."""
        stored, refusal = self.producer.target(self.queue, shard).read(answer, shard in self._repeated)
        batch, _ = self.prepared[shard]
        self.sent_at.pop(shard, None)
        self.unknown.difference_update(batch)
        if refusal in (Code.MORE_DUE, Code.FULL):
            # It keeps its id: a try that had no answer may still be on its way.
            return self.producer.refusal(self.queue, shard, refusal)
        del self.prepared[shard]
        self._repeated.discard(shard)
        if refusal is None:
            self.stored += batch[:stored]
            if stored < len(batch):
                # The shard had room for a part: the rest is a batch of its own.
                self.runs[shard][0] = batch[stored:]
            else:
                self.runs[shard].popleft()
            return None
        # What is wrong may be the epoch, or the ids: nothing that was prepared is right then.
        self._upcoming.pop(shard, None)
        return self.producer.refusal(self.queue, shard, refusal)

    def _until(self, shards: Iterable[int | str]) -> float | None:
        """When the first of these shards that are in doubt may be repeated no more."""
        first = min((self.sent_at[shard] for shard in shards if shard in self.sent_at), default=None)
        return None if first is None else first + self._window_s

    def _fail(self, cause: StreamTaskError) -> None:
        cause = self.queue.named(cause) if isinstance(cause, ReplyError) else cause
        left = sorted(index for batches in self.runs.values() for batch in batches for index in batch)
        raise BulkSendError(
            f"{len(self.stored)} of {counted(len(self.messages), 'message')} stored, then: {cause}. "
            "The error's 'stored', 'failed' and 'unknown' have the positions",
            stored=sorted(self.stored),
            failed=[index for index in left if index not in self.unknown],
            unknown=sorted(self.unknown),
        ) from cause
