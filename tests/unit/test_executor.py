"""A batch that runs is cut short by another thread, without a lock between both."""

from __future__ import annotations

import os
import random
import sys
import threading
from types import SimpleNamespace

from streamtask.coordination.lease import Lease
from streamtask.queue.batch import Batch
from streamtask.queue.consumer import ConsumerSettings, ShardConsumer
from streamtask.redis.keys import SHARED, QueueKeys
from streamtask.worker.executor import SequentialExecutor
from streamtask.worker.shared import SharedMemory, create_file


def test_each_message_of_a_batch_that_is_cut_short_runs_or_is_left():
    ran: list[int] = []
    here = SimpleNamespace(place=None, batch=None, cells=None, delivery=None)
    runner = SimpleNamespace(plain={"t": ran.append}, here=here)
    fd = create_file(1)
    memory = SharedMemory(fd, 1)
    os.close(fd)
    memory.trusted[0] = float("inf")
    keys = QueueKeys("streamtask", "a", "q").shard(0, SHARED)
    consumer = ShardConsumer(Lease(keys, "g", "i", 1000, True, 1, 0.0), "q", SHARED, ConsumerSettings())
    consumer.number = 0
    executor = SequentialExecutor(runner, memory)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    cuts, chance = [], random.Random(7)
    try:
        for _ in range(300):
            ran.clear()
            items = [[b"%d-0" % n, ["t", None, b"", [n], {}, None]] for n in range(30)]
            batch = Batch(consumer, 1, items, [])
            thread = threading.Thread(target=executor.run_batch, args=(batch,))
            thread.start()
            end, after = None, chance.randrange(20)
            while len(ran) < after:
                pass
            while end is None and not executor.ended:
                end = executor.cut(batch)
            if end is not None:
                left = batch.ids[end:]
                consumer.take_back(batch, end)
                assert [delivery.entry_id for delivery in consumer.buffer] == left
                consumer.buffer.clear()
            thread.join()
            assert executor.ended.pop() is batch
            unstarted = [index for index, outcome in batch.outcomes if outcome.kind == "unstarted"]
            assert ran == list(range(len(ran)))
            if end is not None:
                assert len(ran) == end == len(batch.ids)
                cuts.append(end)
            else:
                assert [*ran, *unstarted] == list(range(30))
    finally:
        sys.setswitchinterval(interval)
    assert cuts, "none was ever cut short"
