"""What is looked at before kombu and Celery see a message, each check by itself."""

from __future__ import annotations

import datetime as dt
from typing import Any
from unittest.mock import MagicMock

import pytest
from celery import Celery, chord, group
from kombu.transport.memory import Channel
from kombu.transport.virtual import Message

from streamtask.celery.receipt import fault_of
from streamtask.errors import DecodeError
from streamtask.queue.delivery import Delivery
from streamtask.transport import message
from tests.celery.malformed import AT_FETCH, AT_RECEIPT, JUST_FAILS, REJECTED, parts


def of_each(cases: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(why, case, id=f"{why} {number}") for why in cases for number, case in enumerate(cases[why])]


@pytest.mark.parametrize("why, case", of_each(AT_FETCH))
def test_what_is_no_message_of_kombus_is_refused_when_it_is_fetched(why: str, case: Any) -> None:
    with pytest.raises(DecodeError, match=why):
        message.check(case)


def received(case: list[Any]) -> Message:
    message.check(case)
    payload = message.decode(Delivery(b"5-1", ["late", None, b"i" * 16, case, {}, None]))
    message.address(payload, "tag", again=False)
    found = Message(payload, channel=MagicMock(decode_body=message.decode_body))
    found.accept = {"application/json"}
    return found


@pytest.mark.parametrize("why, case", of_each(AT_RECEIPT))
def test_what_no_task_can_be_made_of_is_refused_when_it_is_received(why: str, case: Any) -> None:
    fault = fault_of(received(case))
    assert fault is not None
    assert why in fault


@pytest.mark.parametrize("case", [*REJECTED, *JUST_FAILS])
def test_the_rest_is_left_to_celery(case: Any) -> None:
    found = received(case)
    assert fault_of(found) is None
    assert "streamtask_delivery" not in found.headers


@pytest.mark.parametrize("encoding", [None, "base64", "utf-8", "UTF-8"])
def test_encoded_bodies(encoding: str | None) -> None:
    body = "W1tdLCB7Im4iOiAwfSwge31d" if encoding == "base64" else "[[], {}, {}]"
    assert received(parts(body, properties={"body_encoding": encoding})).payload[0] == []


@pytest.mark.parametrize("serializer", ["json", "pickle"])
@pytest.mark.parametrize("protocol", [1, 2])
def test_what_celery_sends_is_fine(protocol: int, serializer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    app = Celery("sender", broker="memory://", set_as_current=False)
    app.conf.update(
        task_protocol=protocol, task_serializer=serializer, task_default_queue=f"fine-{protocol}-{serializer}"
    )
    sent: list[dict[str, Any]] = []
    original = Channel.basic_publish

    def publish(channel: Any, prepared: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        sent.append(prepared)
        return original(channel, prepared, *args, **kwargs)

    monkeypatch.setattr(Channel, "basic_publish", publish)

    @app.task(name="add", shared=False, ignore_result=True)
    def add(*args: int, **kwargs: int) -> None: ...

    add.delay(1, two=2)
    add.apply_async((1,), countdown=5, expires=60, time_limit=10, soft_time_limit=5.5, shadow="other", task_id="an id")
    add.apply_async(
        eta=dt.datetime(2030, 1, 1, tzinfo=dt.timezone.utc), expires=dt.datetime(2031, 1, 1, tzinfo=dt.timezone.utc)
    )
    add.apply_async(link=add.si(1), link_error=add.si(2), compression="zlib", headers={"mine": {"a": 1}}, task_id=7)
    (add.si(1) | add.si(2)).apply_async()
    group(add.si(1), add.si(2)).apply_async()
    chord([add.si(1)], add.si(2), app=app).freeze()
    stamped = add.si(1)
    stamped.stamp(mark="here", append_stamps=True)
    stamped.apply_async()
    add.chunks([(1,), (2,)], 1).apply_async()
    assert len(sent) >= 9
    for one in sent:
        case = [one["body"], one["content-type"], one["content-encoding"], one["headers"], one["properties"]]
        found = received(case)
        found.accept = {"application/json", "application/x-python-serialize"}
        assert fault_of(found) is None
    app.close()
