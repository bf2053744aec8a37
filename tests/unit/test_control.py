"""The control loop of a worker process, without a process."""

from __future__ import annotations

import gc
import os
import weakref
from types import SimpleNamespace

import pytest

from streamtask.clock import mono_s
from streamtask.coordination.orders import Own
from streamtask.coordination.shared import SharedMemory, create_file
from streamtask.queue.backlog import Batch
from streamtask.queue.queues import Queue
from streamtask.queue.rules import ConsumerSettings
from streamtask.redis.connection import Broker
from streamtask.redis.keys import SHARED
from streamtask.redis.links import Pool
from streamtask.worker.control import Control
from streamtask.worker.executor import SequentialExecutor
from streamtask.worker.ports import WorkerSettings


class Supervisor:
    def fileno(self):
        return self.pipe[0]

    def __init__(self):
        self.pipe = os.pipe()


class Runner:
    def __init__(self):
        self.plain = {}
        self.here = SimpleNamespace(place=None, batch=None, cells=None, delivery=None)


@pytest.fixture
def runner():
    return Runner()


@pytest.fixture
def control(runner):
    broker = Broker("redis://127.0.0.1:1")
    settings = WorkerSettings(
        app="a", broker=broker, queues=[Queue(Pool(broker), "streamtask", "a", "q", 1)], consumer=ConsumerSettings()
    )
    memory_fd, supervisor = create_file(1), Supervisor()
    memory = SharedMemory(memory_fd, 1)
    control = Control(settings, runner, memory, supervisor, lambda running: SequentialExecutor(runner, memory))
    yield control
    broker.close()
    for fd in (memory_fd, *supervisor.pipe, control._wake_read, control._wake_write):
        os.close(fd)


def own(control, shard):
    shared = shard == SHARED
    control._own(Own(5, "q", shard, epoch=0, token=1, incarnation="i", shared=shared, by_expiry=False))
    return control._shards.owned[5]


def test_of_a_shard_that_is_another_ones_now_nothing_stays(control):
    owned = own(control, 0)
    held = weakref.ref(owned.consumer)
    control._shards.forget(owned)
    del owned
    gc.collect()
    assert held() is None, "with all that it had read"


def test_after_a_cut_no_more_is_read_ahead_than_the_long_body_lets_begin(control, runner):
    """Or each further long body would take all that it can reach, and offer it again."""
    consumer = own(control, SHARED).consumer
    executor, handing = control.executor, control._handing

    def body():
        handing.moved_at = mono_s() - 1.0  # since then it runs
        consumer.backlog.cut_off(batch, executor.cut(batch))

    runner.plain["t"] = body
    control._memory.trusted[5] = float("inf")
    handing.pace_s = 1e-4
    batch = Batch(consumer.backlog, 1, [[b"%d-0" % n, ["t", None, b"", [], {}, None]] for n in range(30)], [])
    consumer.backlog.handed[1] = batch
    executor.submit(batch)
    executor.run_batch(executor.next())
    handing.collect()
    assert len(consumer.backlog.buffer) == 29
    assert handing.pace_s >= 1.0
    consumer.backlog.buffer.clear()  # offered again
    control._intake.make_room()
    assert consumer.arrivals.room == 1
