"""Redis loses its last second while an owner lives that was given entries in it: new entries get none of their ids."""

from __future__ import annotations

import time

import pytest
import redis

from streamtask.errors import BrokerUnavailable
from streamtask.queue.producer import new_id
from streamtask.redis import wire
from streamtask.redis.keys import SHARED
from tests.helpers import wait_until
from tests.queue.test_takeover import GROUP, KEYS, Rig


def audited(rig, consumer):
    try:
        consumer.claimer.recover(takeover=False)
    except BrokerUnavailable:
        return False
    return True


@pytest.mark.parametrize("shard", [0, SHARED])
def test_a_new_entry_has_no_id_of_one_that_is_held(own_server_all, shard):
    rig = Rig(own_server_all, shard)
    consumer = rig.owner()
    consumer.claimer.recover(takeover=True)
    rig.send(1, KEYS[:1])
    assert rig.fetch(consumer) == 1
    assert rig.run(consumer, 10, False) == 1
    stays = own_server_all.written()

    # The clock that gives this id is an hour ahead of the one that goes on afterwards.
    held = f"{int(time.time() * 1000) + 3_600_000}-0"
    entry = {"m": wire.encode("t", KEYS[0], new_id(), [1], {})}
    rig.client.xadd(rig.keys.stream, entry, id=held)
    assert rig.fetch(consumer) == 1
    batch = consumer.hand_out(10)
    assert batch is not None
    assert batch.ids == [held.encode()]

    own_server_all.lose_since(stays)
    assert rig.client.xlen(rig.keys.stream) == 0, "Redis has lost the entry that is held"
    consumer.claimer.connection_lost()
    wait_until(lambda: audited(rig, consumer), 20)

    with pytest.raises(redis.ResponseError, match="equal or smaller"):
        rig.client.xadd(rig.keys.stream, {"m": b"taken for the one that is held"}, id=held)
    rig.send(1, KEYS[:1])
    consumer.backlog.complete(batch)
    consumer.settler.flush()
    consumer.settler.settle()
    assert rig.client.xlen(rig.keys.stream) == 1, "the end of one that was held removes no other"
    assert rig.fetch(consumer) == 1
    assert rig.run(consumer, 10, False) == 1
    assert rig.client.xpending(rig.keys.stream, GROUP)["pending"] == 0
    rig.close()
