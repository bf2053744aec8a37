"""What a worker process costs that has nothing to do."""

from __future__ import annotations

import os
import time

import pytest

from tests.helpers import wait_until
from tests.worker.rig import keys_on

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_process_sleeps_when_all_is_done_and_while_a_body_waits(redis_server, site, concurrency):
    site = site(redis_server)
    pod = site.pod(1, concurrency)
    site.ready(1)
    (child,) = pod.children()
    keys = [keys_on(shard, 1)[0] for shard in range(4)]
    for key in keys:
        site.send(key, range(20))
    site.wait_ended(80)
    site.wait_empty()
    before = cpu_s(child)
    time.sleep(1)
    assert cpu_s(child) - before < 0.3, "an idle process spins"
    site.task("gated").delay(k=keys[0], n=20)
    wait_until(lambda: site.started(keys[0])[-1:] == [20])
    time.sleep(0.1)
    before = cpu_s(child)
    time.sleep(1)
    assert cpu_s(child) - before < 0.3, "a process spins while a body waits"
    site.open_gate(20)
    site.wait_ended(81)


def test_a_process_sleeps_while_others_run_what_it_could_have_run(redis_server, site):
    """Entries that others hold lie in the stream behind the last that this one was given."""
    site = site(redis_server)
    site.audit_s = 60.0
    for _ in range(2):
        site.pod(1, 4)
    site.ready(2)
    for n in range(5):
        site.send(None, [n], ms=2500)
    first = site.wait_started(None, count=5)
    calls = [site.redis.info("commandstats")["cmdstat_xread"]["calls"]]
    time.sleep(1)
    calls.append(site.redis.info("commandstats")["cmdstat_xread"]["calls"])
    assert time.monotonic() - first.at > 2.5 or calls[1] - calls[0] < 50, "an idle process spins"
    site.wait_ended()
