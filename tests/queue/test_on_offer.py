"""What was on offer in a shared stream lies among new messages, by its entry id: it is dealt with as what it is all the same."""

from __future__ import annotations

from streamtask.coordination.lease import reap
from streamtask.queue.lanes import deliveries_of
from streamtask.redis.keys import SHARED
from tests.queue.test_takeover import GROUP, Rig


def test_what_may_be_deadly_is_marked_and_counted_behind_what_is_new(redis_server):
    rig = Rig(redis_server, SHARED)
    gone, consumer = rig.owner(), rig.owner()
    rig.send(2)
    rig.fetch(consumer)
    rig.send(2)
    rig.fetch(gone)
    deadly, suspect = (entry[0] for entry in gone.buffer)
    notes = rig.keys.notes(GROUP)
    rig.client.hset(notes, deadly, f"0 0 {consumer.settings.max_crashes + 1} 0 1 0")
    assert reap(rig.link, rig.keys, GROUP, gone.lease.incarnation, 60_000, gone=True)
    consumer.look(rig.link)
    assert [delivery.fresh for delivery in deliveries_of(consumer.buffer)] == [True, True, False, False]

    marked = {}
    while consumer.has_work():
        batch = consumer.take(rig.link, 100)
        for entry_id in batch.ids if batch else ():
            marked[entry_id] = rig.client.hget(notes, entry_id)
        if batch:
            assert suspect not in batch.ids or len(batch.ids) == 1, "it alone is to blame if the process dies now"
            consumer.complete(batch)
        consumer.flush(rig.link)
    assert deadly not in marked, "it had taken down too many processes"
    assert rig.client.xlen(rig.keys.dlq) == 1
    assert [mark is None for mark in marked.values()] == [True, True, False]
    rig.close()
