"""Which member owns which shard: even, stable, and the same whoever computes it."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamtask.coordination.assignment import assign

NAMES = [f"m{i:02}" for i in range(60)]
counts = st.integers(1, 50)
shard_counts = st.integers(0, 64)
seeds = st.integers(0, 2**32)


def random_owners(rng, shards, names, free=0.2):
    """Any state of the world: owners that are members or not, in any proportion, and shards without one."""
    weights = [rng.random() ** 3 for _ in names]
    return {s: rng.choices(names, weights)[0] for s in range(shards) if rng.random() > free}


def check_even(result, shards, members):
    """Every shard has exactly one owner, who is a member, and their counts differ by at most one."""
    assert sorted(result) == list(range(shards))
    assert set(result.values()) <= set(members)
    held = [Counter(result.values())[member] for member in members]
    assert max(held) - min(held) <= 1


def fewest_moves(shards, members, owners):
    """The least number of shards that can change owner, over all even assignments: of a member that holds h shards and
    may have q at most min(h, q) stay, and N % M members, best those that hold most, may have one more."""
    held = sorted((sum(owners.get(s) == m for s in range(shards)) for m in members), reverse=True)
    base, extra = divmod(shards, len(members))
    stay = sum(min(h, base + (rank < extra)) for rank, h in enumerate(held))
    return shards - stay


def moved(before, after):
    return sum(before.get(shard) != owner for shard, owner in after.items())


@given(shard_counts, counts, counts, seeds)
@settings(max_examples=300, deadline=None)
def test_any_state_becomes_even_with_the_fewest_moves(shards, members, former, seed):
    rng = random.Random(seed)
    live = rng.sample(NAMES, members)
    owners = random_owners(rng, shards, rng.sample(NAMES, former))

    result = assign(range(shards), live, owners)

    check_even(result, shards, live)
    assert moved(owners, result) == fewest_moves(shards, live, owners)


@given(shard_counts, counts, seeds)
@settings(deadline=None)
def test_an_even_assignment_stays(shards, members, seed):
    rng = random.Random(seed)
    live = rng.sample(NAMES, members)
    first = assign(range(shards), live, random_owners(rng, shards, live))

    assert assign(range(shards), live, first) == first


@given(shard_counts, st.integers(1, 49), seeds)
@settings(deadline=None)
def test_a_join_moves_only_shards_to_the_new_member(shards, members, seed):
    rng = random.Random(seed)
    *live, new = rng.sample(NAMES, members + 1)
    before = assign(range(shards), live, {})

    after = assign(range(shards), [*live, new], before)

    check_even(after, shards, [*live, new])
    changed = {shard for shard in after if after[shard] != before[shard]}
    assert {after[shard] for shard in changed} <= {new}
    assert len(changed) == shards // (members + 1)


@given(shard_counts, st.integers(2, 50), seeds)
@settings(deadline=None)
def test_a_leave_moves_only_the_shards_of_who_left(shards, members, seed):
    rng = random.Random(seed)
    gone, *live = rng.sample(NAMES, members)
    before = assign(range(shards), [gone, *live], {})

    after = assign(range(shards), live, before)

    check_even(after, shards, live)
    assert {shard for shard in after if after[shard] != before[shard]} == {s for s in before if before[s] == gone}


@given(shard_counts, counts, seeds, st.text(max_size=5))
@settings(deadline=None)
def test_every_process_computes_the_same(shards, members, seed, salt):
    rng = random.Random(seed)
    live = rng.sample(NAMES, members)
    owners = random_owners(rng, shards, NAMES)
    result = assign(range(shards), live, owners, salt)

    order = list(range(shards))
    for _ in range(3):
        rng.shuffle(live)
        rng.shuffle(order)
        items = list(owners.items())
        rng.shuffle(items)
        assert assign(order, live, dict(items), salt) == result


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 19)), max_size=30), st.integers(1, 32), seeds)
@settings(deadline=None)
def test_processes_that_take_what_is_theirs_converge(events, shards, seed):
    """Members come and go; each gives up what is not its own, and takes what is free: nobody ever holds two's, and when
    nothing changes any more, everybody has what the function says."""
    rng = random.Random(seed)
    live = {"m00"}
    owners = {}
    for join, number in events:
        name = NAMES[number]
        if join:
            live.add(name)
        elif len(live) > 1 and name in live:
            live.discard(name)
            owners = {s: m for s, m in owners.items() if m != name}
        step(rng, shards, live, owners)
    for _ in range(2 * shards + 2):
        step(rng, shards, live, owners)

    check_even(owners, shards, live)
    assert owners == assign(range(shards), sorted(live), owners)


def step(rng, shards, live, owners):
    """Each member, in some order, looks once and acts on what it sees."""
    members = sorted(live)
    rng.shuffle(members)
    for member in members:
        target = assign(range(shards), sorted(live), owners)
        for shard in [s for s, m in owners.items() if m == member and target[s] != member]:
            del owners[shard]
        for shard, wanted in assign(range(shards), sorted(live), owners).items():
            if wanted == member and shard not in owners:
                owners[shard] = member


def test_nobody_lives():
    assert assign(range(8), [], {0: "gone"}) == {}


def test_no_shards():
    assert assign([], ["a", "b"], {}) == {}


def test_more_members_than_shards():
    result = assign(range(3), ["a", "b", "c", "d", "e"], {0: "e", 1: "d", 2: "c"})

    assert result == {0: "e", 1: "d", 2: "c"}


def test_shards_need_not_begin_at_nought():
    result = assign([5, 9, 12], ["a", "b"], {5: "a", 9: "a", 12: "a"})

    assert sorted(Counter(result.values()).values()) == [1, 2]
    assert sorted(result) == [5, 9, 12]
    assert moved({5: "a", 9: "a", 12: "a"}, result) == 1


def test_the_larger_shares_of_different_queues_fall_on_different_members():
    members = ["a", "b", "c", "d"]
    larger = Counter()
    for queue in range(200):
        result = assign(range(5), members, {}, f"queue{queue}")
        larger[Counter(result.values()).most_common(1)[0][0]] += 1

    assert len(larger) == 4
    assert min(larger.values()) > 20


@pytest.mark.parametrize("members", range(1, 20))
def test_nothing_is_changed_in_what_is_given(members):
    live, owners = NAMES[:members], dict.fromkeys(range(16), "m00")

    assign(range(16), live, owners)

    assert live == NAMES[:members]
    assert owners == dict.fromkeys(range(16), "m00")
