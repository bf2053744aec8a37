"""kombu's redis transport as a migration's source or target: lists, and what workers hold."""

from __future__ import annotations

import os
import re
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..clock import mono_s
from ..errors import StreamTaskError
from .messages import NotMoved, held_by_worker, is_message, mark_redelivered, named, payload_of
from .side import Outcome, Side

OWN = "_streamtask.migrate"
"""How the keys begin that a migration makes in a database of kombu's redis transport."""

BATCH = 100
"""Messages that are set aside in one round trip."""

LOCK_MS = 15_000
MARKS = 64
MARKS_S = 86_400
PRIORITIES = range(10)
NOT_THE_APPS = re.compile(r"(^|\.)celery\.pidbox$|^celeryev(\.|$)")
"""Queues of remote control and events: what lies there is about processes that are gone."""


class OldRedis(Side):
    """kombu's redis transport. Keys get their prefix here: kombu's own client knows it for a part of the commands."""

    remembers = True

    def __init__(self, url: str, options: dict[str, Any], connection: Any, tell: Callable[[str], None]) -> None:
        super().__init__(url, options, connection, tell)
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

    def is_target_of(self, other: Side) -> bool:
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
        end = mono_s() + LOCK_MS / 1000 + 1
        waited = False
        while not self.client.set(self.lock_key, self.token, nx=True, px=LOCK_MS):
            token = self.client.get(self.lock_key) or b""
            if self.unlocked(token):
                continue
            holder = token.decode(errors="replace").partition(" ")[2].partition(" ")[2]
            if mono_s() > end:
                raise StreamTaskError(f"another migration is under way {holder}: wait for its end")
            if not waited:
                self.tell(f"another migration is under way, or has died {holder}: waiting")
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
            if own or any(is_message(self.client.lindex(key, end)) for end in (-1, 0)):
                found.add(queue)
        for raw in self.client.hvals(self.unacked_key):
            with suppress(NotMoved):
                found.update(held_by_worker(raw, tables)[1])
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

    def move(self, names: list[str], unacked: bool, target: Side, outcome: Outcome) -> None:
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

    def move_list(self, queue: str, priority: int, target: Side, outcome: Outcome) -> None:
        key = self.key(queue, priority)
        sent_before = bool(self.client.llen(self.aside(key)))
        while batch := self.set_aside(key):
            sent = False
            try:
                for identity, raw in batch:
                    try:
                        payload = payload_of(raw)
                        sent = True
                        target.store(queue, payload, raw, identity)
                    except NotMoved as exc:
                        outcome.not_moved.append({"queue": queue, "why": str(exc), **named(raw)})
                        self.remove(key, raw, junk=True)
                    else:
                        if sent_before and not target.remembers:
                            outcome.maybe_twice.append({"queue": queue, **named(raw)})
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
                payload, homes = held_by_worker(raw, tables)
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

        mark_redelivered(payload)
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
                self.tell(
                    f"{number} clients wait in BRPOP on {self.url}: if these are the old workers, what they hold will "
                    "run twice"
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


def _literal(text: str) -> str:
    """The text as a pattern of SCAN that matches nothing else."""
    return re.sub(r"([\\*?\[\]^])", r"\\\1", text)
