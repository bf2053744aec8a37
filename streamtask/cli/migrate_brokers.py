"""Moving messages between kombu's redis transport and ours, for ``streamtask migrate``.

It talks to both brokers through kombu, so that every broker URL that Celery
takes will do; of kombu's redis transport it knows the keys, which have been the same for many years:

- a list for each queue, and one more for each priority step above 0 (``celery``, ``celery\\x06\\x163``, ...), written at
  its left end and read at its right end;
- the hash ``unacked`` and the sorted set ``unacked_index``: what workers hold, as ``[message, exchange, routing key]``;
- a set ``_kombu.binding.EXCHANGE`` for each exchange, whose members name the bound queues.

How no message is lost, whatever dies when: a message is moved, in one step, from its list to a list of ours beside it
(*aside*), is stored in the new broker, and only then removed. What a run that died has left aside is what the next run
begins with, and only the first of that may be in the new broker already: it is sent with the id of its first time.
"""

from __future__ import annotations

import base64
import importlib
import os
import re
import socket
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from ..errors import BrokerUnavailable, ConfigError, QueueFull, StreamTaskError
from ..queue.seen import PAGE
from ..redis.connection import safe_url

OWN = "_streamtask.migrate"
"""How the keys begin that a migration makes in a database of kombu's redis transport."""

BATCH = 100
"""Messages that are set aside in one round trip."""

LOCK_MS = 15_000
RETRY_S = 10.0
WAIT_S = 15.0
"""How long a queue of streams is waited for that holds messages and gives none: longer than a lease."""
MARKS = 64
MARKS_S = 86_400
PRIORITIES = range(10)
NOT_THE_APPS = re.compile(r"(^|\.)celery\.pidbox$|^celeryev(\.|$)")
"""Queues of remote control and events: what lies there is about processes that are gone."""


class NotMoved(Exception):
    """One message can't be moved; it stays where it is. The text says why."""


class Outcome:
    """What was done, for the report."""

    def __init__(self) -> None:
        self.moved: dict[str, Counter[int]] = defaultdict(Counter)
        self.restored: Counter[str] = Counter()
        self.held: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self.not_moved: list[dict[str, Any]] = []
        self.maybe_twice: list[dict[str, Any]] = []
        self.skipped: list[str] = []

    def as_json(self) -> dict[str, Any]:
        return {
            "moved": {queue: sum(counts.values()) for queue, counts in self.moved.items()},
            "priorities": {queue: dict(sorted(counts.items())) for queue, counts in self.moved.items()},
            "restored": dict(self.restored),
            "held": dict(self.held),
            "left": dict(self.left),
            "not_moved": self.not_moved,
            "maybe_twice": self.maybe_twice,
            "skipped": self.skipped,
        }


# --- brokers


