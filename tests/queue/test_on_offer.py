"""What was on offer in a shared stream lies among new messages, by its entry id, and is dealt with as what it is."""

from __future__ import annotations

import pytest

from streamtask.clock import mono_s
from streamtask.coordination.lease import reap
from streamtask.errors import BrokerUnavailable
from streamtask.queue.delivery import Batch, Outcome, deliveries_of, entry_id_of
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


def test_what_waits_for_an_executor_is_charged_with_nothing(redis_server):
    rig = Rig(redis_server, SHARED)
    former, gone, heir = rig.owner(), rig.owner(), rig.owner()
    rig.send(5)
    rig.fetch(former)
    assert reap(rig.link, rig.keys, GROUP, former.lease.incarnation, 60_000, gone=True)
    gone.look(rig.link)

    # Of four places two are taken, and each executor finds its next message waiting.
    ran = [batch.ids[0] for batch in gone.take_free(rig.link, 4, at_once=2)]
    assert len(ran) == 2
    assert len(gone.buffer) == 3
    gone.lease.charge(rig.link, {entry_id.decode(): True for entry_id in ran})
    assert reap(rig.link, rig.keys, GROUP, gone.lease.incarnation, 60_000, gone=True)
    heir.look(rig.link)
    crashes = {d.entry_id: d.note.crashes if d.note else 0 for d in deliveries_of(heir.buffer)}
    assert sorted(crashes.values()) == [0, 0, 0, 1, 1]
    rig.close()


def test_what_has_not_begun_is_offered_again(redis_server):
    """Behind a body that takes long: the rest of its batch, what was read, and a retry with its attempts."""
    rig = Rig(redis_server, SHARED)
    busy, free = rig.owner(), rig.owner()
    busy.room = free.room = 10
    rig.sent[None] = 0
    rig.send(5, keys=[None])
    rig.fetch(busy)
    ids = [entry_id_of(item) for item in busy.buffer]
    failed = busy.take(rig.link, 1)
    failed.outcomes.append((0, Outcome("retry")))
    busy.complete(failed)
    busy.flush(rig.link)
    busy.lanes.open_due(mono_s())
    batch = busy.take(rig.link, 1)
    assert batch.ids == ids[:1]
    batch.outcomes.append((0, Outcome("retry")))
    busy.complete(batch)
    busy.lanes.open_due(mono_s())  # not written down yet

    batch = Batch(busy, 99, [busy.buffer.popleft() for _ in range(3)], [])
    busy.handed[99] = batch
    busy.take_back(batch, 1)
    assert batch.ids == ids[1:2]
    assert busy.offer_again(rig.link) == 4
    assert not busy.waits()
    busy.complete(batch)
    busy.settle(rig.link)

    free.look(rig.link)
    found = deliveries_of(free.buffer)
    assert [delivery.entry_id for delivery in found] == [ids[0], *ids[2:]]
    assert [delivery.fresh for delivery in found] == [False, True, True, True]
    assert found[0].note.attempt == 2
    assert not free.on_offer
    rig.close()


def test_what_has_ended_is_charged_with_no_later_start(redis_server):
    """Nobody saw which of the two ran when the whole machine vanished: the first was acknowledged before the second began."""
    rig = Rig(redis_server, SHARED)
    former, gone, heir = rig.owner(), rig.owner(), rig.owner()
    rig.send(2)
    rig.fetch(former)
    assert reap(rig.link, rig.keys, GROUP, former.lease.incarnation, 60_000, gone=True)
    gone.before_mark = lambda: gone.settle(rig.link)
    gone.look(rig.link)
    gone.complete(gone.take(rig.link, 10))
    (deadly,) = gone.take(rig.link, 10).ids
    assert reap(rig.link, rig.keys, GROUP, gone.lease.incarnation, 60_000, gone=True)
    heir.look(rig.link)
    assert [(d.entry_id, d.note.crashes) for d in deliveries_of(heir.buffer)] == [(deadly, 1)]
    rig.close()


@pytest.mark.parametrize("kind", ["requeue", "unstarted"])
@pytest.mark.parametrize("parallel", [False, True])
def test_what_did_not_run_is_charged_with_nothing(redis_server, kind, parallel):
    """A process stops as it should: it had put a message off, for its rate limit say, or did not start it any more."""
    rig = Rig(redis_server, SHARED)
    former, stops, heir = rig.owner(), rig.owner(), rig.owner()
    rig.send(1)
    rig.fetch(former)
    assert reap(rig.link, rig.keys, GROUP, former.lease.incarnation, 60_000, gone=True)
    stops.look(rig.link)
    batch = stops.take_free(rig.link, 1)[0] if parallel else stops.take(rig.link, 1)
    batch.outcomes.append((0, Outcome(kind)))
    (stops.complete_free if parallel else stops.complete)(batch)
    stops.flush(rig.link)
    assert reap(rig.link, rig.keys, GROUP, stops.lease.incarnation, 60_000, gone=True)
    heir.look(rig.link)
    (delivery,) = deliveries_of(heir.buffer)
    assert delivery.note is None or delivery.note.crashes == 0
    rig.close()


class Late:
    """A connection that broke for whoever sends, and whose last call Redis gets only later."""

    def run(self, *call):
        self.call = call
        raise BrokerUnavailable("cut")


def test_an_offer_that_comes_late_lets_nothing_run_twice(redis_server):
    rig = Rig(redis_server, SHARED)
    busy, free = rig.owner(), rig.owner()
    rig.sent[None] = 0
    rig.send(2, keys=[None])
    rig.fetch(busy)
    ids = [entry_id_of(item) for item in busy.buffer]
    late = Late()
    with pytest.raises(BrokerUnavailable):
        busy.offer_again(late)
    busy.connection_lost()
    busy.recover(rig.link, takeover=False)
    busy.look(rig.link)
    batch = busy.take(rig.link, 1)
    assert batch.ids == ids[:1]  # its body runs here from now on

    rig.link.run(*late.call)  # Redis gets it only now
    free.look(rig.link)
    assert free.take(rig.link, 1) is None, "it would run in two live processes at once"
    assert busy.offer_again(rig.link) == 1, "what it offers since is on offer"
    free.look(rig.link)
    assert free.take(rig.link, 1).ids == ids[1:]
    rig.close()
