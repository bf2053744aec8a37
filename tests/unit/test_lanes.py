"""Lanes: the order of one key's messages, and what they may take of memory."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamtask.coordination.lease import Lease
from streamtask.queue import lanes as lanes_module
from streamtask.queue.consumer import ShardConsumer
from streamtask.queue.delivery import Delivery, Kind, Outcome
from streamtask.queue.lanes import KEEP_BODIES, LaneSet, put_in_place
from streamtask.queue.rules import ConsumerSettings
from streamtask.redis import wire
from streamtask.redis.keys import QueueKeys
from streamtask.redis.wire import Note, id_order
from tests.helpers import end_batch
from tests.one_link import OneLink


def message(ms, seq=0, key=b"k"):
    return Delivery(b"%d-%d" % (ms, seq), ["task", key, b"i" * 16, [], {}, None])


def entry_id(item):
    return item if isinstance(item, bytes) else item.entry_id


def bodies(lane):
    return sum(isinstance(item, Delivery) for item in lane.waiting)


def ids(lane):
    return [entry_id(item) for item in lane.waiting]


@pytest.mark.parametrize(
    "smaller,larger", [(b"9-0", b"10-0"), (b"1-9", b"1-10"), (b"1-18446744073709551615", b"2-0"), (b"99-5", b"100-0")]
)
def test_entry_ids_are_ordered_as_numbers(smaller, larger):
    assert id_order(smaller) < id_order(larger)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 30)), unique=True, max_size=120), st.booleans())
def test_messages_come_out_in_the_order_of_their_entry_ids_however_they_came_in(order, read_as_ids):
    lanes = LaneSet()
    lane = lanes.start(b"k")
    for ms, seq in order:
        item = message(ms, seq)
        lanes.add(lane, item.entry_id if read_as_ids else item)
    lanes.finish(b"k")

    assert lanes.waiting == len(order)
    out = []
    while lanes.get(b"k") is not None:
        for ready in list(lanes.ready()):
            assert ready is lane
            lane.running = True
            out.append(entry_id(lanes.pop(lane)))
        lanes.finish(b"k")
        if not order:
            break
    assert out == [b"%d-%d" % one for one in sorted(order)]
    assert lanes.waiting == 0


@given(st.integers(0, 200), st.randoms())
def test_at_most_16_bodies_of_a_lane_are_kept(count, rng):
    lanes = LaneSet()
    lane = lanes.start(b"k")
    order = list(range(1, count + 1))
    rng.shuffle(order)
    for ms in order:
        lanes.add(lane, message(ms))
        assert bodies(lane) <= KEEP_BODIES
    assert KEEP_BODIES == 16
    assert bodies(lane) == min(count, 16)
    assert len(lane.waiting) == count


def test_what_is_kept_as_an_id_alone_loses_no_attempts():
    """A message with a note is kept whole: its attempts are not in the stream."""
    lanes = LaneSet()
    lane = lanes.start(b"k")
    for ms in range(1, 40):
        lanes.add(lane, message(ms))
    failed = message(50)
    failed.note = Note(attempt=2)

    lanes.add(lane, failed)

    assert lane.waiting[-1] is failed


def test_a_failed_head_goes_back_before_its_followers():
    lanes = LaneSet()
    lanes.start(b"k")
    lane = lanes.get(b"k")
    for ms in (5, 6, 7):
        lanes.add(lane, message(ms))
    head = message(4)
    head.note = Note(attempt=1)

    lanes.close(b"k", head, due=10.0)

    assert ids(lane) == [b"4-0", b"5-0", b"6-0", b"7-0"]
    assert list(lanes.ready()) == []
    assert lanes.next_due() == 10.0
    lanes.open_due(9.999)
    assert list(lanes.ready()) == []
    lanes.open_due(10.0)
    assert list(lanes.ready()) == [lane]
    assert lanes.pop(lane) is head


def test_a_free_key_has_no_lane():
    lanes = LaneSet()
    assert lanes.get(b"k") is None
    lanes.start(b"k")
    assert len(lanes) == 1
    lanes.finish(b"k")
    assert lanes.get(b"k") is None
    assert len(lanes) == 0
    lanes.finish(b"unknown")


def test_a_running_lane_hands_nothing_out():
    lanes = LaneSet()
    lane = lanes.start(b"k")
    lanes.add(lane, message(1))

    assert not lanes.has_ready()
    lanes.open_due(1e9)
    assert list(lanes.ready()) == []


def test_a_lane_that_is_held_opens_only_when_told():
    lanes = LaneSet()
    lane = lanes.close(b"k", message(1), due=None)
    lanes.add(lane, message(2))

    lanes.open_due(float("inf"))
    assert lanes.next_due() is None
    assert list(lanes.ready()) == []
    lanes.open(lane)
    assert list(lanes.ready()) == [lane]


def test_a_later_due_time_replaces_an_earlier_one():
    lanes = LaneSet()
    lane = lanes.close(b"k", message(1), due=5.0)
    lanes.close(b"k", None, due=50.0)

    assert lanes.next_due() == 50.0
    lanes.open_due(6.0)
    assert list(lanes.ready()) == []
    lanes.open_due(50.0)
    assert list(lanes.ready()) == [lane]


def test_lanes_fall_due_in_the_order_of_their_times():
    lanes = LaneSet()
    made = {due: lanes.close(due, message(1), due=float(due)) for due in (3, 1, 2)}

    assert lanes.next_due() == 1.0
    lanes.open_due(2.0)
    assert list(lanes.ready()) == [made[1], made[2]]
    assert lanes.next_due() == 3.0


def test_a_ready_lane_is_shown_once():
    lanes = LaneSet()
    lane = lanes.close(b"k", message(1), due=1.0)
    lanes.open_due(1.0)
    assert list(lanes.ready()) == [lane]
    assert list(lanes.ready()) == []
    lanes.open(lane)
    lanes.open(lane)
    shown = []
    for one in lanes.ready():
        one.running = True
        shown.append(one)
    assert shown == [lane]


def test_an_empty_lane_is_dropped_and_a_full_one_is_not():
    lanes = LaneSet()
    lane = lanes.close(b"k", message(1), due=None)
    lanes.drop(lane)
    assert lanes.get(b"k") is lane
    lanes.pop(lane)
    lanes.drop(lane)
    assert lanes.get(b"k") is None
    successor = lanes.start(b"k")
    lanes.drop(lane)
    assert lanes.get(b"k") is successor


def test_all_waiting_entry_ids_are_told():
    lanes = LaneSet()
    for key in (b"a", b"b"):
        lane = lanes.start(key)
        for ms in range(20):
            lanes.add(lane, message(ms, key=key))

    assert sorted(lanes.entry_ids()) == sorted([b"%d-0" % ms for ms in range(20)] * 2)
    assert lanes.waiting == 40


@given(st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_whatever_happens_each_key_runs_in_order_and_alone(seed):
    """Messages of some keys arrive, run, fail and end in a random order; the model is a sorted list a key."""
    rng = random.Random(seed)
    lanes = LaneSet()
    now, ms = 0.0, 0
    running, done = {}, {}
    for _ in range(200):
        now += 1
        action = rng.random()
        if action < 0.5:
            ms += 1
            key = rng.choice([b"a", b"b", b"c"])
            item = message(ms, key=key)
            lane = lanes.get(key)
            if lane is None:
                assert key not in running
                lanes.start(key)
                running[key] = item
            else:
                lanes.add(lane, item)
        elif running:
            key = rng.choice(sorted(running))
            item = running.pop(key)
            if action < 0.65:
                lanes.close(key, item, due=now + rng.randint(0, 5))
            else:
                done.setdefault(key, []).append(entry_id(item))
                lanes.finish(key)
        lanes.open_due(now)
        for lane in lanes.ready():
            if not lane.waiting:
                lanes.drop(lane)
                continue
            assert lane.key not in running, "two of a key at once"
            running[lane.key] = lanes.pop(lane)
            lane.running = True
    for entries in done.values():
        assert entries == sorted(entries, key=id_order)
    assert lanes.waiting + len(running) + sum(map(len, done.values())) == ms


@given(*[st.integers(0, 10**15)] * 6)
def test_a_note_is_read_as_it_was_written(attempt, due, crashes, mark, charged, held):
    note = Note(attempt, due, crashes, mark, charged, held)

    assert Note.parse(note.format().encode()) == note


def test_what_a_retry_waits_under():
    keyed, free = message(1), message(2, key=None)
    assert keyed.lane_key == b"k"
    assert free.lane is None
    assert free.lane_key != message(3, key=None).lane_key


# --- long lanes ----------------------------------------------------------------------------------------------------


class Counted(deque):
    """Counts the items that are looked at, one by one or by a walk."""

    touched = 0

    def __iter__(self):
        for item in super().__iter__():
            self.touched += 1
            yield item

    def __getitem__(self, index):
        self.touched += 1
        return super().__getitem__(index)

    def insert(self, index, item):
        self.touched += min(index, len(self) - index)
        super().insert(index, item)


class Stream:
    """In place of a link: answers XRANGE of one entry, and counts round trips."""

    def __init__(self):
        self.round_trips = 0

    def pipeline(self, packed):
        self.round_trips += 1
        found = []
        for command in packed:
            entry = command.split(b"\r\n")[6]
            number = int(entry.partition(b"-")[0])
            found.append([[entry, [b"m", wire.encode("task", b"k", b"i" * 16, [number], {})]]])
        return found


def owner_of_a_lane(followers, link, **more):
    keys = QueueKeys("streamtask", "app", "q").shard(0, 0)
    lease = Lease(keys, "workers", "incarnation", 5000, False, 7, 0.0, False)
    consumer = ShardConsumer(lease, "q", 0, ConsumerSettings(**more), OneLink(link))
    lane = consumer.backlog.lanes.close(b"k", None, None)
    lane.waiting = Counted(b"%d-0" % n for n in range(1000, 1000 + followers))
    consumer.backlog.lanes.waiting = followers
    consumer.backlog.lanes.open(lane)
    return consumer, lane


def drain_side_by_side(followers):
    link, ran = Stream(), []
    consumer, lane = owner_of_a_lane(followers, link)
    for _ in range(320):
        batch = consumer.hand_out_free(4)
        assert len(batch.ids) == 1, "one of a key at a time"
        ran.append(batch.deliveries[0].args[0])
        end_batch(batch)
    assert ran == list(range(1000, 1320))
    return lane.waiting.touched, link.round_trips


def drain_in_sequence(followers):
    link, ran = Stream(), []
    consumer, lane = owner_of_a_lane(followers, link)
    while len(ran) < 800:
        batch = consumer.hand_out(200)
        ran += [delivery.args[0] for delivery in batch.deliveries]
        consumer.backlog.complete(batch)
    assert ran == list(range(1000, 1800))
    return lane.waiting.touched, link.round_trips


def fail_a_head(followers):
    """At concurrency 1 what lies behind it in its batch is skipped, and goes back as well."""
    link = Stream()
    consumer, lane = owner_of_a_lane(followers, link)
    batch = consumer.hand_out(200)
    batch.outcomes = [(0, Outcome(Kind.RETRY, delay_s=0.0)), *((n, Outcome(Kind.SKIPPED)) for n in range(1, 200))]
    consumer.backlog.complete(batch)
    assert [entry_id(lane.waiting.popleft()) for _ in range(300)] == [b"%d-0" % n for n in range(1000, 1300)]
    return lane.waiting.touched, link.round_trips


@pytest.mark.parametrize("work", [drain_side_by_side, drain_in_sequence, fail_a_head])
def test_what_a_message_costs_does_not_depend_on_how_many_wait_behind_it(work):
    few, round_trips = work(1000)
    many, same = work(1_000_000)

    assert many <= few * 1.1
    assert few < 40_000
    assert round_trips == same <= 20


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 30)), unique=True, max_size=150))
def test_whatever_comes_finds_its_place(order):
    items = deque()
    for ms, seq in order:
        put_in_place(items, b"%d-%d" % (ms, seq))

    assert list(items) == [b"%d-%d" % one for one in sorted(order)]


@pytest.mark.parametrize("place", [1, 150, 500_000, 999_850, 999_999])
def test_a_place_is_found_with_few_looks(monkeypatch, place):
    items = deque(b"%d-0" % n for n in range(0, 2_000_000, 2))
    looks = []
    monkeypatch.setattr(lanes_module, "id_order", lambda entry: looks.append(entry) or id_order(entry))

    put_in_place(items, b"%d-0" % (2 * place - 1))

    assert items[place] == b"%d-0" % (2 * place - 1)
    assert len(looks) < 80


def test_many_open_lanes_are_not_walked_for_each_message():
    lanes = LaneSet()
    for n in range(1000):
        lanes.open(lanes.close(n, message(n + 1, key=n), None))

    for n in range(1000):
        lane = next(iter(lanes.peek_ready()))
        assert lane is next(lanes.ready())
        assert lane.key == n
        lanes.pop(lane)
        lanes.drop(lane)
        assert len(lanes._ready) == 999 - n
    assert not lanes.has_ready()


def test_what_is_read_again_was_another_owners_where_it_was_pending_at_the_takeover():
    """Its body gets a start mark, also where only its id was kept."""
    consumer, _ = owner_of_a_lane(1000, Stream())
    consumer.backlog.others_to = (1003, 0)

    batch = consumer.hand_out(10)

    assert [delivery.fresh for delivery in batch.deliveries] == [False] * 4 + [True] * 6