class Broker:
    """One of the two brokers; ``OldRedis`` and ``Streams`` know how messages lie there."""

    def __init__(self, url: str, options: dict[str, Any], connection: Any) -> None:
        self.url = safe_url(url)
        self.options = options
        self.connection = connection
        self.channel = connection.channel()
        self.keep_alive: Callable[[], None] = lambda: None
        """Called while something is waited for."""
        self.lost = _lost(connection)
        self.refused: tuple[type[Exception], ...] = tuple(connection.channel_errors)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turns kombu's and redis-py's errors inside the block into ours."""
        try:
            yield
        except StreamTaskError:
            raise
        except self.lost as exc:
            raise BrokerUnavailable(
                f"the connection to {self.url} was lost: {exc}. Run the command again: it goes on"
            ) from None
        except self.refused as exc:
            raise StreamTaskError(f"{self.url} refuses what was asked of it: {exc}") from None

    def reconnect(self) -> None:
        with suppress(Exception):
            self.connection.collapse()
        self.connection.connect()
        self.channel = self.connection.channel()

    def is_target_of(self, other: Broker) -> bool:
        """Whether both are the same place, under whatever names."""
        return False

    def count(self, names: list[str], outcome: Outcome) -> None:
        raise NotImplementedError

    def move(self, names: list[str], unacked: bool, target: Broker, outcome: Outcome) -> None:
        raise NotImplementedError

    def store(self, queue: str, payload: dict[str, Any], raw: bytes, identity: str | None) -> None:
        """Stores one message, and returns when it is stored. ``identity``: of this message, the same in every try.

        Raises ``NotMoved`` where the broker will never take it, ``BrokerUnavailable`` where that is not known.
        """
        end = time.monotonic() + RETRY_S
        again = False
        while True:
            try:
                if again:
                    self.reconnect()
                if not (again and self.has(identity)):
                    self.put(queue, payload, raw, identity)
                return
            except self.lost as exc:
                if time.monotonic() >= end:
                    raise BrokerUnavailable(
                        f"{self.url} did not answer for {RETRY_S:g} s: {exc}. Run the command again: it goes on"
                    ) from None
                again = True
                self.keep_alive()
                time.sleep(0.2)
            except self.refused as exc:
                raise StreamTaskError(f"{self.url} refuses the message: {exc}") from None

    def put(self, queue: str, payload: dict[str, Any], raw: bytes, identity: str | None) -> None:
        raise NotImplementedError

    def has(self, identity: str | None) -> bool:
        """Whether a message of that identity was stored here lately, where this can be known."""
        return False

    remembers = False
    """Whether ``put`` recognises a message of a run before, however long ago that was (up to a day)."""

    def close(self) -> None:
        with suppress(Exception):
            self.connection.release()


class OldRedis(Broker):
    """kombu's redis transport. Keys get their prefix here: kombu's own client knows it for a part of the commands."""

    remembers = True

    def __init__(self, url: str, options: dict[str, Any], connection: Any) -> None:
        super().__init__(url, options, connection)
        self.prefix: str = options.get("global_keyprefix", "")
        self.sep: str = self.channel.sep
        self.token = b""
        self.lock_key = f"{self.prefix}{OWN}.lock"
        self.batches_key = f"{self.prefix}{OWN}.batches"
        self.marks_key = f"{self.prefix}{OWN}.stored"
        self.unacked_key = self.prefix + self.channel.unacked_key
        self.index_key = self.prefix + self.channel.unacked_index_key
        self.marks: set[str] | None = None
        self.locked = False

    @property
    def client(self) -> Any:
        return self.channel.client

    def key(self, queue: str, priority: int) -> str:
        return f"{self.prefix}{queue}{self.sep}{priority}" if priority else f"{self.prefix}{queue}"

    def aside(self, key: str, what: str = "aside") -> str:
        return f"{self.prefix}{OWN}.{what}.{key[len(self.prefix) :]}"

    def is_target_of(self, other: Broker) -> bool:
        if not isinstance(other, OldRedis) or self.prefix != other.prefix:
            return False
        probe = f"{self.prefix}{OWN}.probe.{uuid.uuid4().hex}"
        self.client.set(probe, 1, px=10_000)
        try:
            return bool(other.client.exists(probe))
        finally:
            self.client.delete(probe)

    def lock(self) -> None:
        """One migration at a time: two would send twice what one of them has set aside."""
        where = f"({socket.gethostname()}, pid {os.getpid()})"
        self.token = f"{uuid.uuid4().hex} {self.client.client_id()} {where}".encode()
        end = time.monotonic() + LOCK_MS / 1000 + 1
        waited = False
        while not self.client.set(self.lock_key, self.token, nx=True, px=LOCK_MS):
            token = self.client.get(self.lock_key) or b""
            if self.unlocked(token):
                continue
            holder = token.decode(errors="replace").partition(" ")[2].partition(" ")[2]
            if time.monotonic() > end:
                raise StreamTaskError(f"another migration is under way {holder}: wait for its end")
            if not waited:
                click.echo(f"another migration is under way, or has died {holder}: waiting", err=True)
                waited = True
            time.sleep(0.1)
        self.locked = True
        self.keep_alive = self.renew

    def unlocked(self, token: bytes) -> bool:
        """Frees the lock of a migration whose connection Redis has seen end. Else its lock must expire."""
        parts = token.split(b" ")
        try:
            if len(parts) < 2 or self.client.execute_command("CLIENT", "LIST", "ID", parts[1]):
                return not token
        except self.refused:
            return False  # an old server, or a user who may not ask that
        self.if_locked_by(token, lambda pipe: pipe.delete(self.lock_key))
        return True

    def renew(self) -> None:
        with suppress(*self.lost):
            self.client.pexpire(self.lock_key, LOCK_MS)

    def close(self) -> None:
        if self.locked:
            with suppress(Exception):
                self.guarded(lambda pipe: pipe.delete(self.lock_key))
        super().close()

    def guarded(self, commands: Callable[[Any], Any]) -> None:
        """Runs the commands in one transaction, if the lock is still ours."""
        if not self.if_locked_by(self.token, commands):
            raise StreamTaskError(
                "this migration was paused or cut off for so long that it lost its lock: run it again"
            )

    def if_locked_by(self, token: bytes, commands: Callable[[Any], Any]) -> bool:
        def checked(pipe: Any) -> bool:
            ours = pipe.get(self.lock_key) == token
            pipe.multi()
            if ours:
                commands(pipe)
            return bool(ours)

        return bool(self.client.transaction(checked, self.lock_key, value_from_callable=True))

    # --- as the source

    def find(self, names: list[str], outcome: Outcome) -> list[str]:
        """The queues to move: those named, else all that are bound to an exchange or hold messages."""
        if names:
            return list(dict.fromkeys(names))
        tables = self.bindings()
        found = {queue for table in tables.values() for _, _, queue in table}
        for key in self.client.scan_iter(match=_literal(self.prefix) + "*", count=1000):
            name = key.decode(errors="surrogateescape")[len(self.prefix) :]
            own = name.startswith((f"{OWN}.aside.", f"{OWN}.junk."))
            if own:
                name = name[len(OWN) + 1 :].partition(".")[2]
            elif name.startswith(OWN) or self.client.type(key) != b"list":
                continue
            queue, separator, step = name.rpartition(self.sep)
            if not (separator and step.isdigit()):
                queue = name
            if own or any(_is_message(self.client.lindex(key, end)) for end in (-1, 0)):
                found.add(queue)
        for raw in self.client.hvals(self.unacked_key):
            with suppress(NotMoved):
                found.update(_held(raw, tables)[1])
        outcome.skipped = sorted(queue for queue in found if NOT_THE_APPS.search(queue))
        return sorted(found - set(outcome.skipped))

    def bindings(self) -> dict[str, list[tuple[str, str, str]]]:
        """(routing key, pattern, queue) by exchange."""
        start = f"{self.prefix}_kombu.binding."
        tables = {}
        for key in self.client.scan_iter(match=_literal(start) + "*", count=1000):
            members = [member.decode().split(self.sep) for member in self.client.smembers(key)]
            exchange = key.decode()[len(start) :]
            tables[exchange] = [(parts[0], parts[1], parts[2]) for parts in members if len(parts) == 3]
        return tables

    def count(self, names: list[str], outcome: Outcome) -> None:
        queues = self.find(names, outcome)
        for queue in queues:
            for priority in PRIORITIES:
                key = self.key(queue, priority)
                lists = (key, self.aside(key), self.aside(key, "junk"))
                if number := sum(self.client.llen(one) for one in lists):
                    outcome.moved[queue][priority] += number
        self.look_at_unacked(queues, outcome, restore=False)

    def move(self, names: list[str], unacked: bool, target: Broker, outcome: Outcome) -> None:
        self.lock()
        target.keep_alive = self.renew
        queues = self.find(names, outcome)
        self.look_at_unacked(queues, outcome, restore=unacked)
        for queue in queues:
            for priority in PRIORITIES:
                try:
                    self.move_list(queue, priority, target, outcome)
                finally:
                    with suppress(*self.lost):
                        self.put_junk_back(self.key(queue, priority))

    def move_list(self, queue: str, priority: int, target: Broker, outcome: Outcome) -> None:
        key = self.key(queue, priority)
        sent_before = bool(self.client.llen(self.aside(key)))
        while batch := self.set_aside(key):
            sent = False
            try:
                for identity, raw in batch:
                    try:
                        payload = _payload(raw)
                        sent = True
                        target.store(queue, payload, raw, identity)
                    except NotMoved as exc:
                        outcome.not_moved.append({"queue": queue, "why": str(exc), **_named(raw)})
                        self.remove(key, raw, junk=True)
                    else:
                        if sent_before and not target.remembers:
                            outcome.maybe_twice.append({"queue": queue, **_named(raw)})
                        self.remove(key, raw)
                        outcome.moved[queue][priority] += 1
                    sent = sent_before = False
            except BaseException:
                # What has not been sent goes back where workers find it. What may have been sent stays aside, so that
                # the next run sends it under the same id.
                with suppress(*self.lost):
                    self.put_back(key, keep_oldest=sent)
                raise

    def set_aside(self, key: str) -> list[tuple[str, bytes]]:
        """What a run before left aside, else the next messages: (identity, message), the oldest first."""
        aside = self.aside(key)
        raws = self.client.lrange(aside, 0, -1)[::-1]
        if not raws:

            def commands(pipe: Any) -> None:
                pipe.hset(self.batches_key, key, f"{uuid.uuid4().hex}:0")
                for _ in range(BATCH):
                    pipe.rpoplpush(key, aside)
                pipe.pexpire(self.lock_key, LOCK_MS)

            # Not the answers: where the list and its aside are read, both orders are as they lie there.
            self.guarded(commands)
            raws = self.client.lrange(aside, 0, -1)[::-1]
        if not raws:
            self.guarded(lambda pipe: pipe.hdel(self.batches_key, key))
            return []
        batch, _, first = (self.client.hget(self.batches_key, key) or b"").decode().partition(":")
        # Numbered from the newest end, which does not change while they are removed from the other one.
        numbers = range(int(first or 0) + len(raws) - 1, -1, -1)
        space = batch or uuid.uuid4().hex
        return [(f"{space} {number}", raw) for number, raw in zip(numbers, raws, strict=False)]

    def remove(self, key: str, raw: bytes, junk: bool = False) -> None:
        with self.client.pipeline() as pipe:
            pipe.lrem(self.aside(key), -1, raw)
            if junk:
                pipe.lpush(self.aside(key, "junk"), raw)
            pipe.pexpire(self.lock_key, LOCK_MS)
            pipe.execute()

    def put_back(self, key: str, keep_oldest: bool) -> None:
        aside = self.aside(key)
        raws = self.client.lrange(aside, 0, -1)
        batch, _, first = (self.client.hget(self.batches_key, key) or b"").decode().partition(":")
        back = raws[:-1] if keep_oldest else raws

        def commands(pipe: Any) -> None:
            if back:
                pipe.rpush(key, *back)
            pipe.ltrim(aside, len(back), -1)
            pipe.hset(self.batches_key, key, f"{batch}:{int(first or 0) + len(back)}")

        self.guarded(commands)

    def put_junk_back(self, key: str) -> None:
        junk = self.aside(key, "junk")
        raws = self.client.lrange(junk, 0, -1)
        if raws:
            self.guarded(lambda pipe: pipe.rpush(key, *raws).delete(junk))

    def look_at_unacked(self, queues: list[str], outcome: Outcome, *, restore: bool) -> None:
        """Counts what workers hold, or puts it back at the head of its lists, marked as redelivered.

        The newest is put back first, so that the oldest is the next to be read.
        """
        tables = self.bindings()
        scores = dict(self.client.zrange(self.index_key, 0, -1, withscores=True))
        tags = sorted(self.client.hkeys(self.unacked_key), key=lambda tag: scores.get(tag, 0.0), reverse=True)
        if restore and tags:
            self.warn_of_workers()
        for tag in tags:
            raw = self.client.hget(self.unacked_key, tag)
            if raw is None:
                continue  # acknowledged meanwhile
            try:
                payload, homes = _held(raw, tables)
            except NotMoved as exc:
                outcome.not_moved.append({"queue": None, "why": str(exc), "tag": tag.decode(errors="replace")})
                continue
            if not set(homes) & set(queues):
                continue
            if restore and self.restore(tag, payload, homes):
                outcome.restored.update(homes)
            elif not restore:
                outcome.held.update(homes)

    def restore(self, tag: bytes, payload: dict[str, Any], homes: list[str]) -> bool:
        from kombu.utils.json import dumps

        _mark_redelivered(payload)
        step = self.channel.priority(self.channel._get_message_priority(payload))

        def commands(pipe: Any) -> Any:
            there = pipe.hexists(self.unacked_key, tag)
            pipe.multi()
            pipe.zrem(self.index_key, tag)
            pipe.hdel(self.unacked_key, tag)
            if there:  # else a worker acknowledged it just now
                for queue in homes:
                    pipe.rpush(self.key(queue, step), dumps(payload))
            return there

        return bool(self.client.transaction(commands, self.unacked_key, value_from_callable=True))

    def warn_of_workers(self) -> None:
        # Not every user may list clients, and another app's workers look the same: it is a hint, not a check.
        with suppress(Exception):
            number = sum(1 for one in self.client.client_list() if one.get("cmd") == "brpop")
            if number:
                click.echo(
                    f"{number} clients wait in BRPOP on {self.url}: if these are the old workers, what they hold will "
                    "run twice",
                    err=True,
                )

    # --- as the target

    def put(self, queue: str, payload: dict[str, Any], raw: bytes, identity: str | None) -> None:
        if self.marks is None:
            if not self.locked:
                self.lock()
            self.marks = self.read_marks()
        if identity is not None and identity in self.marks:
            return
        step = self.channel.priority(self.channel._get_message_priority(payload))
        with self.client.pipeline() as pipe:
            pipe.lpush(self.key(queue, step), raw)
            if identity is not None:
                pipe.lpush(self.marks_key, identity)
                pipe.ltrim(self.marks_key, 0, MARKS - 1)
                pipe.expire(self.marks_key, MARKS_S)
            pipe.pexpire(self.lock_key, LOCK_MS)
            pipe.execute()

    def has(self, identity: str | None) -> bool:
        return identity is not None and identity in self.read_marks()

    def read_marks(self) -> set[str]:
        return {mark.decode() for mark in self.client.lrange(self.marks_key, 0, -1)}


class Streams(Broker):
    """Our transport, through kombu."""

    def __init__(self, url: str, options: dict[str, Any], connection: Any) -> None:
        super().__init__(url, options, connection)
        # By name: the command line works without the transport, too.
        self.names = importlib.import_module("streamtask.transport.message")
        self.queues = importlib.import_module("streamtask.transport.queues")

    # --- as the source

    def move(self, names: list[str], unacked: bool, target: Broker, outcome: Outcome) -> None:
        from kombu.utils.encoding import str_to_bytes
        from kombu.utils.json import dumps

        for queue in self.find(names):
            self.make_due(queue)
            while (message := self.next(queue)) is not None:
                payload, identity = self.plain(message._raw), self.identity(message.delivery_tag)
                # If we die before the acknowledgement, or give up here, it comes back to its queue by itself.
                target.store(queue, payload, str_to_bytes(dumps(payload)), identity)
                self.channel.basic_ack(message.delivery_tag)
                outcome.moved[queue][self.channel._get_message_priority(payload)] += 1
            if left := self.left(queue):
                outcome.left[queue] = left

    def keys(self, queue: str) -> Iterator[Any]:
        """The keys of each of the queue's streams."""
        found = self.channel.session.queue(queue)
        for shard in found.recorded():
            yield found.shard_keys(shard)

    def make_due(self, queue: str) -> None:
        """What waits in the broker for its eta is to be had now; its eta stays in its headers, for the worker."""
        for keys in self.keys(queue):
            # Members begin with a sequence number: with one score for all, they stay in the order of their publishing.
            self.command("ZUNIONSTORE", keys.delayed, 1, keys.delayed, "WEIGHTS", 0)

    def command(self, name: str, key: str, *args: Any) -> Any:
        return self.channel.session.connections.once_more(lambda link: link.command(name, key, *args), key)

    def left(self, queue: str) -> int:
        """Messages that wait, or that somebody holds."""
        held = sum(self.command("XPENDING", keys.stream, self.queues.GROUP)[0] for keys in self.keys(queue))
        return self.size(queue) + int(held)

    def next(self, queue: str) -> Any:
        """The next message; None if there is none, or none that live workers leave to us."""
        end = time.monotonic() + WAIT_S
        while (message := self.channel.basic_get(queue)) is None:
            # A shard is ours some moments after we asked for it, and what a dead process held when its lease has expired.
            if not self.left(queue) or time.monotonic() > end:
                return None
            self.keep_alive()
            time.sleep(0.05)
        return message

    def identity(self, tag: str) -> str:
        """What is the same in each delivery of a message: its entry in its stream."""
        handed = self.channel.session.handed[tag]
        place = (handed.consumer.keys.stream, handed.batch.deliveries[0].entry_id)
        return f"{uuid.uuid5(uuid.NAMESPACE_OID, repr(place)).hex} 0"

    def plain(self, delivered: dict[str, Any]) -> dict[str, Any]:
        """The message without what its delivery added, and as JSON can hold it."""
        from kombu.utils.encoding import bytes_to_str, str_to_bytes

        headers, properties = dict(delivered["headers"] or {}), dict(delivered["properties"])
        headers.pop(self.names.DELIVERY, None)
        properties.pop(self.names.PRODUCE_ID, None)
        properties["delivery_tag"] = str(uuid.uuid4())
        body = delivered["body"]
        if not properties.get("body_encoding"):
            body = bytes_to_str(base64.b64encode(str_to_bytes(body)))
            properties["body_encoding"] = "base64"
        return {**delivered, "body": body, "headers": headers, "properties": properties}

    def count(self, names: list[str], outcome: Outcome) -> None:
        for queue in self.find(names):
            if number := self.size(queue):
                outcome.moved[queue][0] = number

    def find(self, names: list[str]) -> list[str]:
        if not names:
            raise click.UsageError("name the queues with --queues a,b: --all is for redis://")
        return list(dict.fromkeys(names))

    def size(self, queue: str) -> int:
        number: int = self.channel._size(queue)
        return number

    # --- as the target

    def put(self, queue: str, payload: dict[str, Any], raw: bytes, identity: str | None) -> None:
        payload["headers"] = payload.get("headers") or {}
        if identity is None:
            identity = f"{uuid.uuid4().hex} 0"
        # As ids.py has them: a page, and a number in it.
        batch, _, number = identity.partition(" ")
        page, place = divmod(int(number), PAGE)
        payload["properties"][self.names.PRODUCE_ID] = f"m{batch}.{page:x} {place}"
        try:
            self.channel._put(queue, payload)
        except QueueFull:
            raise
        except (TypeError, ValueError) as exc:
            raise NotMoved(f"refused by {self.url}: {exc}") from None


