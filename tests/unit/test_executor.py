"""A batch that runs is cut short by another thread, without a lock between both."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import threading
from types import SimpleNamespace

import pytest

from streamtask import StreamTask
from streamtask.coordination.lease import Lease
from streamtask.coordination.shared import SharedMemory, create_file
from streamtask.queue.backlog import Backlog, Batch
from streamtask.queue.delivery import Delivery, Kind
from streamtask.queue.rules import ConsumerSettings
from streamtask.redis.keys import SHARED, QueueKeys
from streamtask.worker.coroutines import Coroutines
from streamtask.worker.executor import SequentialExecutor
from streamtask.worker.ports import Place


def rig(body):
    """An executor, its memory, and ``batch(count)``, whose bodies get their number."""
    here = SimpleNamespace(place=None, batch=None, cells=None, delivery=None)
    runner = SimpleNamespace(plain={"t": body}, here=here)
    fd = create_file(1)
    memory = SharedMemory(fd, 1)
    os.close(fd)
    memory.trusted[0] = float("inf")
    keys = QueueKeys("streamtask", "a", "q").shard(0, SHARED)
    backlog = Backlog(Lease(keys, "g", "i", 1000, True, 1, 0.0), "q", SHARED, ConsumerSettings())
    backlog.number = 0

    def batch(count):
        return Batch(backlog, 1, [[b"%d-0" % n, ["t", None, b"", [n], {}, None]] for n in range(count)], [])

    return SequentialExecutor(runner, memory), memory, backlog, batch


def test_each_message_of_a_batch_that_is_cut_short_runs_or_is_left():
    ran: list[int] = []
    executor, _, backlog, make = rig(ran.append)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    cuts, chance = [], random.Random(7)
    try:
        for _ in range(300):
            ran.clear()
            batch = make(30)
            thread = threading.Thread(target=executor.run_batch, args=(batch,))
            thread.start()
            end, after = None, chance.randrange(20)
            while len(ran) < after:
                pass
            while end is None and not executor.ended:
                end = executor.cut(batch)
            if end is not None:
                left = batch.ids[end:]
                backlog.cut_off(batch, end)
                assert [delivery.entry_id for delivery in backlog.buffer] == left
                backlog.buffer.clear()
            thread.join()
            assert executor.ended.pop() is batch
            unstarted = [index for index, outcome in batch.outcomes if outcome.kind is Kind.UNSTARTED]
            assert ran == list(range(len(ran)))
            if end is not None:
                assert len(ran) == end == len(batch.ids)
                cuts.append(end)
            else:
                assert [*ran, *unstarted] == list(range(30))
    finally:
        sys.setswitchinterval(interval)
    assert cuts, "none was ever cut short"


class Switches:
    """Cells of which the first says at its first look what was so a moment ago: the other thread had its turn since."""

    def __init__(self, cells, turn):
        self._cells, self._turn = cells, turn

    def __getitem__(self, index):
        value = self._cells[index]
        if index == 0 and (turn := self._turn):
            self._turn = None
            turn()
        return value

    def __setitem__(self, index, value):
        self._cells[index] = value


def test_a_body_that_begins_while_its_batch_is_cut_is_seen():
    """The supervisor sees to its time limit, and whom to blame should the process die."""
    begun, gates = [threading.Event() for _ in range(3)], [threading.Event() for _ in range(3)]

    def body(n):
        begun[n].set()
        assert gates[n].wait(60)

    def turn():
        gates[0].set()
        assert begun[1].wait(60)

    executor, memory, _, make = rig(body)
    batch, slot = make(3), memory.slot(0)
    thread = threading.Thread(target=executor.run_batch, args=(batch,))
    thread.start()
    try:
        assert begun[0].wait(60)
        cells = slot.cells
        slot.cells = Switches(cells, turn)
        end = executor.cut(batch)
        slot.cells = cells
        assert memory.running() == [(0, 0, "1-0")]
        assert end is None
    finally:
        for gate in gates:
            gate.set()
        thread.join()
    assert not begun[2].is_set()
    assert [(index, outcome.kind) for index, outcome in batch.outcomes] == [(2, Kind.UNSTARTED)]


@pytest.mark.parametrize("retries,kind", [(0, "dead"), (1, "retry")])
@pytest.mark.parametrize("early", [True, False])
def test_a_coroutine_that_is_cancelled_has_failed(early, retries, kind):
    """By another of its loop that cancels all, also before its first step: with a result, where it isn't to run again."""
    app = StreamTask("a", broker="memory://cancelled", backend=True)

    @app.task(name="t", max_retries=retries)
    async def body():
        begun.append(True)
        asyncio.current_task().cancel()
        await asyncio.sleep(60)

    begun, found = [], []
    runner = app.runner()
    coroutines = Coroutines(runner)
    delivery = Delivery(b"1-0", ["t", None, b"0" * 16, [], {}, None])
    place = Place("default", SHARED, 1, lambda deadline: None, False)

    def end(ended):
        found.append(ended)
        coroutines.end()

    def begin():
        coroutines.start(delivery, place, runner.arun(delivery, place), end)
        for task in asyncio.all_tasks(coroutines.loop) if early else ():
            task.cancel()

    coroutines.loop.call_soon(begin)
    coroutines.run()
    coroutines.loop.close()
    app.close()
    ((outcome, result),) = found
    assert begun == ([] if early else [True])
    assert outcome.kind.value == kind
    assert "CancelledError" in outcome.message
    if kind == "dead":
        assert b"FAILURE" in result[1]
    else:
        assert result is None
