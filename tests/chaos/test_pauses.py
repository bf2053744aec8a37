"""Workers stopped by SIGSTOP for longer than their lease: another takes over, and the old one can change nothing."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.chaos.checker import START
from tests.helpers import Starved, is_alive, wait_until
from tests.worker.rig import keys_on

LEASE = 1.0


def failures(site, shard):
    """Attempts, due times and holds that are stored; the new owner may write start marks meanwhile."""
    notes = site.redis.hgetall(site.keys.shard(0, shard).notes("workers"))
    parts = {entry: note.split() for entry, note in notes.items()}
    return {entry: (p[0], p[1], p[5]) for entry, p in parts.items() if (p[0], p[1], p[5]) != (b"0", b"0", b"0")}


def stop_and_take_over(site, *, group, outcome, concurrency=1):
    """Stops the process that runs a body until another pod has its shard, and looks at all that the old one does."""
    first, second = site.pod(1, concurrency), site.pod(1, concurrency)
    site.ready(2)
    old = first.children()[0]
    shard = next(shard for shard in range(site.shards) if site.pid_of(shard) == old)
    key, other = keys_on(shard, 2)
    site.send_gated(key, 0)
    site.wait_started(key, 0)
    site.send(key, range(1, 60))
    if concurrency == 1:
        site.send(other, range(60))
        wait_until(lambda: len(site.pending(shard)) == 120, message=lambda: f"prefetched: {len(site.pending(shard))}")

    stopped, starved = time.monotonic(), Starved()
    if group:
        first.spawned.signal_group(signal.SIGSTOP)
    else:
        os.kill(old, signal.SIGSTOP)
    again = site.wait_started(key, 0, count=2, timeout=LEASE + 6)
    took = again.at - stopped
    assert again.pid == second.children()[0]
    assert took - starved.seconds <= LEASE + 1, f"the takeover took {took:.2f} s"
    owner = site.leases()[shard]
    pending = [row["message_id"] for row in site.pending(shard)]

    continued = time.monotonic()
    if group:
        first.spawned.signal_group(signal.SIGCONT)
    elif is_alive(old):
        os.kill(old, signal.SIGCONT)
    site.open_gate(0, old, outcome)
    # It ends its body and tries to settle, or was ended by its supervisor; then it has had time to do harm.
    wait_until(lambda: not is_alive(old) or [e for e in site.events() if e.pid == old and e.kind in "EF"])
    time.sleep(0.3)
    left = [row["message_id"] for row in site.pending(shard)]
    assert left[0] == pending[0], "the old owner settled something"
    assert concurrency > 1 or left == pending, "the old owner settled something"
    assert failures(site, shard) == {}, "the old owner noted a retry"
    assert site.dead() == []
    assert site.leases()[shard] == owner

    site.open_gate(0)
    site.wait_ended()
    late = [e for e in site.events() if e.pid == old and e.kind == START and e.at > continued]
    starts = [e for e in late if e.token < owner[1] and e.shard == shard]
    assert starts == [], "the old owner started what it had prefetched"
    site.check(excused=[old])
    # The pod works again, with this process or another.
    site.ready(2)
    assert first.children(), first.log
    for shard in range(site.shards):
        site.send(keys_on(shard, 1)[0] + "x", range(5))
    site.wait_ended()
    site.wait_empty()
    assert site.dead() == []
    wait_until(lambda: not site.stale_consumers(), LEASE + 2, lambda: f"stale consumers {site.stale_consumers()}")
    return took


@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
def test_a_stopped_worker_loses_its_shards_and_changes_nothing_afterwards(own_server_all, site, group):
    took = stop_and_take_over(site(own_server_all, lease=LEASE), group=group, outcome="ok")
    print(f"took over from a stopped {'group' if group else 'process'} in {took:.2f} s (lease {LEASE} s)")


@pytest.mark.parametrize("outcome", ["fail", "reject"])
def test_a_stopped_group_neither_retries_nor_dead_letters(own_server, site, outcome):
    stop_and_take_over(site(own_server, lease=LEASE), group=True, outcome=outcome, concurrency=4)


@pytest.mark.parametrize("outcome", ["fail", "reject"])
def test_a_stopped_process_neither_retries_nor_dead_letters(own_server, site, outcome):
    stop_and_take_over(site(own_server, lease=LEASE), group=False, outcome=outcome)


def test_a_short_stop_costs_nothing(own_server, site):
    """Shorter than the lease: the shard stays, nothing runs twice."""
    site = site(own_server, lease=3.0)
    first, _ = site.pod(1), site.pod(1)
    site.ready(2)
    before = site.leases()
    for shard in range(site.shards):
        site.send(keys_on(shard, 1)[0], range(100), ms=2)
    old = first.children()[0]
    site.wait_started()
    os.kill(old, signal.SIGSTOP)
    time.sleep(0.8)
    os.kill(old, signal.SIGCONT)
    site.wait_ended()
    assert site.check(killed={}).repeated == 0
    assert site.leases() == before


def test_an_unkeyed_message_of_a_stopped_process_runs_elsewhere(own_server, site):
    source = """
app = make_app()

@app.task(name="free")
def free(n):
    note("S", None, n)
    while n == 0 and not os.path.exists(f"gate-0-{os.getpid()}"):
        time.sleep(0.005)
    note("E", None, n)
"""
    site = site(own_server, source, lease=LEASE)
    pods = [site.pod(1), site.pod(1)]
    site.ready(2)
    site.send(None, [0])
    old = site.wait_started(n=0).pid
    site.send(None, range(1, 200))
    pod = next(pod for pod in pods if old in pod.children())
    pod.spawned.signal_group(signal.SIGSTOP)
    stopped = time.monotonic()
    new = site.wait_started(n=0, count=2, timeout=LEASE + 6)
    assert new.at - stopped <= LEASE + 1
    entries = site.pending("shared")
    continued = time.monotonic()
    pod.spawned.signal_group(signal.SIGCONT)
    site.open_gate(0, old)
    wait_until(lambda: not is_alive(old) or [e for e in site.events() if e.pid == old and e.kind == "E" and e.n == 0])
    time.sleep(0.3)
    still = [row["message_id"] for row in site.pending("shared")]
    assert entries[0]["message_id"] in still, "the old consumer acknowledged what another one runs"
    site.open_gate(0, new.pid)
    site.wait_ended()
    site.wait_empty()
    site.check(excused=[old])
    early = [e for e in site.events() if e.pid == old and e.kind == START and e.at > continued and e.token < new.token]
    assert early == []
    site.ready(2)
    wait_until(lambda: not site.stale_consumers(), LEASE + 2, lambda: f"stale consumers {site.stale_consumers()}")
