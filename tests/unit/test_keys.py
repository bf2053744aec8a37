"""Key names: part of the wire contract, one slot a shard, and never one name for two things."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamtask.redis.keys import SHARED, QueueKeys, app_queues, fanout, result, segment

# Whatever a user may call an app, a queue or a group.
names = st.text(min_size=1, max_size=12, alphabet=st.characters(exclude_categories=["Cs"]))
nasty = st.text(min_size=1, max_size=8, alphabet=".{}:%~/\\ -_aA0é\U0001f600\n\x00*?[]")
any_name = names | nasty


def hash_tag(key):
    """What Redis Cluster hashes of a key."""
    start = key.find("{")
    end = key.find("}", start + 1)
    return key[start + 1 : end] if start >= 0 and end > start + 1 else key


def shard_keys(app, queue, epoch, shard, group="workers", namespace="streamtask"):
    k = QueueKeys(namespace, app, queue).shard(epoch, shard)
    return [
        k.stream, k.state, k.delayed, k.wake, k.dlq, k.requeued(group), k.lease(group), k.lease(group, "incarnation"),
        k.consumers(group), k.alive(group), k.token(group), k.notes(group), k.seen("p1.0"),
    ]  # fmt: skip


def test_the_names_that_the_design_fixes():
    k = QueueKeys("streamtask", "app", "queue").shard(0, 3)

    assert k.stream == "streamtask:{app.queue.0.3}:stream"
    assert k.state == "streamtask:{app.queue.0.3}:state"
    assert k.lease("workers") == "streamtask:{app.queue.0.3}:lease:workers"
    assert k.token("workers") == "streamtask:{app.queue.0.3}:token:workers"
    assert k.delayed == "streamtask:{app.queue.0.3}:delayed"
    assert k.seen("BUCKET") == "streamtask:{app.queue.0.3}:seen:BUCKET"
    assert k.dlq == "streamtask:{app.queue.0.3}:dlq"
    assert QueueKeys("streamtask", "app", "queue").meta == "streamtask:{app.queue}:meta"


@pytest.mark.parametrize(
    "text,expected",
    [
        ("emails-2_A", "emails-2_A"),
        ("a.b", "a%2Eb"),
        ("{a}", "%7Ba%7D"),
        ("a:b", "a%3Ab"),
        ("50%", "50%25"),
        ("~", "%7E"),
        ("a b/c", "a%20b%2Fc"),
        ("é", "%C3%A9"),
        ("%2E", "%252E"),
    ],
)
def test_user_text_is_percent_encoded(text, expected):
    assert segment(text) == expected


@given(any_name, any_name)
@example("a.b", "a%2Eb")
def test_different_texts_are_different_segments(one, other):
    assert (segment(one) == segment(other)) == (one == other)


@given(any_name)
def test_a_segment_can_end_nothing(text):
    assert re.fullmatch(r"[A-Za-z0-9_%-]+", segment(text))


@given(any_name, any_name, st.integers(0, 99), st.integers(0, 1023) | st.just(SHARED), any_name)
def test_all_keys_of_a_shard_have_one_hash_tag(app, queue, epoch, shard, group):
    found = shard_keys(app, queue, epoch, shard, group)

    assert {hash_tag(key) for key in found} == {f"{segment(app)}.{segment(queue)}.{epoch}.{shard}"}
    assert len(set(found)) == len(found)


place = st.tuples(any_name, any_name, st.integers(0, 30), st.integers(0, 30) | st.just(SHARED), any_name)


@given(place, place)
@example(("a", "b.0", 1, 1, "g"), ("a", "b", 0, 1, "g"))
@example(("a.b", "c", 0, 0, "g"), ("a", "b.c", 0, 0, "g"))
@example(("a", "b", 1, 11, "g"), ("a", "b", 11, 1, "g"))
@example(("a", "b", 0, 0, "g"), ("a", "b", 0, 0, "g:incarnation"))
@example(("a", "b}", 0, 0, "g"), ("a", "b", 0, 0, "g"))
def test_two_shards_have_no_key_in_common(one, other):
    if one[:4] != other[:4]:
        assert not set(shard_keys(*one)) & set(shard_keys(*other))
    elif one[4] != other[4]:
        # one shard, two groups: what belongs to a group differs
        assert len(set(shard_keys(*one)) & set(shard_keys(*other))) == 6


@given(any_name, any_name, any_name, any_name, any_name)
def test_keys_of_queues_apps_and_results_differ_from_each_other(app, queue, group, other, task_id):
    q = QueueKeys("streamtask", app, queue)
    found = [
        q.meta, q.revoked, q.members(group), q.member_info(group), q.channel(group), app_queues("streamtask", app),
        result("streamtask", app, task_id), *shard_keys(app, queue, 0, 0, group), *shard_keys(app, queue, 0, SHARED, group),
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    if other != app:
        others = QueueKeys("streamtask", other, queue)
        assert not {others.meta, others.revoked, app_queues("streamtask", other)} & set(found)
        assert result("streamtask", other, task_id) not in found


@given(any_name, any_name)
def test_each_result_has_a_slot_of_its_own(one, other):
    assert (hash_tag(result("s", "app", one)) == hash_tag(result("s", "app", other))) == (one == other)


@given(any_name, any_name)
def test_keys_of_a_queue_share_a_slot(app, queue):
    q = QueueKeys("streamtask", app, queue)

    assert {hash_tag(key) for key in (q.meta, q.revoked, q.members("g"), q.member_info("g"))} == {
        f"{segment(app)}.{segment(queue)}"
    }


@given(any_name, any_name, any_name, any_name)
@example("x/y", "z", "x", "y/z")
@example("x%2Fy", "z", "x/y", "z")
def test_the_channel_of_a_fanout_exchange_is_its_own(one, key, other, other_key):
    channel = fanout("s", "app", 0, one, key)
    assert (channel == fanout("s", "app", 0, other, other_key)) == ((one, key) == (other, other_key))


def test_a_fanout_exchange_of_an_ordinary_name_has_the_channel_that_it_had():
    assert fanout("s", "app", 3, "celery.pidbox") == "s:{app}:fanout:3:celery.pidbox"
    assert fanout("s", "app", 3, "celeryev", "task.#") == "s:{app}:fanout:3:celeryev/task.#"
    assert fanout("s", "app", 3, "a/b%", "c/d") == "s:{app}:fanout:3:a%2Fb%25/c/d"
