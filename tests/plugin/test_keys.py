"""The shard key of a call, as its message carries it. Over kombu's memory broker, which keeps all headers."""

from __future__ import annotations

import copy
import enum
import functools
import gc
import itertools
import logging
import os
import types
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.app.amqp import AMQP

import streamtask.celery  # noqa: F401
from streamtask.celery.brokers import look_at_broker
from streamtask.celery.publish import _calling, stamp_missed
from streamtask.errors import ConfigError, ShardKeyError
from streamtask.transport.message import PRIVATE

numbers = itertools.count()


class Apps:
    """Makes apps, each with a queue of its own, and takes messages out of it."""

    def __init__(self) -> None:
        self.made: list[Celery] = []

    def __call__(self, **settings: Any) -> Celery:
        app = Celery(
            f"app{next(numbers)}", broker="memory://", set_as_current=False, backend=settings.pop("backend", None)
        )
        app.conf.update(task_default_queue=f"q{next(numbers)}", task_publish_retry=False, **settings)
        app.task = functools.partial(app.task, shared=False)  # else the apps of later tests have the tasks, too
        self.made.append(app)
        return app

    def messages(self, app: Celery) -> list[Any]:
        found = []
        with app.connection_for_read() as connection, connection.SimpleQueue(app.conf.task_default_queue) as queue:
            while True:
                try:
                    found.append(queue.get_nowait())
                except Empty:
                    return found

    def message(self, app: Celery) -> Any:
        (message,) = self.messages(app)
        return message

    def headers(self, app: Celery) -> dict[str, Any]:
        headers: dict[str, Any] = self.message(app).headers
        return headers


@pytest.fixture
def apps() -> Iterator[Apps]:
    apps = Apps()
    yield apps
    for app in apps.made:
        app.close()
    gc.collect()  # a dead app's tasks are no longer found by name


def nothing(*args: Any) -> None: ...


def pay(user_id: Any, amount: int = 0, *, order: Any = None) -> None: ...


class Colour(enum.IntEnum):
    RED = 7


UUID = uuid.UUID("12345678-1234-5678-1234-567812345678")


@pytest.mark.parametrize("protocol", [1, 2])
@pytest.mark.parametrize(
    "shard_key, args, kwargs, key",
    [
        ("user_id", (7,), {}, "7"),
        ("user_id", (), {"user_id": "seven"}, "seven"),
        ("user_id", (UUID,), {}, str(UUID)),
        ("user_id", (Colour.RED,), {}, "7"),
        ("user_id", (b"\xff\x00",), {}, b"\xff\x00"),
        ("amount", (7,), {}, "0"),
        ("order.user.id", (7,), {"order": {"user": {"id": 8}}}, "8"),
        ("order.user.id", (7,), {"order": {"user": types.SimpleNamespace(id=8)}}, "8"),
        (lambda user_id, amount, order: f"{user_id}-{amount}", (7,), {"amount": 3}, "7-3"),
        (lambda *args, **kwargs: str(sorted(kwargs)), (7,), {"order": 1}, "['order']"),
    ],
)
def test_a_key_is_taken_from_the_arguments(
    apps: Apps, protocol: int, shard_key: Any, args: Any, kwargs: Any, key: Any
) -> None:
    app = apps(task_protocol=protocol, task_serializer="pickle", accept_content=["pickle"])
    task = app.task(pay, name="pay", shard_key=shard_key)
    task.apply_async(args, kwargs)
    headers = apps.headers(app)
    assert headers["shard_key"] == key
    assert not {"shard_ordered", "streamtask_delivery", "streamtask_replaces"} & headers.keys()


def test_tasks_of_all_makes(apps: Apps) -> None:
    app = apps()

    @app.task(bind=True, shard_key="user_id")
    def bound(self: Any, user_id: int) -> None: ...

    @app.task(shard_key="user_id", autoretry_for=(ValueError,))
    def retrying(user_id: int) -> None: ...

    @app.task(bind=True, shard_key="user_id", autoretry_for=(ValueError,))
    def bound_retrying(self: Any, user_id: int) -> None: ...

    @app.task(shard_key=staticmethod(lambda user_id: user_id))
    def static(user_id: int) -> None: ...

    class ByClass(app.Task):  # type: ignore[misc, name-defined]
        name = "by-class"
        shard_key = "user_id"

        def run(self, user_id: int) -> None: ...

    by_class = app.register_task(ByClass())
    for task in (bound, retrying, bound_retrying, static, by_class):
        task.delay(7)
        assert apps.headers(app)["shard_key"] == "7", task.name


