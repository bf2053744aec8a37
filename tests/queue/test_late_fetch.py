"""What Redis does of a connection that broke for its process alone: a fetch that waits there reads nothing any more."""

from __future__ import annotations

import pytest

from streamtask.coordination.lease import reap
from streamtask.errors import BrokerUnavailable
from streamtask.queue.arrivals import pack_fetch
from streamtask.queue.delivery import Kind, Outcome
from streamtask.queue.fetcher import Fetcher
from streamtask.redis.keys import SHARED
from streamtask.redis.scripts import Code
from tests.helpers import wait_until
from tests.queue.test_takeover import GROUP, KEYS, Rig


@pytest.mark.parametrize("shard", [0, SHARED])
def test_a_blocked_fetch_of_a_broken_connection_takes_nothing(redis_server_all, shard):
    rig = Rig(redis_server_all, shard)
    consumer = rig.owner()
    former, fetcher = Fetcher(rig.broker), Fetcher(rig.broker)
    for one in (former, fetcher):
        one.send([consumer], [], look=False, block=False)
    former.receive()
    former.send([consumer], [consumer], look=True, block=True)
    wait_until(lambda: rig.client.info("clients")["blocked_clients"] == 1)

    # The process is cut off, looks for what a lost reply has brought, and goes on over a new connection.
    consumer.claimer.connection_lost()
    assert consumer.claimer.recover(takeover=False) == 0
    fetcher.drop()
    rig.send(5)
    fetcher.send([consumer], [], look=False, block=False)
    fetcher.receive()

    assert former.receive().read == [], "its answer reaches nobody"
    fetcher.send([consumer], [consumer], look=False, block=False)
    ((_, entries),) = fetcher.receive().read
    assert len(entries) == 5
    assert rig.pending() == 5
    former.drop()
    fetcher.drop()
    rig.close()


@pytest.mark.parametrize("shard", [0, SHARED])
def test_a_fetch_by_script_that_comes_late_takes_nothing(redis_server_all, shard):
    """Its request was sent over a connection that broke, and reaches Redis only now."""
    rig = Rig(redis_server_all, shard)
    consumer = rig.owner()
    packed = pack_fetch([consumer.arrivals], 50, True)
    consumer.claimer.connection_lost()
    assert consumer.claimer.recover(takeover=False) == 0
    rig.send(5)
    assert rig.link.call(packed) == Code.LEASE_LOST
    assert rig.pending() == 0
    assert rig.fetch(consumer) == 5
    assert len(consumer.backlog.buffer) == 5
    rig.close()


def test_a_look_that_comes_late_takes_nothing_that_is_on_offer(redis_server_all):
    rig = Rig(redis_server_all, SHARED)
    gone, consumer = rig.owner(), rig.owner()
    rig.send(3)
    rig.fetch(gone)
    assert reap(rig.link, rig.keys, GROUP, gone.fence.lease.incarnation, 60_000, gone=True)
    packed = pack_fetch([consumer.arrivals], 50, False)
    consumer.claimer.connection_lost()
    consumer.claimer.recover(takeover=False)
    assert rig.link.call(packed) == Code.LEASE_LOST
    consumer.arrivals.look()
    assert len(consumer.backlog.buffer) == 3
    rig.close()


def test_a_dead_letter_whose_reply_was_lost_is_said_once(redis_server_all, caplog):
    rig = Rig(redis_server_all)
    consumer = rig.owner()
    died = consumer.settler.died
    rig.send(2, KEYS[:1])
    rig.fetch(consumer)
    batch = consumer.hand_out(1)
    batch.outcomes.append((0, Outcome(Kind.DEAD, reason="failed", message="as it has to be")))
    consumer.backlog.complete(batch)

    class Lossy:
        """Does what it is asked for, and loses the answer."""

        def run(self, *args):
            rig.link.run(*args)
            raise BrokerUnavailable("lost")

    rig.links.link = Lossy()
    with pytest.raises(BrokerUnavailable):
        consumer.settler.flush()
    assert died == []
    rig.links.link = rig.link
    consumer.settler.flush()
    consumer.settler.flush()

    assert [delivery.args for delivery, _ in died] == [[0]]
    assert sum("dead letter: failed" in record.getMessage() for record in caplog.records) == 1
    assert rig.client.xlen(rig.keys.dlq) == 1
    assert rig.client.xpending(rig.keys.stream, GROUP)["pending"] == 1
    rig.close()
