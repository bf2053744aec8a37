"""Celery's own commands work unchanged: inspect, status, control, purge, events and beat."""

from __future__ import annotations

import json
import time
import urllib.request

from tests.helpers import free_port, wait_until
from tests.transport.kit import wait_until_closed


def run(site, *words, timeout=30, status=0):
    """A command's output; its exit status must be the one given."""
    with site.command(*words) as process:
        assert process.wait(timeout) == status, str(process)
        return process.stdout + process.stderr


def test_inspect_status_and_control(own_server, site):
    s = site(own_server)
    # With mingle, gossip and events: all that uses fanout.
    s.start_workers(2, c=2, words=("-E",))
    n = s.send("gated", "a")
    s.wait("S", n)
    pong = run(s, "inspect", "ping")
    assert "2 nodes online" in pong
    active = json.loads(run(s, "inspect", "active", "--json").strip().splitlines()[-1])
    assert [task["kwargs"]["n"] for tasks in active.values() for task in tasks] == [n]
    stats = json.loads(run(s, "inspect", "stats", "--json").strip().splitlines()[-1])
    assert set(stats) == {"w1@test", "w2@test"}
    assert stats["w1@test"]["broker"]["port"] == own_server.port
    assert "2 nodes online" in run(s, "status")
    assert "OK" in run(s, "control", "-d", "w1@test", "pool_grow", "1")
    s.gate(n)
    s.wait_done()
    assert not any("Traceback" in worker.log for worker in s.workers)


def test_ping_goes_on_where_redis_closes_idle_connections(own_server, site, monkeypatch):
    """Over connections of the pool that waited for an answer before, and were not looked at since."""
    monkeypatch.setattr("streamtask.transport.poller.BLOCK_S", 0.5)
    own_server.config_set(timeout=1)
    s = site(own_server)
    s.worker("solo", c=1)
    app = s.producer(own_server.port, socket_timeout=1)
    with app.connection_for_write() as own:
        for _ in range(2):
            for options in ({}, {"connection": own}):
                (found,) = app.control.ping(timeout=10, limit=1, **options)
                assert [*found] == ["w1@test"]
                # When its time is over a wait for what else may come is still under way.
                assert not app.control.ping(timeout=0.2, destination=["nobody@test"], **options)
            s.send("early", app=app)
            wait_until_closed(own_server.client(), own_server.port)
            time.sleep(1)  # on purpose: until that wait should have been answered
    s.wait_done()


def test_events_and_a_cancelled_queue(own_server, site):
    s = site(own_server)
    s.worker("threads", c=2, words=("-E",))
    with s.command("events", "--dump") as dump:
        wait_until(lambda: "heartbeat" in dump.stdout, 15, lambda: str(dump))
        s.send("put", "a")
        s.send("early")
        wait_until(lambda: dump.stdout.count("task succeeded") == 2, 15, lambda: str(dump))
    assert s.app.control.cancel_consumer("celery", reply=True, timeout=3, destination=["w1@test"])
    n = s.send("early")
    m = s.send("put", "a")
    assert s.app.control.ping(timeout=3, destination=["w1@test"])
    assert s.of("S", n=n) == s.of("S", n=m) == []
    assert s.app.control.add_consumer("celery", reply=True, timeout=3, destination=["w1@test"])
    s.wait_done()
    s.check()


def test_purge_takes_keyed_and_plain_messages(own_server, site):
    s = site(own_server)
    for _ in range(5):
        s.send("put", "a")
        s.send("early")
        s.send("due", apply={"countdown": 3600})
    assert "15 messages" in run(s, "purge", "-f")
    s.produced.clear()
    s.nothing_left()
    s.worker("threads", c=2)
    s.send("put", "a")
    s.send("late")
    s.wait_done()
    s.check()


def test_beat(own_server, site):
    schedule = {"tick": {"task": "number", "schedule": 0.3, "kwargs": {"n": 1}}}
    s = site(own_server, conf={"beat_schedule": schedule})
    worker = s.worker("threads", c=2)
    with s.command("beat", "--loglevel", "INFO", "-s", str(s.folder / "beat")) as beat:
        wait_until(lambda: worker.log.count("Task number[") >= 6, 20, lambda: f"{beat}\n{worker.log}")
        beat.signal(15)
        beat.wait()


def test_flower(own_server, site):
    """It sees the worker and each task, and its remote control works."""
    s = site(own_server)
    s.worker("threads", c=2, words=("-E",))
    port = free_port()

    def ask(path):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5) as answer:
                return json.load(answer)
        except OSError:
            return {}

    with s.command(
        "flower", f"--port={port}", "--address=127.0.0.1", env={"FLOWER_UNAUTHENTICATED_API": "1"}
    ) as flower:
        wait_until(
            lambda: any(row.get("status") for row in ask("workers?json=1").get("data", [])), 20, lambda: str(flower)
        )
        s.send("put", "a")
        s.send("early")
        wait_until(
            lambda: sorted((task["name"], task["state"]) for task in ask("api/tasks").values())
            == [("early", "SUCCESS"), ("put", "SUCCESS")],
            20, lambda: f"{flower}\n{ask('api/tasks')}",
        )  # fmt: skip
        wait_until(lambda: "celery" in str(ask("api/workers?refresh=1")), 20, lambda: str(flower))
    assert "Traceback" not in s.workers[0].log