def test_a_task_without_a_key_gets_no_header(apps: Apps) -> None:
    app = apps()
    app.task(pay, name="pay").delay(7)
    assert not set(PRIVATE) & apps.headers(app).keys()


def test_ordered_false_is_said_in_the_message(apps: Apps) -> None:
    app = apps()
    app.task(pay, name="pay", shard_key="user_id", ordered=False).delay(7)
    headers = apps.headers(app)
    assert headers["shard_key"] == "7"
    assert headers["shard_ordered"] is False


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize(
    "send",
    [
        lambda task: task.apply_async((7,), shard_key=8),
        lambda task: task.s(7).set(shard_key=8).delay(),
        lambda task: task.s(7).apply_async(shard_key=8),
        lambda task: task.signature((7,), shard_key=8).delay(),
        lambda task: task.app.send_task(task.name, (7,), shard_key=8),
        lambda task: task.app.send_task("known-elsewhere", (7,), shard_key=8),
        lambda task: group([task.s(7)], app=task.app).apply_async(shard_key=8),
        lambda task: chain(task.s(7), task.si(9), app=task.app).apply_async(shard_key=8),
    ],
)
def test_the_key_itself_may_be_given(apps: Apps, keyed: bool, send: Callable[[Any], object]) -> None:
    app = apps()
    task = app.task(pay, name="pay", **({"shard_key": "user_id"} if keyed else {}))
    send(task)
    message = apps.message(app)
    assert message.headers["shard_key"] == "8"
    assert "shard_key" not in message.properties


def test_none_as_the_key_means_not_given(apps: Apps) -> None:
    app = apps()
    app.task(pay, name="pay", shard_key="user_id").apply_async((7,), shard_key=None)
    message = apps.message(app)
    assert message.headers["shard_key"] == "7"
    assert "shard_key" not in message.properties


def test_a_call_by_name_finds_a_task_that_was_not_made_yet(apps: Apps) -> None:
    app = apps()
    app.task(pay, name="pay", shard_key="user_id")  # Celery makes it at its first use
    app.send_task("pay", (7,))
    assert apps.headers(app)["shard_key"] == "7"


def test_a_header_for_a_task_that_is_known_elsewhere(apps: Apps) -> None:
    app = apps()
    app.send_task("known-elsewhere", (7,), headers={"shard_key": "8", "mine": 1})
    headers = apps.headers(app)
    assert (headers["shard_key"], headers["mine"]) == ("8", 1)


def test_two_apps_with_a_task_of_the_same_name(apps: Apps) -> None:
    first, second, third = apps(), apps(), apps()
    one = first.task(pay, name="pay", shard_key="user_id")
    two = second.task(pay, name="pay", shard_key="amount")
    three = third.task(pay, name="pay")
    for task in (one, two, three):
        task.delay(7, 8)
    assert apps.headers(first)["shard_key"] == "7"
    assert apps.headers(second)["shard_key"] == "8"
    assert "shard_key" not in apps.headers(third)


def test_annotations_in_the_configuration(apps: Apps) -> None:
    app = apps(task_annotations={"pay": {"shard_key": "user_id"}})
    app.task(pay, name="pay").delay(7)
    assert apps.headers(app)["shard_key"] == "7"


# --- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shard_key, args, kwargs, options, text",
    [
        ("user_id", (None,), {}, {}, "task pay, shard_key='user_id': the shard key is None: it must be"),
        ("user_id", (True,), {}, {}, "task pay, shard_key='user_id': the shard key is True"),
        ("user_id", ("",), {}, {}, "the shard key is empty"),
        ("user_id", (1.5,), {}, {}, "of type float"),
        ("user_id", (7,), {}, {"shard_key": ""}, "shard_key= in a call of task pay: the shard key is empty"),
        ("order.id", (7,), {"order": {}}, {}, r"task pay: its shard key 'order.id' is not in.*Pass it in the call, or"),
        (lambda **kwargs: kwargs["nope"], (7,), {}, {}, r"task pay: its shard key \(.*lambda.*\) can't be taken"),
    ],
)
def test_a_bad_key_is_refused_at_the_call(
    apps: Apps, shard_key: Any, args: Any, kwargs: Any, options: Any, text: str
) -> None:
    app = apps()
    task = app.task(pay, name="pay", shard_key=shard_key)
    with pytest.raises(ShardKeyError, match=text):
        task.apply_async(args, kwargs, **options)
    with pytest.raises(ShardKeyError, match=text):
        app.send_task("pay", args, kwargs, **options)
    assert apps.messages(app) == []


