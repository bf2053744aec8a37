"""A stock worker on a Redis Cluster: slots that move, a master that dies."""

from __future__ import annotations

import pytest

from tests.celery import app as sut
from tests.celery.rig import close_app
from tests.helpers import wait_until
from tests.transport.fix_servers import wait_replicated

pytestmark = pytest.mark.parametrize("redis_cluster", [3], ids=["three nodes"], indirect=True)


def streams(cluster):
    """The keys of all streams of messages."""
    nodes = [node for node in cluster.nodes if node.running and node.client().info("replication")["role"] == "master"]
    return sorted({key.decode() for node in nodes for key in node.client().scan_iter("*:stream", count=1000)})


@pytest.fixture
def on_cluster(redis_cluster, site):
    """A site whose app and workers are on the cluster, and the app."""
    s = site(redis_cluster.nodes[0])
    url = "streamtask+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in redis_cluster.nodes)
    app = sut.make(url, s.options)
    yield s, app, url
    close_app(app)


def some(s, app, count=60):
    for i in range(count):
        fail = {"fail": 1} if i % 13 == 0 else {}
        s.send("put", f"user{i % 6}", app=app, ms=5, **fail)
        if i % 2:
            s.send("late", app=app, ms=5)


def test_slots_move_under_load(on_cluster, redis_cluster):
    s, app, url = on_cluster
    s.start_workers(2, c=2, broker_url=url)
    some(s, app)
    for key in streams(redis_cluster):
        redis_cluster.move(key)
        some(s, app, 10)
    s.wait_done(timeout=60)
    assert s.check().repeated == []
    assert sorted(next(iter(pong)) for pong in app.control.ping(timeout=2)) == ["w1@test", "w2@test"]
    s.send("due", app=app, apply={"countdown": 1})
    s.wait_done()


def test_a_replica_takes_a_masters_place(on_cluster, redis_cluster):
    """The node that the URL names first dies, with the shards on it and what else Celery asks of it."""
    s, app, url = on_cluster
    s.start_workers(2, c=2, broker_url=url)
    some(s, app)
    s.wait_done(timeout=30)
    master = redis_cluster.nodes[0]
    redis_cluster.replicate(master)
    some(s, app)
    s.wait_done(timeout=30)
    wait_replicated(master)
    master.kill()
    some(s, app)
    s.wait_done(timeout=60)
    s.check()


def test_a_planned_failover_under_load(on_cluster, redis_cluster):
    """The master hands its place over (CLUSTER FAILOVER): blocked reads end with UNBLOCKED, writes with READONLY or MOVED."""
    s, app, url = on_cluster
    workers = s.start_workers(2, c=2, broker_url=url)
    some(s, app)
    s.wait_done(timeout=30)
    replica = redis_cluster.replicate(redis_cluster.nodes[0])
    some(s, app)
    wait_replicated(redis_cluster.nodes[0])
    admin = replica.client()
    admin.execute_command("CLUSTER", "FAILOVER")
    some(s, app)
    wait_until(lambda: admin.info("replication")["role"] == "master", 30, lambda: replica.log[-1500:], poll=0.1)
    some(s, app)
    s.wait_done(timeout=60)
    s.check()
    assert [worker.spawned.returncode for worker in workers] == [None, None]
