"""Asking Redis for an operator: what goes to which server, what an error says, and which queues an app has.

Reading declares nothing and writes nothing. What belongs together goes out in one write per server.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..app import StreamTask
from ..errors import BrokerOutOfMemory, ConfigError, ReplyError, StreamTaskError
from ..redis import commands
from ..redis.keys import SHARED, QueueKeys, Shape, ShardKeys, app_queues, lease_times
from ..redis.link import Link
from ..redis.links import Links
from ..redis.misplaced import WRONGTYPE, misplaced

Row = dict[str, Any]

PIPELINE = 2000
"""Commands that are sent in one write."""

MOST_KEYS = 20
"""Keys of a wrong type that are named."""


@dataclass(slots=True)
class RecordedQueue:
    """A queue that Redis has recorded. ``groups``: the registered ones, the app's own first. ``priorities``: those beside 0
    that have a shared stream of their own (queues of the kombu transport)."""

    keys: QueueKeys
    shape: Shape
    groups: list[str]
    priorities: list[int]
    cluster: bool

    @property
    def name(self) -> str:
        return self.keys.queue

    def shards(self) -> list[int | str]:
        """All its streams: one for each shard, then the shared ones."""
        return [*range(self.shape.shards), SHARED, *(f"{SHARED}.{priority}" for priority in self.priorities)]

    def shard(self, shard: int | str) -> ShardKeys:
        return self.keys.shard(self.shape.epoch, shard)

    def alive(self, group: str, shard: int | str) -> str:
        """See ``QueueKeys.alive``."""
        return self.keys.alive(group, self.shard(shard), cluster=self.cluster)


class Reader:
    """Asks the servers of an app; used by one thread, and closed after use."""

    def __init__(self, app: StreamTask) -> None:
        self.app = app
        self.links = Links(app.broker, app.broker.timeout_s)
        self.registry = app_queues(app.settings.namespace, app.name)
        """The key of the set that names the app's queues."""

    # Asking Redis

    def ask(self, calls: Sequence[tuple[str, bytes]]) -> list[Any]:
        """The replies to packed commands, each with a key that says which server it is for."""
        with self.naming_keys():
            return [replies[0] for replies in self._send([(key, [packed]) for key, packed in calls])]

    def ask_quietly(self, calls: Sequence[tuple[str, bytes]]) -> list[Any]:
        """The same, but errors of single commands, as of a stream that is not there, stay in the list."""
        return [replies[0] for replies in self._send([(key, [packed]) for key, packed in calls], raising=False)]

    def ask_at_once(self, blocks: Sequence[tuple[str, list[bytes]]]) -> list[list[Any]]:
        """The replies to blocks of commands, each block of one slot and in one transaction. Errors of single commands stay
        in the lists."""
        in_transactions = [(key, [commands.MULTI, *block, commands.EXEC]) for key, block in blocks]
        try:
            return [replies[-1] for replies in self._send(in_transactions)]
        except BrokerOutOfMemory:
            # Above maxmemory, Redis before 8 refuses whatever is queued in a transaction.
            return self._send(blocks, raising=False)

    def _send(self, blocks: Sequence[tuple[str, list[bytes]]], raising: bool = True) -> list[list[Any]]:
        by_link: dict[Link, list[int]] = {}
        for index, (key, _) in enumerate(blocks):
            by_link.setdefault(self.links.at(key), []).append(index)
        answers: list[list[Any]] = [[] for _ in blocks]
        for link, indexes in by_link.items():
            for chunk in _chunks(indexes, [len(blocks[i][1]) for i in indexes]):
                replies = iter(_pipeline(link, [packed for i in chunk for packed in blocks[i][1]]))
                for i in chunk:
                    answers[i] = [next(replies) for _ in blocks[i][1]]
                    if raising:
                        for reply in answers[i]:
                            raised(reply, blocks[i][0])
        return answers

    # Queues

    def queues(self) -> list[str]:
        """The names of the queues that Redis has recorded for this app, ``default`` first."""
        names = [as_text(name) for name in self.ask([(self.registry, commands.members(self.registry))])[0]]
        return sorted(names, key=lambda name: (name != "default", name))

    def recorded(self, names: Sequence[str]) -> list[RecordedQueue]:
        """What is recorded of each queue; queues that are not recorded are left out."""
        settings = self.app.settings
        keys = [QueueKeys(settings.namespace, self.app.name, name) for name in names]
        found = []
        for one, reply in zip(keys, self.ask([(one.meta, commands.all_fields(one.meta)) for one in keys]), strict=True):
            meta = as_texts(reply)
            if "epoch" in meta:
                groups = sorted(field[6:] for field in meta if field.startswith("group:"))
                groups.sort(key=lambda group: group != settings.group)
                priorities = sorted(int(field[9:]) for field in meta if field.startswith("priority:"))
                shape = Shape(int(meta.get("shards", 0)), int(meta["epoch"]))
                found.append(RecordedQueue(one, shape, groups, priorities, self.app.broker.is_cluster))
        return found

    def asked(self, queue: str | None) -> list[RecordedQueue]:
        """The queue of that name, or all. Raises ``StreamTaskError`` for one that is not recorded."""
        if queue is None:
            return self.recorded(self.queues())
        found = self.recorded([queue])
        if not found:
            known = self.queues()
            raise StreamTaskError(
                f"app {self.app.name!r} has no queue {queue!r} in Redis: "
                + (f"there {'are' if len(known) > 1 else 'is'} {', '.join(known)}" if known else "it has none yet")
                + ". A queue is recorded when its first message is sent or its first worker starts"
            )
        return found

    # Keys of a wrong type

    def wrong_keys(self) -> tuple[str, list[str]]:
        """What is to be said of keys that are there with another type, '' where there is none; and the names of the queues,
        where they can be read."""
        app = self.app
        at_fault = self._misplaced([self.registry])
        names = [] if at_fault else self.queues()
        metas = {name: QueueKeys(app.settings.namespace, app.name, name).meta for name in names}
        at_fault += self._misplaced(list(metas.values()))
        sound = [name for name in names if not self._misplaced([metas[name]])] if at_fault else names
        for queue in self.recorded(sound):
            for group in queue.groups or [app.settings.group]:
                asked = [
                    *queue.keys.all(group)[1:],
                    *(key for shard in queue.shards() for key in queue.shard(shard).all(group)),
                ]
                alive = queue.alive(group, SHARED)
                at_fault += self._misplaced([*asked, alive, lease_times(alive)])
        return "; ".join(dict.fromkeys(at_fault[:MOST_KEYS])), names

    def _misplaced(self, keys: Sequence[str]) -> list[str]:
        return list(misplaced(keys, self.ask_quietly).values())

    @contextmanager
    def naming_keys(self) -> Iterator[None]:
        """Says which keys are of a wrong type, where one is: Redis' error says no more than that."""
        try:
            yield
        except ReplyError as exc:
            wrong = self.wrong_keys()[0] if exc.code == WRONGTYPE else ""
            if not wrong:
                raise
            raise ReplyError(f"{wrong} (remove or rename it): {exc}", exc.code) from None