def test_a_missing_argument_is_refused_where_celery_does_not_look(apps: Apps) -> None:
    app = apps()
    app.task(pay, name="pay", shard_key="user_id")
    with pytest.raises(
        ShardKeyError, match=r"task pay: its shard key \('user_id'\) can't be taken .*required.*'user_id'"
    ):
        app.send_task("pay", (), {"amount": 1})
    untyped = app.task(pay, name="untyped", shard_key="user_id", typing=False)
    with pytest.raises(ShardKeyError, match="required"):
        untyped.delay()


def test_a_shard_key_that_names_no_parameter(apps: Apps) -> None:
    task = apps().task(pay, name="pay", shard_key="nobody")
    with pytest.raises(ConfigError, match="task pay has no argument 'nobody'"):
        task.delay(7)


# --- canvas ------------------------------------------------------------------------------------------------------------


def test_groups_and_chords_key_each_call(apps: Apps) -> None:
    app = apps(backend="cache+memory://")
    task = app.task(pay, name="pay", shard_key="user_id")
    plain = app.task(nothing, name="plain")
    group([task.s(n) for n in range(3)], app=app).delay()
    assert [m.headers["shard_key"] for m in apps.messages(app)] == ["0", "1", "2"]
    chord([task.s(n) for n in range(3)], plain.s(), app=app).delay()
    assert {m.headers.get("shard_key") for m in apps.messages(app) if m.headers["task"] == "pay"} == {"0", "1", "2"}


@pytest.mark.parametrize("make", ["map", "starmap"])
def test_a_map_has_the_one_key_of_its_items(apps: Apps, make: str) -> None:
    app = apps()
    keyed = app.task(pay, name="keyed", shard_key="user_id")
    unordered = app.task(pay, name="unordered", shard_key="user_id", ordered=False)
    plain = app.task(pay, name="plain")

    def items(*ids: Any) -> list[Any]:
        return list(ids) if make == "map" else [(n,) for n in ids]

    getattr(keyed, make)(items(7, "7", 7)).delay()
    assert apps.headers(app)["shard_key"] == "7"
    with pytest.raises(
        ShardKeyError, match="task keyed have 2 shard keys, and one message can keep the order of one key only"
    ):
        getattr(keyed, make)(items(7, 8)).delay()
    with pytest.raises(ShardKeyError, match="shard_key='user_id': the shard key is None"):
        getattr(keyed, make)(items(None)).delay()
    getattr(keyed, make)(items(7, 8)).apply_async(shard_key=9)
    assert apps.headers(app)["shard_key"] == "9"
    for task in (unordered, plain):
        getattr(task, make)(items(7, 8)).delay()
        assert "shard_key" not in apps.headers(app)
    getattr(keyed, make)([]).delay()
    assert "shard_key" not in apps.headers(app)


def test_chunks(apps: Apps) -> None:
    app = apps()
    task = app.task(pay, name="pay", shard_key="user_id")
    task.chunks([(7, 1), (7, 2), (8, 1), (8, 2)], 2).delay()
    assert [m.headers["shard_key"] for m in apps.messages(app)] == ["7", "8"]
    with pytest.raises(ShardKeyError, match="2 shard keys"):
        task.chunks([(7, 1), (8, 1)], 2).delay()


def test_eager_calls_take_the_options(apps: Apps) -> None:
    app = apps(task_always_eager=True, task_eager_propagates=True)
    ran: list[tuple[Any, int]] = []

    @app.task(name="pay", shard_key="user_id")
    def task(user_id: int, amount: int = 0) -> None:
        ran.append((user_id, amount))

    task.delay(7)
    task.apply_async((7, 1), shard_key=8)
    task.s(7, 2).set(shard_key=8).delay()
    chain(task.si(7, 3), task.si(7, 4).set(shard_key=8), app=app).delay()
    group([task.s(7, 5)], app=app).apply_async(shard_key=8)
    assert ran == [(7, n) for n in range(6)]