# --- opening


@contextmanager
def open_broker(url: str, options: dict[str, Any]) -> Iterator[Broker]:
    """A broker that answers. Raises ``ConfigError`` for a wrong URL, ``BrokerUnavailable`` where nobody answers."""
    from kombu.connection import Connection
    from kombu.exceptions import KombuError
    from kombu.transport import redis as kombu_redis

    if url.startswith("streamtask"):
        # Registers the scheme. By name: the transport needs nothing of the command line, and may be left out.
        importlib.import_module("streamtask.transport")
    shown = safe_url(url)
    try:
        kind = Connection(url).get_transport_cls()
    except (KombuError, KeyError, ValueError, TypeError, ImportError) as exc:
        raise ConfigError(f"the broker URL {shown!r} can't be used: {exc}") from None
    streams = kind.__module__.startswith("streamtask.")
    if not streams and not issubclass(kind, kombu_redis.Transport):
        raise ConfigError(f"the broker URL {shown!r} is neither kombu's redis nor streamtask: there is nothing to move")
    # A broker that does not answer is said soon.
    settings = {"socket_timeout": 10, "socket_connect_timeout": 5, **options}
    if not streams:
        settings.pop("global_keyprefix", None)  # ours to add, see OldRedis
    connection = Connection(url, transport_options=settings)
    lost = _lost(connection)
    try:
        connection.connect()
        broker = (Streams if streams else OldRedis)(url, options, connection)
    except StreamTaskError:
        raise
    except lost as exc:
        raise BrokerUnavailable(f"{shown} can't be reached: {exc}") from None
    except (KombuError, ValueError, TypeError) as exc:
        raise ConfigError(f"the broker URL {shown!r} can't be used: {exc}") from None
    try:
        yield broker
    finally:
        broker.close()


