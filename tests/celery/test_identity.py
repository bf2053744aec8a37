"""What has one task id in several messages: none of them is taken for a repeat of another and dropped."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.helpers import wait_until
from tests.parts import sampled


@pytest.mark.parametrize(
    "name, key", sampled([("early", None), ("late", None), ("put", "a")], ("late", None), ("put", "a"))
)
def test_two_publishes_with_one_task_id(own_server, site, name, key):
    s = site(own_server)
    for _ in range(5):
        s.send(name, key, apply={"task_id": "one-id"})
        s.send(name, key, apply={"task_id": "one-id"})
    s.worker("threads", c=2)
    s.wait_done()
    s.check()
    assert len(s.of("S")) == 10


def test_a_publish_with_the_same_arguments_twice(own_server, site):
    s = site(own_server)
    n = s.send("put", "a", apply={"task_id": "one-id"})
    s.send("put", "a", n=n, apply={"task_id": "one-id"})
    s.worker("threads", c=2)
    wait_until(lambda: len(s.of("E", n=n)) == 2, 15, lambda: str(s))


@pytest.mark.parametrize("name", sampled(["early", "late"], "late"))
def test_retries_share_their_task_id(own_server, site, name):
    s = site(own_server)
    s.worker(c=2)
    numbers = [s.send(name, fail=i % 4, countdown=0.05) for i in range(20)]
    s.wait_done()
    s.check()
    starts = Counter(event.n for event in s.of("S"))
    assert [starts[n] for n in numbers] == [i % 4 + 1 for i in range(20)]
    s.nothing_left()


def test_a_replacement_has_the_id_of_what_it_replaces(own_server, site):
    """Keyed ones too: the replacement is a new message of its key, and the lane does not wait for it for ever."""
    s = site(own_server)
    s.worker(c=2)
    plain = [s.send("replaced") for _ in range(5)]
    keyed = [s.send("replaced_keyed", "a") for _ in range(5)]
    s.wait_done()
    assert {event.n for event in s.of("E")} == {*plain, *keyed}
    assert Counter(event.n for event in s.of("S")) == dict.fromkeys([*plain, *keyed], 1)
    assert [event.n for event in s.of("S", key="a")] == keyed
    s.nothing_left()


def test_chord_unlock_retries_until_its_header_is_done(own_server, site, tmp_path):
    """With a result backend that has no chords of its own, a task polls for the header by retrying itself."""
    results = tmp_path / "results"
    results.mkdir()
    s = site(own_server, conf={"result_backend": f"file://{results}", "result_chord_retry_interval": 0.1})
    s.worker(c=2)
    n = s.send("summed", count=12)
    s.wait("E", n, timeout=30)
    assert s.of("S", n=n)[0].more == {"total": sum(range(12))}
    assert "celery.chord_unlock" in s.workers[0].log
    s.nothing_left()