def test_an_eager_retry_runs_again(apps: Apps) -> None:
    app = apps(task_always_eager=True)
    tried: list[int] = []

    @app.task(bind=True, shard_key="user_id", max_retries=2)
    def failing(self: Any, user_id: int) -> int:
        tried.append(self.request.retries)
        if self.request.retries < 2:
            raise self.retry(countdown=0)
        return user_id

    assert failing.delay(7).get() == 7
    assert tried == [0, 1, 2]


# --- the running message's headers -------------------------------------------------------------------------------------

DELIVERY = {"queue": "q", "epoch": 1, "shard": 2, "entry": "5-0", "token": 6}


def run_body(app: Celery, task: Any, protocol: int, body: Callable[[Any], object], **headers: Any) -> None:
    """Runs a body as a worker does, with the request that such a message would make."""
    private = {"shard_key": "7", "streamtask_delivery": DELIVERY} | headers
    app.tasks  # noqa: B018 - makes the tasks
    request = {
        "id": "the-id",
        "task": task.name,
        "args": (7,),
        "kwargs": {},
        "retries": 0,
        "called_directly": False,
    } | {"delivery_info": {"exchange": "", "routing_key": app.conf.task_default_queue}}
    request |= {"headers": private} if protocol == 1 else private
    task.push_request(**request)
    from celery._state import _task_stack

    _task_stack.push(task)
    try:
        body(task)
    finally:
        _task_stack.pop()
        task.pop_request()


@pytest.fixture(params=[1, 2])
def protocol(request: pytest.FixtureRequest) -> int:
    value: int = request.param
    return value


def keyed_app(apps: Apps, protocol: int) -> tuple[Celery, Any]:
    app = apps(task_protocol=protocol)
    return app, app.task(pay, name="pay", shard_key="user_id")


def retry(task: Any, **options: Any) -> None:
    from celery.exceptions import Retry

    with pytest.raises(Retry):
        task.retry(**{"countdown": 0} | options)


def test_a_retry_replaces_its_delivery(apps: Apps, protocol: int) -> None:
    app, task = keyed_app(apps, protocol)
    ours = DELIVERY | {"queue": app.conf.task_default_queue}
    run_body(app, task, protocol, retry, streamtask_delivery=ours)
    headers = apps.headers(app)
    assert headers["streamtask_replaces"] == ours
    assert headers["shard_key"] == "7"
    assert "streamtask_delivery" not in headers


def test_a_retry_with_other_arguments_keeps_its_lane(apps: Apps, protocol: int) -> None:
    app, task = keyed_app(apps, protocol)
    ours = DELIVERY | {"queue": app.conf.task_default_queue}
    run_body(app, task, protocol, functools.partial(retry, args=(9,)), streamtask_delivery=ours, shard_ordered=False)
    headers = apps.headers(app)
    assert (headers["shard_key"], headers["shard_ordered"]) == ("7", False)
    assert headers["streamtask_replaces"] == ours


def test_a_retry_in_another_lane_is_a_message_of_its_own(apps: Apps, protocol: int) -> None:
    app, task = keyed_app(apps, protocol)
    ours = DELIVERY | {"queue": app.conf.task_default_queue}
    run_body(app, task, protocol, functools.partial(retry, shard_key=9), streamtask_delivery=ours)
    headers = apps.headers(app)
    assert headers["shard_key"] == "9"
    assert not {"streamtask_replaces", "streamtask_delivery"} & headers.keys()


@pytest.mark.parametrize(
    "send",
    [
        lambda task, other: other.delay(7),
        lambda task, other: other.apply_async((7,), headers=task.request.headers),
        lambda task, other: other.apply_async((7,), task_id=task.request.id),
        lambda task, other: task.app.send_task("known-elsewhere", (7,), headers=task.request.headers),
        lambda task, other: task.replace(other.s(7)),
    ],
)
def test_what_a_body_sends_carries_nothing_of_its_delivery(
    apps: Apps, protocol: int, send: Callable[[Any, Any], object]
) -> None:
    from celery.exceptions import Ignore

    app, task = keyed_app(apps, protocol)
    other = app.task(nothing, name="other")

    def body(task: Any) -> None:
        try:
            send(task, other)
        except Ignore:  # that is how replace ends
            pass

    run_body(app, task, protocol, body, streamtask_delivery=DELIVERY | {"queue": app.conf.task_default_queue})
    assert not set(PRIVATE) & apps.headers(app).keys()


