"""What was on offer in a shared stream lies among new messages, by its entry id, and is dealt with as what it is."""

from __future__ import annotations

import pytest

from streamtask.clock import mono_s
from streamtask.coordination.lease import reap
from streamtask.errors import BrokerUnavailable
from streamtask.queue.backlog import Batch
from streamtask.queue.delivery import Kind, Outcome, deliveries_of, entry_id_of
from streamtask.redis.keys import SHARED
from tests.helpers import end_batch
from tests.queue.test_takeover import GROUP, Rig


def test_what_may_be_deadly_is_marked_and_counted_behind_what_is_new(redis_server):
    rig = Rig(redis_server, SHARED)
    gone, consumer = rig.owner(), rig.owner()
    rig.send(2)
    rig.fetch(consumer)
    rig.send(2)
    rig.fetch(gone)
    deadly, suspect = (entry[0] for entry in gone.backlog.buffer)
    notes = rig.keys.notes(GROUP)
    rig.client.hset(notes, deadly, f"0 0 {consumer.backlog.settings.max_crashes + 1} 0 1 0")
    assert reap(rig.link, rig.keys, GROUP, gone.fence.lease.incarnation, 60_000, gone=True)
    consumer.arrivals.look()
    assert [delivery.fresh for delivery in deliveries_of(consumer.backlog.buffer)] == [True, True, False, False]

    marked = {}
    while consumer.backlog.has_work():
        batch = consumer.hand_out(100)
        for entry_id in batch.ids if batch else ():
            marked[entry_id] = rig.client.hget(notes, entry_id)
        if batch:
            assert suspect not in batch.ids or len(batch.ids) == 1, "it alone is to blame if the process dies now"
            consumer.backlog.complete(batch)
        consumer.settler.flush()
    assert deadly not in marked, "it had taken down too many processes"
    assert rig.client.xlen(rig.keys.dlq) == 1
    assert [mark is None for mark in marked.values()] == [True, True, False]
    rig.close()


def test_what_waits_for_an_executor_is_charged_with_nothing(redis_server):
    rig = Rig(redis_server, SHARED)
    former, gone, heir = rig.owner(), rig.owner(), rig.owner()
    rig.send(5)
    rig.fetch(former)
    assert reap(rig.link, rig.keys, GROUP, former.fence.lease.incarnation, 60_000, gone=True)
    gone.arrivals.look()

    # Of four places two are taken, and each executor finds its next message waiting.
    ran = gone.hand_out_free(4, at_once=2).ids
    assert len(ran) == 2
    assert len(gone.backlog.buffer) == 3
    gone.fence.lease.charge(rig.link, {entry_id.decode(): True for entry_id in ran})
    assert reap(rig.link, rig.keys, GROUP, gone.fence.lease.incarnation, 60_000, gone=True)
    heir.arrivals.look()
    crashes = {d.entry_id: d.note.crashes if d.note else 0 for d in deliveries_of(heir.backlog.buffer)}
    assert sorted(crashes.values()) == [0, 0, 0, 1, 1]
    rig.close()


def test_what_has_not_begun_is_offered_again(redis_server):
    """Behind a body that takes long: the rest of its batch, what was read, and a retry with its attempts."""
    rig = Rig(redis_server, SHARED)
    busy, free = rig.owner(), rig.owner()
    busy.arrivals.room = free.arrivals.room = 10
    rig.sent[None] = 0
    rig.send(5, keys=[None])
    rig.fetch(busy)
    ids = [entry_id_of(item) for item in busy.backlog.buffer]
    failed = busy.hand_out(1)
    failed.outcomes.append((0, Outcome(Kind.RETRY)))
    busy.backlog.complete(failed)
    busy.settler.flush()
    busy.backlog.lanes.open_due(mono_s())
    batch = busy.hand_out(1)
    assert batch.ids == ids[:1]
    batch.outcomes.append((0, Outcome(Kind.RETRY)))
    busy.backlog.complete(batch)
    busy.backlog.lanes.open_due(mono_s())  # not written down yet

    batch = Batch(busy.backlog, 99, [busy.backlog.buffer.popleft() for _ in range(3)], [])
    busy.backlog.handed[99] = batch
    busy.backlog.cut_off(batch, 1)
    assert batch.ids == ids[1:2]
    assert busy.offer_again() == 4
    assert not busy.backlog.waits()
    busy.backlog.complete(batch)
    busy.settler.settle()

    free.arrivals.look()
    found = deliveries_of(free.backlog.buffer)
    assert [delivery.entry_id for delivery in found] == [ids[0], *ids[2:]]
    assert [delivery.fresh for delivery in found] == [False, True, True, True]
    assert found[0].note.attempt == 2
    assert not free.arrivals.on_offer
    rig.close()


def test_what_has_ended_is_charged_with_no_later_start(redis_server):
    """Nobody saw which of the two ran when the whole machine vanished: the first was acknowledged before the second began."""
    rig = Rig(redis_server, SHARED)
    former, gone, heir = rig.owner(), rig.owner(), rig.owner()
    rig.send(2)
    rig.fetch(former)
    assert reap(rig.link, rig.keys, GROUP, former.fence.lease.incarnation, 60_000, gone=True)
    gone.arrivals.look()
    gone.backlog.complete(gone.hand_out(10))
    (deadly,) = gone.hand_out(10, before_mark=gone.settler.settle).ids
    assert reap(rig.link, rig.keys, GROUP, gone.fence.lease.incarnation, 60_000, gone=True)
    heir.arrivals.look()
    assert [(d.entry_id, d.note.crashes) for d in deliveries_of(heir.backlog.buffer)] == [(deadly, 1)]
    rig.close()


@pytest.mark.parametrize("kind", ["later", "unstarted"])
@pytest.mark.parametrize("parallel", [False, True])
def test_what_did_not_run_is_charged_with_nothing(redis_server, kind, parallel):
    """A process stops as it should: it had put a message off, for its rate limit say, or did not start it any more."""
    rig = Rig(redis_server, SHARED)
    former, stops, heir = rig.owner(), rig.owner(), rig.owner()
    rig.send(1)
    rig.fetch(former)
    assert reap(rig.link, rig.keys, GROUP, former.fence.lease.incarnation, 60_000, gone=True)
    stops.arrivals.look()
    batch = (stops.hand_out_free if parallel else stops.hand_out)(1)
    end_batch(batch, [(0, Outcome(Kind(kind)))])
    stops.settler.flush()
    assert reap(rig.link, rig.keys, GROUP, stops.fence.lease.incarnation, 60_000, gone=True)
    heir.arrivals.look()
    (delivery,) = deliveries_of(heir.backlog.buffer)
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
    ids = [entry_id_of(item) for item in busy.backlog.buffer]
    late = Late()
    rig.links.link = late
    with pytest.raises(BrokerUnavailable):
        busy.offer_again()
    rig.links.link = rig.link
    busy.claimer.connection_lost()
    busy.claimer.recover(takeover=False)
    busy.arrivals.look()
    batch = busy.hand_out(1)
    assert batch.ids == ids[:1]  # its body runs here from now on

    rig.link.run(*late.call)  # Redis gets it only now
    free.arrivals.look()
    assert free.hand_out(1) is None, "it would run in two live processes at once"
    assert busy.offer_again() == 1, "what it offers since is on offer"
    free.arrivals.look()
    assert free.hand_out(1).ids == ids[1:]
    rig.close()