def _lost(connection: Any) -> tuple[type[Exception], ...]:
    # KeyError is among kombu's: a bug of ours should not look like a lost connection.
    return tuple(one for one in connection.connection_errors if one is not KeyError)


# --- messages as kombu's redis transport keeps them


def _payload(raw: bytes) -> dict[str, Any]:
    """The message. Raises ``NotMoved`` for what no worker could read."""
    from kombu.utils.json import loads

    try:
        payload = loads(raw.decode())
    except ValueError as exc:
        raise NotMoved(f"no JSON: {exc}") from None
    return _checked(payload)


def _checked(payload: Any) -> dict[str, Any]:
    if not isinstance(payload, dict) or not isinstance(payload.get("properties"), dict) or "body" not in payload:
        raise NotMoved("no message: it lacks body or properties")
    properties = payload["properties"]
    if "delivery_tag" not in properties or not isinstance(payload.get("headers") or {}, dict):
        raise NotMoved("no message: it lacks a delivery tag, or its headers are none")
    if properties.get("body_encoding") == "base64":
        try:
            base64.b64decode(payload["body"])
        except (TypeError, ValueError) as exc:
            raise NotMoved(f"its body is no base64: {exc}") from None
    return payload


def _is_message(raw: bytes | None) -> bool:
    try:
        return raw is not None and bool(_payload(raw))
    except NotMoved:
        return False