def test_replacing_itself_is_no_retry(apps: Apps, protocol: int) -> None:
    from celery.exceptions import Ignore

    app, task = keyed_app(apps, protocol)

    def body(task: Any) -> None:
        with pytest.raises(Ignore):
            task.replace(task.s(9))

    run_body(app, task, protocol, body, streamtask_delivery=DELIVERY | {"queue": app.conf.task_default_queue})
    headers = apps.headers(app)
    assert headers["shard_key"] == "9"
    assert "streamtask_replaces" not in headers


def test_the_retry_of_a_lost_worker_is_sent_by_the_main_process(apps: Apps) -> None:
    app, task = keyed_app(apps, 2)
    ours = DELIVERY | {"queue": app.conf.task_default_queue}
    from celery.app.task import Context

    request = Context(
        id="the-id", args=(7,), kwargs={}, shard_key="7", streamtask_delivery=ours,
        delivery_info={"exchange": "", "routing_key": app.conf.task_default_queue},
    )  # fmt: skip
    task.signature_from_request(request, countdown=1, retries=1).apply_async()
    assert apps.headers(app)["streamtask_replaces"] == ours


# --- messages that were on their way when the plugin was imported ------------------------------------------------------


def published_without_plugin(apps: Apps, app: Celery, send: Callable[[], object]) -> dict[str, Any]:
    """A message as kombu prepares it, of a call that did not pass through the plugin."""
    wrapped = Celery.send_task
    prepared: list[dict[str, Any]] = []
    Celery.send_task = wrapped.__wrapped__
    from kombu.transport.memory import Channel

    original = Channel.prepare_message

    def prepare(*args: Any, **kwargs: Any) -> dict[str, Any]:
        message: dict[str, Any] = original(*args, **kwargs)
        prepared.append(copy.deepcopy(message))  # publishing changes it
        return message

    Channel.prepare_message = prepare
    try:
        send()
    finally:
        Celery.send_task = wrapped
        Channel.prepare_message = original
    apps.messages(app)
    return prepared[-1]


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("serializer", ["json", "pickle"])
def test_a_missed_message_is_stamped(apps: Apps, protocol: int, serializer: str, compression: str | None) -> None:
    app = apps(
        task_protocol=protocol, task_serializer=serializer, task_compression=compression, accept_content=[serializer]
    )
    task = app.task(pay, name="pay-missed", shard_key="user_id", ordered=False)
    plain = app.task(pay, name="plain-missed")
    message = published_without_plugin(apps, app, lambda: task.apply_async((UUID,), {"amount": 3}))
    assert "shard_key" not in message["headers"]
    stamp_missed(message)
    assert message["headers"]["shard_key"] == str(UUID)
    assert message["headers"]["shard_ordered"] is False

    message = published_without_plugin(apps, app, lambda: task.apply_async((7,), shard_key=8))
    stamp_missed(message)
    assert message["headers"]["shard_key"] == "8"
    assert "shard_key" not in message["properties"]

    message = published_without_plugin(apps, app, lambda: plain.apply_async((7,)))
    stamp_missed(message)
    assert not set(PRIVATE) & message["headers"].keys()

    message = published_without_plugin(apps, app, lambda: task.apply_async((None,)))
    with pytest.raises(ShardKeyError, match="task pay-missed, shard_key='user_id'"):
        stamp_missed(message)


