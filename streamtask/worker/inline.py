"""Runs what is queued in the calling process, without a supervisor: for tests and notebooks.

The same consumer, scripts and executor as in a worker process, with leases that this process takes for itself and gives
back at the end. Nothing renews them, so they are taken for as long as the call may last.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial

from ..clock import mono_s, wall_ms
from ..coordination.lease import Lease, Refused, acquire, join_shared, reap
from ..coordination.shared import SharedMemory, create_file
from ..errors import ConfigError, TaskError
from ..queue.consumer import ShardConsumer
from ..queue.delivery import Delivery, Kind, Outcome
from ..redis import commands, wire
from ..redis.keys import SHARED
from ..redis.links import Links
from ..text import counted
from .executor import SequentialExecutor
from .ports import TaskRunner, WorkerSettings, results_of

LOOK_S = 0.05
"""How often to look for what other programs have revoked; what this app revokes is known at once."""


def run_until_idle(
    settings: WorkerSettings, runner: TaskRunner, revocations: Callable[[], int], *, timeout_s: float, fail_fast: bool
) -> int:
    """See ``StreamTask.run_until_idle``. Raises ``TaskError``, ``ConfigError``, ``BrokerUnavailable``."""
    __tracebackhide__ = True
    run = partial(_run_until_idle, settings, runner, revocations, timeout_s=timeout_s, fail_fast=fail_fast)
    try:
        in_loop = asyncio.get_running_loop() is not None
    except RuntimeError:
        in_loop = False
    if not in_loop:
        return run()
    # An ``async def`` test: no second event loop runs in its thread, and bodies may need one.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(copy_context().run, run).result()


def _run_until_idle(
    settings: WorkerSettings, runner: TaskRunner, revocations: Callable[[], int], *, timeout_s: float, fail_fast: bool
) -> int:
    __tracebackhide__ = True
    memory_fd = create_file(1)
    try:
        memory = SharedMemory(memory_fd, 1)
    finally:
        os.close(memory_fd)
    memory.trusted[0] = float("inf")
    links = Links(settings.broker)
    results = Links(settings.result_broker) if settings.result_broker else None
    consumers = _own_all(settings, links, int(timeout_s * 1000) + 60_000)

    seen: list[float] = [-1, 0.0]  # how often this app had revoked something at the last look, and when that was

    def read_revoked() -> None:
        count, now = revocations(), mono_s()
        if seen[0] == count and now < seen[1] + LOOK_S:
            return
        seen[:] = count, now
        for queue in settings.queues:
            ids = links.at(queue.keys.revoked).call(commands.scored(queue.keys.revoked, wall_ms(), "+inf"))
            revoked = {wire.id_bytes(one.decode()) for one in ids}
            for consumer in consumers:
                if consumer.fence.queue == queue.name:
                    consumer.backlog.revoked = revoked

    executor = SequentialExecutor(runner, memory, read_revoked, interruptible=True)
    executor.signal_after_s = 0.0  # between any two bodies: the first may revoke the second
    dead: list[tuple[Delivery, Outcome]] = []

    def store_results(consumer: ShardConsumer) -> None:
        dead.extend(consumer.settler.died)
        for _, (key, packed) in results_of(consumer, runner):
            if results is not None:
                results.at(key).call(packed)

    for consumer in consumers:
        consumer.claimer.recover(takeover=True)
    deadline = mono_s() + timeout_s
    done = 0
    try:
        while True:
            ran = 0
            for consumer in consumers:
                read_revoked()
                started, well = _turn(consumer, results, executor, store_results)
                ran += started
                done += well
            if dead and fail_fast:
                delivery, outcome = dead[0]
                raise TaskError(
                    f"dead letter: task {delivery.task} with {delivery.args} {delivery.kwargs}: "
                    f"{outcome.reason}: {outcome.message}",
                    traceback=outcome.traceback,
                )
            if ran == 0 and not any(consumer.backlog.has_work() for consumer in consumers):
                wait = _next_due(consumers)
                if wait is None or wait > deadline:
                    return done
                time.sleep(max(0.0, min(wait, deadline) - mono_s()))
            if mono_s() > deadline:
                raise TaskError(f"not idle after {timeout_s:g} s: {counted(done, 'message')} ran")
    finally:
        for consumer in consumers:
            _give_back(consumer, settings)
        executor.close()
        links.close()
        if results is not None:
            results.close()


def _own_all(settings: WorkerSettings, links: Links, lease_ms: int) -> list[ShardConsumer]:
    incarnation = "inline" + uuid.uuid4().hex[:10]
    group = settings.consumer.group
    consumers = []
    for queue in settings.queues:
        queue.declare((group,))
        for shard in queue.all_shards():
            keys = queue.shard_keys(shard)
            link = links.at(keys.stream)
            lease: Lease | Refused
            if shard == SHARED:
                alive = queue.keys.alive(group, keys, cluster=settings.broker.is_cluster)
                lease = join_shared(link, keys, group, incarnation, lease_ms, alive=alive)
            else:
                lease = acquire(link, keys, group, incarnation, lease_ms)
            if isinstance(lease, Refused):
                raise ConfigError(
                    f"shard {shard} of queue {queue.name!r} belongs to a worker process: stop the workers, or let them run it"
                )
            consumer = ShardConsumer(lease, queue.name, shard, settings.consumer, links)
            consumer.backlog.number = 0
            consumers.append(consumer)
    return consumers


def _turn(
    consumer: ShardConsumer,
    results: Links | None,
    executor: SequentialExecutor,
    store_results: Callable[[ShardConsumer], None],
) -> tuple[int, int]:
    """Reads, runs and settles once; answers how many bodies ran, and how many of them ended well."""
    backlog, arrivals, claimer = consumer.backlog, consumer.arrivals, consumer.claimer

    def write() -> None:
        store_results(consumer)  # what is acknowledged has its result
        try:
            consumer.settler.flush()
        finally:
            store_results(consumer)
        consumer.settler.settle()

    if claimer.has_to_recover():
        claimer.recover_more()
    entries = arrivals.fetch(arrivals.read_count() if arrivals.has_room() else 0)
    if entries:
        arrivals.absorb(entries)
    arrivals.reread_notes()
    backlog.lanes.open_due(mono_s())
    ran = well = 0
    while (batch := consumer.hand_out(backlog.settings.ack_batch)) is not None:
        executor.run_batch(batch)
        executor.ended.clear()
        backlog.complete(batch)
        ran += len(batch.ids) - sum(1 for _, o in batch.outcomes if o.kind in (Kind.SKIPPED, Kind.UNSTARTED))
        well += len(batch.ids) - len(batch.outcomes)
        if results is not None:
            for _, (key, packed) in batch.results:
                results.at(key).call(packed)
        write()
    write()
    return ran, well


def _next_due(consumers: list[ShardConsumer]) -> float | None:
    times = [t for c in consumers for t in (c.arrivals.next_due, c.backlog.lanes.next_due()) if t is not None]
    return min(times) if times else None


def _give_back(consumer: ShardConsumer, settings: WorkerSettings) -> None:
    lease, link = consumer.fence.lease, consumer.fence.link
    if lease.shared:
        reap(link, lease.keys, lease.group, lease.incarnation, settings.lease_ms, gone=True, alive=lease.alive)
    else:
        lease.release(link)
