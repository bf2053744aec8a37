"""The control loop of a worker process, without a process."""

from __future__ import annotations

import gc
import os
import weakref

from streamtask.queue.consumer import ConsumerSettings
from streamtask.queue.declare import Queue
from streamtask.redis.connection import Broker
from streamtask.worker.control import Control
from streamtask.worker.ports import WorkerSettings
from streamtask.worker.shared import SharedMemory, create_file


class Supervisor:
    def fileno(self):
        return self.pipe[0]

    def __init__(self):
        self.pipe = os.pipe()


def test_of_a_shard_that_is_another_ones_now_nothing_stays():
    broker = Broker("redis://127.0.0.1:1")
    settings = WorkerSettings(
        app="a", broker=broker, queues=[Queue(broker, "streamtask", "a", "q", 1)], consumer=ConsumerSettings()
    )
    memory_fd, supervisor = create_file(1), Supervisor()
    control = Control(settings, None, SharedMemory(memory_fd, 1), supervisor)
    control._own(number=5, queue="q", shard=0, epoch=0, token=1, shared=False, by_expiry=False, incarnation="i")
    owned = control._owned[5]
    held = weakref.ref(owned.consumer)
    control._forget(owned)
    del owned
    gc.collect()
    assert held() is None, "with all that it had read"
    broker.close()
    for fd in (memory_fd, *supervisor.pipe, control._wake_read, control._wake_write):
        os.close(fd)
