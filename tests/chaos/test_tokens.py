"""Fencing tokens of a key never fall: not over restarts, expiry, FLUSHALL or a lost end of the append-only file."""

from __future__ import annotations

import itertools

import pytest

from tests.chaos.checker import judge
from tests.worker.rig import keys_on


def run_some(site, number):
    """One message on each shard; the tokens they saw."""
    for shard in range(site.shards):
        site.send(keys_on(shard, 1)[0], [number])
    site.wait_ended()
    return {e.shard: e.token for e in site.of("S") if e.n == number}


def rises(site):
    problems = [text for text in judge(site.events(), site.produced).problems if "token" in text]
    assert problems == []


def test_over_restart_and_expiry(own_server, site):
    site = site(own_server, lease=1.0)
    pod = site.pod(1)
    tokens = [run_some(site, 0)]
    pod.stop()
    pod = site.pod(2)
    tokens.append(run_some(site, 1))
    pod.kill_all()
    site.pod(1)
    tokens.append(run_some(site, 2))
    for before, after in itertools.pairwise(tokens):
        assert all(after[shard] > before[shard] for shard in range(site.shards))
    rises(site)


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_over_flushall(own_server, site, running):
    site = site(own_server, lease=1.0)
    pod = site.pod(2)
    before = run_some(site, 0)
    if not running:
        pod.stop()
    site.redis.flushall()
    if not running:
        pod = site.pod(2)
    after = run_some(site, 1)
    assert all(after[shard] >= before[shard] for shard in range(site.shards))
    pod.kill_all()
    site.pod(1)
    third = run_some(site, 2)
    assert all(third[shard] > after[shard] for shard in range(site.shards))
    rises(site)


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_over_an_append_only_file_that_lost_its_end(own_server_all, site, running):
    site = site(own_server_all, lease=1.0)
    pod = site.pod(1)
    first = run_some(site, 0)
    mark = own_server_all.written()
    pod.stop()
    pod = site.pod(2)
    second = run_some(site, 1)
    assert all(second[shard] > first[shard] for shard in range(site.shards))
    if not running:
        pod.kill_all()
    own_server_all.lose_since(mark)  # the second owners' tokens are gone
    if not running:
        site.pod(2)
    third = run_some(site, 2)
    assert all(third[shard] >= second[shard] for shard in range(site.shards))
    if running:
        pod.kill_all()
        site.pod(1)
        fourth = run_some(site, 3)
        assert all(fourth[shard] > third[shard] for shard in range(site.shards))
    rises(site)


def test_over_a_lost_hand_over_of_which_the_first_owner_lives(own_server_all, site):
    """A hands shards to B; Redis forgets that, and B dies with it: A's old tokens are below B's."""
    site = site(own_server_all, lease=1.0)
    site.pod(1)
    run_some(site, 0)
    mark = own_server_all.written()
    other = site.pod(1)
    site.ready(2)
    second = run_some(site, 1)
    own_server_all.kill()
    other.kill_all()
    own_server_all.lose_since(mark)  # all that came after B's start is gone
    third = run_some(site, 2)
    assert all(third[shard] >= second[shard] for shard in range(site.shards))
    rises(site)
