"""The append-only file loses what was written last, at whatever place, while every process lives."""

from __future__ import annotations

import random

import pytest

from tests.helpers import wait_until
from tests.worker.rig import keys_on


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_second_is_lost_again_and_again(own_server_all, site, concurrency):
    """Nothing that was acknowledged runs again, and no message starts after a later one of its key."""
    site = site(own_server_all)
    site.pod(2, concurrency)
    site.ready(2)
    for shard in range(site.shards):
        for key in keys_on(shard, 3):
            site.send(key, range(60), ms=1)
    chance = random.Random(concurrency)
    for _ in range(3):
        before = len(site.of("E"))
        site.wait_started()
        mark = own_server_all.written()
        most = min(before + 200, sum(map(len, site.produced.values())))
        wait_until(lambda most=most: len(site.of("E")) >= most, 30, lambda: f"they run: {site}")
        own_server_all.lose_since(mark, chance.uniform(0.1, 1.0))
    site.wait_ended()
    assert site.check(killed={}).repeated == 0
    site.wait_empty()
