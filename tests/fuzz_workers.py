"""As ``tests/fuzz.py``, with whole workers: whatever is appended to their streams, none of their processes ends, nothing
stays behind, and what is well-formed runs. ``make fuzz`` runs it after the decoders.

Each round is one number: ``python -m tests.fuzz_workers --round N`` repeats it, in workers that have seen nothing before it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streamtask.sharding import canonical, shard_of
from tests import fuzz
from tests.celery import rig as celery_rig
from tests.fix_redis import RedisServer, server_binaries
from tests.helpers import Record, wait_until
from tests.worker import rig
from tests.worker.test_hostile import ASYNC

ENTRIES = 150
"""So many in a round, for each stream of each worker."""
ROUNDS = 50
"""So many before the workers are started anew: what they have written and logged is kept in memory here."""


def what_ended(event: Any) -> object:
    """Of which message an event is the end; a forged one may have anything in the place of its number."""
    return event.kind == "E" and type(event.n) is int and type(event.key) in (str, type(None)) and (event.key, event.n)


class Own:
    """``streamtask worker``: one body at a time, four threads, or four on an event loop."""

    def __init__(self, name: str, server: RedisServer, stack: contextlib.ExitStack, source: str, concurrency: int):
        self.name = name
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.site = rig.Site(server, folder, source, stack, 1)
        self.site._record = Record(self.site.log, rig.Event, what_ended)
        self.pod = self.site.pod(1, concurrency)
        self.site.ready(1)
        self.processes = self.pod.children()
        self.key = rig.keys_on(0, 1)[0]

    def feed(self, chance: random.Random) -> None:
        for _ in range(ENTRIES):
            for shard, task in ((0, "put"), ("shared", "free")):
                self.site.redis.execute_command("XADD", self.site.stream(shard), "*", *fuzz.near_envelope(chance, task))
        first = 1000 + len(self.site.produced[self.key])
        for key in (self.key, None):
            self.site.send(key, range(first, first + 10))

    def see(self) -> None:
        site = self.site

        def ended() -> bool:
            done = site._record.ended()
            return all((key, n) in done for key, sent in site.produced.items() for n in sent)

        wait_until(
            ended, 60, lambda: f"what is well-formed has run; {site}", 0.05, lambda: (site.ended(), len(site.dead()))
        )
        site.wait_empty(60)
        assert self.pod.children() == self.processes, "a process has ended"
        site.redis.delete(*(site.keys.shard(0, shard).dlq for shard in site.all_shards()))

    @property
    def log(self) -> str:
        return self.pod.log


class Foreign:
    """A Celery worker on the transport."""

    def __init__(self, name: str, server: RedisServer, stack: contextlib.ExitStack, pool: str):
        self.name = name
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.site = celery_rig.Site(server, folder, stack, {}, {})
        self.site._record = Record(self.site.record, celery_rig.Event, what_ended)
        self.worker = self.site.worker(pool, c=2)
        for task, key in (("late", None), ("put", "a")):
            self.site.send(task, key)
        self.site.wait_done()
        self.processes = self.worker.children()
        self.shared = (
            next(server.client().scan_iter("*.shared}:lease:*", count=1000)).rsplit(b":lease", 1)[0] + b":stream"
        )
        self.shard = self.shared.replace(b".shared}", b".%d}" % shard_of(canonical("a"), 8))

    def feed(self, chance: random.Random) -> None:
        for _ in range(ENTRIES):
            for stream, key in ((self.shared, None), (self.shard, b"a")):
                parts = fuzz.celery_parts(chance) if chance.random() < 0.7 else fuzz.kombu_parts(chance)
                with contextlib.suppress(Exception):  # what msgpack can't write
                    packed = fuzz.spoil(chance, fuzz.pack(["late", key, fuzz.ID, parts, {}, None]))
                    self.site.redis.xadd(stream, {"m": packed})
        for _ in range(5):
            self.site.send("late")
            self.site.send("put", "a")

    def see(self) -> None:
        site = self.site
        site.wait_done(60)
        site.nothing_left(60)
        assert self.worker.spawned.returncode is None, "the worker has ended"
        assert self.worker.children() == self.processes, "a process of its pool has ended"
        for name in site.redis.scan_iter("*:dlq", count=1000):
            site.redis.delete(name)

    @property
    def log(self) -> str:
        return self.worker.log


@contextlib.contextmanager
def workers(names: list[str]) -> Iterator[list[Own | Foreign]]:
    makers: dict[str, Any] = {
        "one": lambda server, stack: Own("one", server, stack, rig.TASKS, 1),
        "threads": lambda server, stack: Own("threads", server, stack, rig.TASKS, 4),
        "async": lambda server, stack: Own("async", server, stack, ASYNC, 4),
        "celery-prefork": lambda server, stack: Foreign("celery-prefork", server, stack, "prefork"),
        "celery-threads": lambda server, stack: Foreign("celery-threads", server, stack, "threads"),
    }
    binary = list(server_binaries().values())[-1]
    # What pytest would show with a failure is printed when they end.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as stack:
        yield [makers[name](stack.enter_context(RedisServer(binary)), stack) for name in names or makers]


def main() -> int:
    parser = argparse.ArgumentParser(description="Appends bytes near valid messages to the streams of whole workers.")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--round", type=int, help="this one alone")
    parser.add_argument("--worker", action="append", default=[], help="of this kind alone; may be given several times")
    options = parser.parse_args()
    first = random.SystemRandom().randrange(10**9) if options.round is None else options.round
    number, until = first, time.monotonic() + options.seconds
    while number == first or (options.round is None and time.monotonic() < until):
        with workers(options.worker) as sites:
            for _ in range(1 if options.round is not None else ROUNDS):
                play(sites, number)
                number += 1
                if time.monotonic() >= until:
                    break
    print(f"{number - first} rounds of {2 * ENTRIES} entries for each worker, nothing found")
    return 0


def play(sites: list[Own | Foreign], number: int) -> None:
    for one in sites:
        one.feed(random.Random(number))
    for one in sites:
        try:
            one.see()
        except BaseException:
            print(one.log[-20_000:], file=sys.stderr)
            print(f"{one.name}: python -m tests.fuzz_workers --round {number} --worker {one.name}", file=sys.stderr)
            raise


if __name__ == "__main__":
    sys.exit(main())
