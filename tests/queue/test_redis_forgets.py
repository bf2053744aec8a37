"""Redis comes back without the last it was told, and the owner lives: what it has acknowledged does not run again, and what
it holds runs once, in its order."""

from __future__ import annotations

import pytest

from streamtask.queue.delivery import Kind, Outcome
from tests.helpers import end_batch
from tests.queue.test_takeover import KEYS, Rig


@pytest.fixture
def rig(own_server_all):
    rig = Rig(own_server_all)
    rig.server = own_server_all
    yield rig
    rig.close()


def lose(rig, consumer, mark, share=1.0):
    """As the control loop sees it."""
    rig.link.close()
    rig.server.lose_since(mark, share)
    rig.client = rig.server.client()
    consumer.claimer.connection_lost()
    consumer.settler.lost()
    consumer.claimer.recover(takeover=False)


def run_all(rig, consumer, parallel, fail=()):
    for _ in range(200):
        consumer.backlog.lanes.open_due(float("inf"))
        ran = rig.run(consumer, 7, parallel, fail)
        if not rig.fetch(consumer) and not ran:
            return


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("parallel", [False, True], ids=["in-sequence", "side-by-side"])
def test_nothing_that_was_acknowledged_or_is_held_runs_again(rig, parallel, share):
    consumer = rig.owner()
    rig.send(40)
    rig.fetch(consumer)
    rig.send(100)
    mark = rig.server.written()
    for _ in range(4):
        rig.run(consumer, 7, parallel)
        rig.fetch(consumer)
    held = consumer.hand_out(7)  # runs, half of it has ended, and none of that is settled
    consumer.backlog.collect(held, 4)
    consumer.settler.settle()
    for delivery in held.deliveries:
        rig.started[delivery.key].append(delivery.args[0])

    lose(rig, consumer, mark, share)

    consumer.backlog.complete(held)
    rig.send(10)
    run_all(rig, consumer, parallel)
    assert rig.started == {key: list(range(rig.sent[key])) for key in KEYS}
    assert rig.client.xlen(rig.keys.stream) == 0
    assert rig.pending() == 0


def test_an_attempt_is_not_forgotten(rig):
    consumer = rig.owner()
    rig.send(10)
    mark = rig.server.written()
    rig.fetch(consumer)
    rig.run(consumer, 7, False, fail={(b"a", 0)})
    notes = rig.client.hgetall(rig.keys.notes("workers"))
    assert len(notes) == 1

    lose(rig, consumer, mark)

    assert rig.client.hgetall(rig.keys.notes("workers")) == notes
    run_all(rig, consumer, False)
    assert rig.started == {key: list(range(rig.sent[key])) for key in KEYS}


def test_a_second_attempt_is_not_forgotten_either(rig):
    consumer = rig.owner()
    rig.send(1)
    rig.fetch(consumer)
    rig.run(consumer, 1, False, fail={(b"a", 0)})
    mark = rig.server.written()
    consumer.backlog.lanes.open_due(float("inf"))
    batch = consumer.hand_out(1)
    batch.outcomes.append((0, Outcome(Kind.RETRY)))
    consumer.backlog.complete(batch)
    consumer.settler.flush()
    ((entry_id, note),) = rig.client.hgetall(rig.keys.notes("workers")).items()
    assert note.startswith(b"2 ")

    lose(rig, consumer, mark)

    assert rig.client.hgetall(rig.keys.notes("workers")) == {entry_id: note}


def test_by_a_slower_clock_an_id_may_be_a_new_messages(rig):
    """A failover to a machine whose clock is behind: what is read with an acknowledged id may never have run."""
    consumer = rig.owner()
    rig.send(10)
    mark = rig.server.written()
    rig.fetch(consumer)
    rig.run(consumer, 7, False)
    consumer.backlog.clock_ms += 10_000

    lose(rig, consumer, mark)

    run_all(rig, consumer, False)
    assert all(set(rig.started[key]) == set(range(rig.sent[key])) for key in KEYS)
    assert sum(map(len, rig.started.values())) == 17, "what was acknowledged runs once more"


def test_what_runs_again_runs_before_later_ones_of_its_key(rig):
    """It was acknowledged too long ago to be told again, and later ones of its keys wait in lanes."""
    consumer = rig.owner()
    rig.send(40)
    rig.fetch(consumer)
    mark = rig.server.written()
    rig.run(consumer, 10, True)
    batch = consumer.hand_out_free(100)  # one of each key; the rest waits in lanes
    assert len(batch.ids) == len(KEYS)
    assert consumer.backlog.lanes.waiting > 0

    consumer.settler.sent.clear()
    lose(rig, consumer, mark)

    for delivery in batch.deliveries:
        rig.started[delivery.key].append(delivery.args[0])
    end_batch(batch)
    run_all(rig, consumer, True)
    for key in KEYS:
        after = rig.started[key][2:]
        assert rig.started[key][:2] == [0, 1]
        assert after == [0, *range(2, 8)], "what runs again comes before all that has not started"


def test_a_takeover_reads_what_is_pending_and_not_what_lies_between(rig):
    rig.send(2000)
    former = rig.owner()
    while rig.fetch(former):
        pass
    kept = [entry_id for entry_id, _ in rig.client.xrange(rig.keys.stream)][::20]
    others = [one for one, _ in rig.client.xrange(rig.keys.stream) if one not in set(kept)]
    rig.client.xack(rig.keys.stream, "workers", *others)

    consumer = rig.owner()
    rig.client.config_resetstat()
    before = rig.client.info("stats")["total_net_output_bytes"]
    size = 200
    consumer.claimer.recover(takeover=True)
    shipped = rig.client.info("stats")["total_net_output_bytes"] - before

    assert [item.entry_id for item in consumer.backlog.buffer] == kept
    assert shipped < (3 * len(kept)) * size + 20_000, "some hundred entries, and not two thousand"


@pytest.mark.parametrize("parallel", [False, True], ids=["in-sequence", "side-by-side"])
def test_what_a_lost_reply_brought_does_not_overtake_what_is_here(rig, parallel):
    """Its key has a lane, whose next message was read before and has not got there yet."""
    consumer = rig.owner()
    rig.send(4, KEYS[:1])
    consumer.arrivals.absorb(consumer.arrivals.fetch(2))
    order = []
    if parallel:
        batch = consumer.hand_out_free(1)  # 0 runs
        order.append(0)
    else:
        batch = consumer.hand_out(1)
        batch.outcomes.append((0, Outcome(Kind.RETRY)))
        consumer.backlog.complete(batch)
        consumer.settler.flush()
    consumer.arrivals.fetch(2)  # the reply with 2 and 3 is lost
    consumer.claimer.connection_lost()
    assert consumer.claimer.recover(takeover=False) == 2
    if parallel:
        end_batch(batch)
    consumer.backlog.lanes.open_due(float("inf"))
    while len(order) < 4:
        batch = consumer.hand_out_free(4) if parallel else consumer.hand_out(1)
        order += [delivery.args[0] for delivery in batch.deliveries]
        end_batch(batch)
    assert order == [0, 1, 2, 3]