def _pipeline(link: Link, packed: list[bytes]) -> list[Any]:
    try:
        return link.pipeline(packed)
    except BaseException:
        link.close()  # a reply may be under way, and must not answer the next question
        raise


def _chunks(items: list[int], sizes: list[int]) -> Iterator[list[int]]:
    chunk: list[int] = []
    held = 0
    for item, size in zip(items, sizes, strict=True):
        if chunk and held + size > PIPELINE:
            yield chunk
            chunk, held = [], 0
        chunk.append(item)
        held += size
    if chunk:
        yield chunk


# Replies


def raised(reply: Any, key: str) -> Any:
    """A reply, where an error is to raise; of one that is of a key alone Redis does not say which key that is."""
    if isinstance(reply, ReplyError) and not isinstance(reply, ConfigError):
        raise ReplyError(f"{reply} (a call for {key})", reply.code)
    if isinstance(reply, Exception):
        raise reply
    return reply


def as_text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


def as_texts(flat: Any) -> dict[str, str]:
    """A flat list of names and values as a dict of texts; numbers become text too."""
    texts = [as_text(one) if isinstance(one, bytes) else str(one) for one in flat]
    return dict(zip(texts[::2], texts[1::2], strict=False))


def as_object(text: str) -> Row:
    """A JSON object; an empty one for what is none: whoever may write there may have written anything."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
