"""What ends without running has its result stored once, also where an error comes between."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from streamtask.errors import BrokerUnavailable
from streamtask.queue.delivery import Kind, Outcome, deliveries_of
from streamtask.worker.ports import results_of

from .test_takeover import KEYS, Rig

RUNNER = SimpleNamespace(
    revoked=lambda delivery, place: b"revoked %d" % delivery.args[0],
    dead=lambda delivery, place, outcome: b"%s %d" % (outcome.reason.encode(), delivery.args[0]),
)


def results(consumer):
    return [packed for _, packed in results_of(consumer, RUNNER)]


def test_what_died_before_an_error_is_told_all_the_same(redis_server):
    rig = Rig(redis_server)
    consumer = rig.owner()
    rig.send(3, KEYS[:1])
    rig.fetch(consumer)
    batch = consumer.hand_out(3)
    batch.outcomes += [(n, Outcome(Kind.DEAD, reason="failed", message="as it has to be")) for n in range(3)]
    consumer.backlog.complete(batch)

    class Once:
        """Breaks at the second call."""

        def __init__(self):
            self.calls = 0

        def run(self, *args):
            self.calls += 1
            if self.calls > 1:
                raise BrokerUnavailable("cut")
            return rig.link.run(*args)

    rig.links.link = Once()
    with pytest.raises(BrokerUnavailable):
        consumer.settler.flush()
    rig.links.link = rig.link

    assert results(consumer) == [b"failed 0"]
    assert results(consumer) == []
    consumer.settler.flush()
    assert results(consumer) == [b"failed 1", b"failed 2"]
    assert rig.client.xlen(rig.keys.dlq) == 3
    rig.close()


def test_what_is_revoked_is_told_before_it_is_acknowledged(redis_server):
    rig = Rig(redis_server)
    consumer = rig.owner()
    rig.send(2, KEYS[:2])
    rig.fetch(consumer)
    first, second = deliveries_of(consumer.backlog.buffer)
    consumer.backlog.revoked = {first.id}

    batch = consumer.hand_out(10)
    assert batch.ids == [second.entry_id]
    assert consumer.backlog.finished == [first.entry_id]
    assert results(consumer) == [b"revoked 0"]
    assert results(consumer) == []

    batch.outcomes.append((0, Outcome(Kind.REVOKED)))  # while it waited behind another
    consumer.backlog.complete(batch)
    assert results(consumer) == [b"revoked 0"]
    assert consumer.settler.settle() == 2
    assert rig.pending() == 0
    rig.close()
