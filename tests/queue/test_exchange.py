"""Many produce calls in one write: nobody gets an answer that is another's."""

from __future__ import annotations

import pytest

from streamtask import StreamTask
from streamtask.errors import ReplyError
from streamtask.redis.link import pack


def test_what_fails_before_the_answers_are_read_leaves_none_to_the_next(redis_server):
    """While Redis is at work the next batch is prepared, which may have to declare the queue anew, in vain."""
    app = StreamTask("t", broker=redis_server.url)
    producer, key = app.sender.producer, app.queue("default").keys.meta

    def refused() -> None:
        raise ReplyError("the queue was declared by others meanwhile")

    assert producer.exchange(key, [pack("ECHO", "first")], None) == [b"first"]
    with pytest.raises(ReplyError, match="by others"):
        producer.exchange(key, [pack("ECHO", "second")], None, refused)
    answers = producer.exchange(key, [pack("ECHO", "third")], None)
    app.close()
    assert answers == [b"third"]