class Opened:
    """Writes down that it was unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_no_body_is_loaded_that_its_app_does_not_accept(apps: Apps, protocol: int, tmp_path: Path) -> None:
    """Neither what is published as it came from elsewhere, nor because another app of the process accepts it."""
    strict = apps(task_protocol=protocol, accept_content=["json"], task_serializer="pickle")
    trusting = apps(task_protocol=protocol, accept_content=["pickle"])
    for app in (trusting, strict):
        task = app.task(pay, name="pay-closed", shard_key="user_id")
        task.delay(1)
    apps.messages(strict)
    file = tmp_path / "opened"
    message = published_without_plugin(apps, strict, lambda: task.apply_async((7, Opened(file))))
    file.rmdir() if file.exists() else None
    again = copy.deepcopy(message)
    if protocol == 1:
        stamp_missed(message)
        assert "shard_key" not in message["headers"]
    else:
        with pytest.raises(
            ShardKeyError, match=r"task pay-closed.*can't be looked into.*untrusted content of type pickle"
        ):
            stamp_missed(message)
    assert not file.exists()

    token = _calling.set((trusting, "another"))
    stamp_missed(again)
    _calling.reset(token)
    assert again["headers"]["shard_key"] == "7"
    assert file.exists()


def test_what_the_plugin_has_sent_is_not_looked_into_again(apps: Apps, protocol: int) -> None:
    """A call without a key, of an app that accepts nothing of what it sends: it has no worker, or its tasks others'."""
    app = apps(task_protocol=protocol, accept_content=["yaml"], task_serializer="pickle")
    task = app.task(pay, name="pay-again")
    stamped: list[dict[str, Any]] = []
    from kombu.transport.memory import Channel

    original = Channel.prepare_message

    def prepare(*args: Any, **kwargs: Any) -> dict[str, Any]:
        message: dict[str, Any] = original(*args, **kwargs)
        stamp_missed(message)
        stamped.append(message["headers"])
        return message

    Channel.prepare_message = prepare
    try:
        task.map([1, 2]).apply_async()
        task.delay(1)
        app.send_task("pay-again", (1,), {}, None, None, "an-id")
    finally:
        Channel.prepare_message = original
    assert len(stamped) == 3
    assert not any(set(PRIVATE) & headers.keys() for headers in stamped)


def test_where_the_key_is_named_no_body_is_loaded(apps: Apps, tmp_path: Path) -> None:
    app = apps(accept_content=["pickle"], task_serializer="pickle")
    task = app.task(pay, name="pay-named", shard_key="user_id")
    file = tmp_path / "opened"
    message = published_without_plugin(apps, app, lambda: task.apply_async((7, Opened(file)), shard_key=8))
    file.rmdir() if file.exists() else None
    stamp_missed(message)
    assert message["headers"]["shard_key"] == "8"
    assert not file.exists()


def test_a_missed_retry_is_stamped(apps: Apps, protocol: int) -> None:
    app, task = keyed_app(apps, protocol)
    ours = DELIVERY | {"queue": app.conf.task_default_queue}
    stamped: list[dict[str, Any]] = []

    def body(task: Any) -> None:
        message = published_without_plugin(apps, app, lambda: retry(task))
        assert "streamtask_delivery" in message["headers"]
        stamp_missed(message)
        stamped.append(message["headers"])

    run_body(app, task, protocol, body, streamtask_delivery=ours)
    assert stamped[0]["streamtask_replaces"] == ours
    assert stamped[0]["shard_key"] == "7"
    assert "streamtask_delivery" not in stamped[0]


@pytest.mark.parametrize("body", [b"", b"text", b"{}", b"[1]"])
def test_what_is_no_task_is_left_alone(apps: Apps, protocol: int, body: bytes) -> None:
    apps(task_protocol=protocol).tasks  # noqa: B018
    message = {"body": body, "content-type": "application/json", "content-encoding": "utf-8"}
    message |= {"headers": {}, "properties": {"correlation_id": "1"}}
    before = {name: value.copy() if isinstance(value, dict) else value for name, value in message.items()}
    stamp_missed(message)
    assert message == before


# --- other brokers -----------------------------------------------------------------------------------------------------


def test_another_broker_is_said_once(apps: Apps, caplog: pytest.LogCaptureFixture) -> None:
    app = apps()
    task = app.task(pay, name="pay", shard_key="user_id")
    plain = app.task(pay, name="plain")

    def said() -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.name.startswith("streamtask")]

    plain.delay(7)
    assert said() == []
    for n in range(3):
        task.delay(n)
    (record,) = said()
    assert record.levelno == logging.WARNING
    assert "does not keep the order of shard keys (kombu.transport.memory): pay run in any order" in record.message


def test_our_broker_is_known_without_a_connection(apps: Apps, caplog: pytest.LogCaptureFixture) -> None:
    app = apps(broker_url="streamtask://127.0.0.1:1/0")
    look_at_broker(app, ["pay"])
    assert caplog.records == []


def test_importing_again_installs_nothing_twice() -> None:
    assert Celery.send_task.__wrapped__.__module__ == "celery.app.base"
    assert AMQP.__module__ == "celery.app.amqp"