def _held(raw: bytes, tables: dict[str, list[tuple[str, str, str]]]) -> tuple[dict[str, Any], list[str]]:
    """A message of the unacked hash and the queues that it belongs to. Raises ``NotMoved``."""
    from kombu.utils.json import loads

    try:
        payload, exchange, routing_key = loads(raw.decode())
    except (ValueError, TypeError) as exc:
        raise NotMoved(f"held by a worker, but no message: {exc}") from None
    payload = _checked(payload)
    if not exchange:
        return payload, [str(routing_key)]
    homes = sorted({queue for key, pattern, queue in tables.get(exchange, []) if _bound(key, pattern, routing_key)})
    if not homes:
        raise NotMoved(f"held by a worker, but no queue is bound to {exchange!r} with {routing_key!r}")
    return payload, homes


def _bound(key: str, pattern: str, routing_key: str) -> bool:
    # Bindings of a topic exchange have a pattern.
    return re.match(pattern, routing_key) is not None if pattern else key == routing_key


def _mark_redelivered(payload: dict[str, Any]) -> None:
    if isinstance(payload.get("headers"), dict):
        payload["headers"]["redelivered"] = True
    if isinstance(payload["properties"].get("delivery_info"), dict):
        payload["properties"]["delivery_info"]["redelivered"] = True


def _named(raw: bytes) -> dict[str, Any]:
    """What tells an operator which message it is."""
    try:
        payload = _payload(raw)
    except NotMoved:
        return {"start": raw[:100].decode(errors="backslashreplace")}
    headers = payload.get("headers") or {}
    return {"task": headers.get("task"), "id": headers.get("id") or payload["properties"].get("correlation_id")}


def _literal(text: str) -> str:
    """The text as a pattern of SCAN that matches nothing else."""
    return re.sub(r"([\\*?\[\]^])", r"\\\1", text)
