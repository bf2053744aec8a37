"""What a task takes its shard key from, and which options are refused."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import enum
import functools
import inspect
import uuid
from collections.abc import Sequence
from decimal import Decimal
from types import MappingProxyType, SimpleNamespace

import pytest

from streamtask import Dedupe, StreamTask, settings
from streamtask.arguments import arguments, item_arguments, many_calls
from streamtask.errors import ConfigError, EncodeError, ShardKeyError
from streamtask.request import current
from streamtask.settings import Settings, TaskOptions


@pytest.fixture
def app():
    return StreamTask("t", broker="redis://localhost:1")


def key(task, *args, **kwargs):
    return task.shard_key(args, kwargs)


def test_by_position_keyword_and_default(app):
    @app.task(name="t", shard_key="user_id")
    def task(text, user_id=7, *, more=None):
        pass

    assert key(task, "x", 42) == b"42"
    assert key(task, "x", user_id=42) == b"42"
    assert key(task, user_id="42", text="x") == b"42"
    assert key(task, "x") == b"7"


def test_positional_only_and_keyword_only(app):
    @app.task(name="a", shard_key="user")
    def a(user, n=1, /, text="", *, more=2):
        pass

    @app.task(name="b", shard_key="user")
    def b(n, /, *, user, more=2):
        pass

    assert key(a, 1) == b"1"
    assert key(a, 1, 2, "x", more=3) == b"1"
    assert key(b, 5, user=1) == b"1"
    with pytest.raises(TypeError):
        key(a, user=1)
    with pytest.raises(TypeError):
        key(b, 5, 1)


def test_star_arguments(app):
    @app.task(name="a", shard_key="user")
    def a(first, *rest, user, **more):
        pass

    @app.task(name="b", shard_key="user")
    def b(*args, **kwargs):
        pass

    @app.task(name="c", shard_key="user.id")
    def c(**kwargs):
        pass

    assert key(a, 1, 2, 3, user=4, x=5) == b"4"
    assert key(b, 1, user=2) == b"2"
    assert key(c, user={"id": 3}) == b"3"
    with pytest.raises(ShardKeyError, match="needs the argument 'user'"):
        key(b, 1)
    with pytest.raises(ShardKeyError, match="'user'"):
        key(c, other=1)


def test_dotted_path_through_mappings_and_attributes(app):
    @app.task(name="t", shard_key="event.user.id")
    def task(event):
        pass

    assert key(task, {"user": {"id": 1}}) == b"1"
    assert key(task, SimpleNamespace(user={"id": 2})) == b"2"
    assert key(task, event={"user": SimpleNamespace(id=uuid.UUID(int=3))}) == str(uuid.UUID(int=3)).encode()
    for event in ({}, {"user": {}}, {"user": None}, SimpleNamespace(), None, 5):
        with pytest.raises(ShardKeyError, match=r"event\.user\.id"):
            key(task, event)
    with pytest.raises(ShardKeyError):
        key(task, {"user": {"id": None}})


def test_callable(app):
    @app.task(name="t", shard_key=lambda order, *items, user=0, **more: f"{order}/{user}/{len(items)}/{sorted(more)}")
    def task(order, *items, user=0, **more):
        pass

    assert key(task, 1) == b"1/0/0/[]"
    assert key(task, 1, 2, 3, user=4, x=5) == b"1/4/2/['x']"


def test_a_callable_that_raises_is_heard(app):
    def no_key(n):
        raise LookupError("no key")

    @app.task(name="t", shard_key=no_key)
    def task(n):
        pass

    with pytest.raises(LookupError, match="no key"):
        key(task, 1)


def test_bind_takes_self_away(app):
    @app.task(name="t", bind=True, shard_key="user")
    def task(self, user, n=1):
        return self, user, n

    assert key(task, 5) == b"5"
    assert task(5) == (task, 5, 1)
    with pytest.raises(TypeError):
        key(task, 5, 1, 2)


def test_calling_the_task_calls_the_function(app):
    @app.task
    def add(a, b=2):
        "Adds."
        return a + b

    assert add(1) == 3
    assert add.__doc__ == "Adds."
    assert add.__name__ == "add"
    assert inspect.signature(add) == inspect.signature(add.function)


def test_without_a_shard_key_only_the_arguments_are_checked(app):
    @app.task(name="t")
    def task(a, *, b=1):
        pass

    assert key(task, object()) is None
    for args, kwargs in (((), {}), ((1, 2), {}), ((1,), {"c": 1}), ((1,), {"a": 1})):
        with pytest.raises(TypeError):
            task.shard_key(args, kwargs)


@pytest.mark.parametrize("value", [None, True, False, 1.5, "", b"", [1], {"a": 1}, object()])
def test_values_of_wrong_types_are_refused(app, value):
    @app.task(name="a", shard_key="user")
    def a(user):
        pass

    @app.task(name="b", shard_key=lambda user: user)
    def b(user):
        pass

    with pytest.raises(ShardKeyError):
        key(a, value)
    with pytest.raises(ShardKeyError):
        key(b, value)


def test_a_default_of_a_wrong_type_is_refused_when_it_is_used(app):
    @app.task(name="t", shard_key="user")
    def task(user=None):
        pass

    assert key(task, 1) == b"1"
    with pytest.raises(ShardKeyError):
        key(task)


def test_a_mutable_default_and_annotations_do_no_harm(app):
    @app.task(name="t", shard_key="user")
    def task(user: "NoSuchType", tags: list = [], *rest: "Other", flag: bool = not False, **more: 3) -> None:  # noqa
        pass

    assert key(task, 1) == b"1"


@pytest.mark.parametrize(
    "argument", ["_canonical", "_name", "_need", "_walk", "_key", "_default0", "name", "self", "cls"]
)
@pytest.mark.parametrize("shard_key", ["by name", "callable", "path"])
def test_any_argument_name_may_be_used(app, argument, shard_key):
    scope = {}
    exec(
        f"def f({argument}, user=5, *_args, _walk2=1, **_kwargs): pass\ndef k({argument}, user=5, *a, **b): return user",
        scope,
    )
    how = {"by name": "user", "callable": scope["k"], "path": "user"}[shard_key]
    task = app.task(name="t", shard_key=how)(scope["f"])

    assert key(task, object()) == b"5"
    assert key(task, object(), 6) == b"6"


@pytest.mark.parametrize(
    "name", ["users.import", "a.class", "None", "with space", "1", "é.ü", "a.", "x.print", "t.key"]
)
def test_any_task_name_may_be_used(app, name):
    @app.task(name=name, shard_key="user")
    def task(user):
        pass

    assert task.name == name
    assert key(task, 1) == b"1"
    assert app.tasks[name] is task


def test_a_wrong_call_is_refused_naming_the_function(app):
    @app.task(name="mod.send_push", shard_key="user")
    def send_push(user):
        pass

    with pytest.raises(TypeError, match=r"send_push\(\)"):
        key(send_push)


def test_decorated_and_partial_functions(app):
    def double(function):
        @functools.wraps(function)
        def inner(*args, **kwargs):
            return function(*args, **kwargs) * 2

        return inner

    @app.task(name="t", shard_key="user")
    @double
    def task(user, n=1):
        return n

    assert key(task, 1) == b"1"
    assert task(1, 3) == 6


@pytest.mark.parametrize("shard_key", ["missing", "", "a..b", ".a", "a-b", "a b", 5, "user id", b"user", ["user"]])
def test_wrong_shard_keys_are_refused_where_the_task_is_declared(app, shard_key):
    with pytest.raises(ConfigError, match="shard_key"):

        @app.task(name="t", shard_key=shard_key)
        def task(user):
            pass


NO_NUMBERS = (float("nan"), float("inf"), -1, "5", True, [], Decimal(1))
NO_SECONDS = (*NO_NUMBERS, dt.timedelta(seconds=-1), 1e300, 10**400)
NO_TEXTS = ("", 5, b"x", "\udc80", ["x"])
NO_FLAGS = (1, 0, "no", None)

WRONG_OPTIONS: dict[str, Sequence[object]] = {
    "queue": (*NO_TEXTS, None),
    "ordered": NO_FLAGS,
    "bind": NO_FLAGS,
    "max_retries": (*NO_NUMBERS, 1.5, 2.0),
    "retry_backoff": [one for one in NO_SECONDS if one is not True],
    "retry_backoff_max": (*NO_SECONDS, None),
    "retry_jitter": NO_FLAGS,
    "soft_time_limit": (*NO_SECONDS, 0, dt.timedelta(0)),
    "time_limit": (*NO_SECONDS, 0),
    "expires": (*NO_SECONDS, 0, dt.datetime.now(dt.timezone.utc)),
    "ignore_result": NO_FLAGS,
    "rate_limit": (0, True, "", "ten/m", "10/d", "-1/s", "inf", float("nan"), "10/m/s", dt.timedelta(1)),
    "autoretry_for": (["ValueError"], 5),
    "dont_autoretry_for": ((int,), None),
    "serializer": ("no-such-serializer", *NO_TEXTS),
    "colour": ("red",),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_wrong_options_are_refused_by_name(app, name):
    for value in WRONG_OPTIONS[name]:
        with pytest.raises(ConfigError, match=name) as refused:
            app.task(lambda: None, name="t", **{name: value})
        assert len(str(refused.value)) < 300
    assert "t" not in app.tasks


def test_a_soft_limit_is_not_above_the_hard_one(app):
    with pytest.raises(ConfigError, match=r"soft_time_limit must be at most the time_limit \(5 s\), not 6 s"):
        app.task(lambda: None, name="t", soft_time_limit=6, time_limit=dt.timedelta(seconds=5))
    assert app.task(lambda: None, name="t", soft_time_limit=5, time_limit=5)


def test_an_error_says_what_was_given_and_what_is_right(app):
    with pytest.raises(ConfigError) as refused:
        app.task(lambda: None, name="t", time_limit="5 min")
    assert str(refused.value) == (
        "the task option time_limit must be a number of seconds above 0, at most 100 years, or a timedelta, or None, not "
        "'5 min'"
    )
    with pytest.raises(ConfigError) as refused:
        StreamTask("t", broker="redis://localhost:1", lease=0.001)
    assert str(refused.value) == (
        "the setting lease must be a number of seconds from 0.2, at most 100 years, or a timedelta, not 0.001"
    )


def test_a_timedelta_is_as_good_as_seconds(app):
    minute = dt.timedelta(minutes=1)
    options = app.task(lambda: None, name="t", time_limit=minute, expires=minute, retry_backoff=minute).options
    assert (options.time_limit, options.expires, options.retry_backoff) == (60.0, 60.0, 60.0)
    assert StreamTask("t", broker="redis://localhost:1", lease=minute).settings.lease == 60.0
    assert Dedupe(ttl=minute).ttl_ms == 60_000


@pytest.mark.parametrize(
    "rate,per_s", [(None, None), (5, 5.0), (0.5, 0.5), ("10", 10.0), ("10/s", 10.0), ("90/m", 1.5), ("1800/h", 0.5)]
)
def test_rate_limits(app, rate, per_s):
    @app.task(name="t", rate_limit=rate)
    def task():
        pass

    assert task.options.rate_per_s() == per_s


def test_exception_classes_alone_or_in_any_sequence(app):
    @app.task(name="a", autoretry_for=ValueError, dont_autoretry_for=[KeyError, TypeError])
    def a():
        pass

    @app.task(name="b", autoretry_for=())
    def b():
        pass

    assert a.options.autoretry_for == (ValueError,)
    assert a.options.dont_autoretry_for == (KeyError, TypeError)
    assert b.options.autoretry_for == ()


def test_defaults(app):
    @app.task
    def task():
        pass

    options = task.options
    assert (options.queue, options.shard_key, options.ordered, options.bind) == ("default", None, True, False)
    assert (options.max_retries, options.autoretry_for, options.ignore_result) == (3, None, False)
    assert task.name == f"{__name__}.test_defaults.<locals>.task"


def test_two_tasks_of_one_name_are_refused(app):
    @app.task(name="t")
    def one():
        pass

    with pytest.raises(ConfigError, match="'t'"):

        @app.task(name="t")
        def other():
            pass


def test_request_outside_of_a_run_says_so(app):
    @app.task(name="t", bind=True)
    def task(self):
        return self.request

    with pytest.raises(ConfigError, match="only while a worker runs"):
        task()


WRONG_SETTINGS: dict[str, Sequence[object]] = {
    "shards": (*NO_NUMBERS, 0, 1025, 8.0, None),
    "queue_shards": ({"a": 0}, {"a": True}, {"a": 1.0}, {5: 1}, {"": 1}, ["a"], 5),
    "namespace": (*NO_TEXTS, "a b"),
    "group": NO_TEXTS,
    "serializer": ("no-such", *NO_TEXTS),
    "accept_content": (5, ("",), "no-such", [5]),
    "max_message_bytes": (*NO_NUMBERS, 0, 1.5),
    "max_backlog": (*NO_NUMBERS, 1.0),
    "send_timeout": (*NO_SECONDS, 0),
    "produce_ttl": (*NO_SECONDS, 0),
    "dedupe_ttl": (*NO_SECONDS, 0),
    "max_dedupe_ids": (*NO_NUMBERS, 0, 1.5),
    "lease": (*NO_SECONDS, 0, 0.001, 0.19),
    "handover_timeout": NO_SECONDS,
    "ack": ("never", None, []),
    "ack_batch": (*NO_NUMBERS, 0, 201, 1.5),
    "ack_interval": NO_SECONDS,
    "prefetch": (*NO_NUMBERS, 0, 201, 1.5),
    "max_crashes": (*NO_NUMBERS, 1.5),
    "on_dead": ("x", None, {}),
    "on_expired": ("x", None),
    "result_ttl": (*NO_SECONDS, 0),
    "redis_timeout": (*NO_SECONDS, 0, 1e-9),
    "colour": (1,),
    "middleware": (Dedupe, [Dedupe], Dedupe(), "x", None),
    "backend": (5, b"redis://:secret@h", ""),
    "broker": (5, b"redis://:secret@h", ""),
}


@pytest.mark.parametrize("name", WRONG_SETTINGS)
def test_wrong_settings_are_refused_by_name(name):
    word = name.replace("accept_content", "accept_content|serializer")
    for value in WRONG_SETTINGS[name]:
        with pytest.raises(ConfigError, match=word) as refused:
            StreamTask("t", **{"broker": "redis://localhost:1", name: value})
        assert len(str(refused.value)) < 500
        assert "secret" not in str(refused.value)
    assert name in WRONG_SETTINGS


def test_every_setting_and_option_is_looked_at():
    fields = {field.name for field in dataclasses.fields(Settings)}
    assert fields == set(settings.RULES) <= set(WRONG_SETTINGS)
    fields = {field.name for field in dataclasses.fields(TaskOptions)}
    assert fields - {"shard_key"} == set(settings.TASK_RULES) <= set(WRONG_OPTIONS)


@pytest.mark.parametrize("value", [*NO_TEXTS, None])
def test_an_app_needs_a_name(value):
    with pytest.raises(ConfigError, match="name of an app"):
        StreamTask(value, broker="redis://localhost:1")


class Word(str, enum.Enum):
    HIGH = "high"
    LOW = "low"
    EACH = "each"


def test_an_option_that_is_a_text_enum_is_its_value():
    app = StreamTask(Word.HIGH, broker=f"memory://{uuid.uuid4().hex}", ack=Word.EACH, queue_shards={Word.LOW: 1})
    task = app.task(lambda: seen.append(current().queue), name=Word.HIGH, queue=Word.HIGH)
    taken = [app.name, app.settings.ack, *app.settings.queue_shards, task.name, task.options.queue]
    assert taken == ["high", "each", "low", "high", "high"]
    assert repr(taken) == "['high', 'each', 'low', 'high', 'high']", "no members"
    seen = []
    task.delay()
    task.apply_async(queue=Word.LOW)
    assert app.run_until_idle() == 2
    assert sorted(seen) == ["high", "low"]
    app.close()


@pytest.mark.parametrize(
    "given, said",
    [
        ({"name": ""}, "the name of an app must be text that is not empty, as in StreamTask('notifications'), not ''"),
        ({"broker": ""}, "the broker of an app must be a URL, as redis://localhost:6379/0, or None, not ''"),
        (
            {"backend": "x"},
            "the backend of app 't': the broker URL 'x' has an unknown scheme: it must begin with one of ",
        ),
        (
            {"middleware": 5},
            "the middleware of an app must be a list of middlewares, made already, as in [Dedupe()], not 5",
        ),
        (
            {"broker": b"redis://:secret@h"},
            "the broker of an app must be a URL, as redis://localhost:6379/0, or None, not a ",
        ),
    ],
)
def test_what_is_wrong_with_an_app_is_shown_but_for_passwords(given, said):
    with pytest.raises(ConfigError) as refused:
        StreamTask(**{"name": "t", "broker": "redis://localhost:1", **given})
    assert str(refused.value).startswith(said)
    assert "secret" not in str(refused.value)


def test_wrong_options_of_dedupe():
    for options in ({"ttl": 0}, {"ttl": float("nan")}, {"tasks": 5}, {"tasks": [5]}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))} of Dedupe"):
            Dedupe(**options)
    assert Dedupe(tasks="one").tasks == {"one"}


# Calls: what is wrong is said at once, also where Redis is away, as it is here.

NAIVE = dt.datetime(2030, 1, 1)  # noqa: DTZ001
WRONG_CALLS: dict[str, Sequence[object]] = {
    "countdown": (*NO_SECONDS, NAIVE),
    "eta": (NAIVE, dt.date(2030, 1, 1), "2030-01-01T00:00:00Z", 5, dt.timedelta(1)),
    "expires": (*NO_SECONDS, 0, NAIVE),
    "timeout": NO_SECONDS,
    "task_id": (*NO_TEXTS, uuid.uuid4()),
    "dedupe_id": ("", 5, b"x", ["x"], uuid.uuid4()),
    "queue": NO_TEXTS,
    "headers": (5, "ab", {1: 2}, [("a", 1)]),
    "colour": (1,),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_options_of_a_call_are_refused_by_name(app, name):
    task = app.task(lambda: None, name="t")
    for value in WRONG_CALLS[name]:
        with pytest.raises((ConfigError, TypeError), match=name):
            task.apply_async(**{name: value})
        with pytest.raises((ConfigError, TypeError), match=name):
            asyncio.run(task.aapply_async(**{name: value}))
    for value in WRONG_CALLS["timeout"]:
        with pytest.raises(ConfigError, match="timeout"):
            task.send_many([{}], timeout=value)
        with pytest.raises(ConfigError, match="timeout"):
            StreamTask("t", broker="redis://localhost:1", backend=True).AsyncResult("x").get(timeout=value)
        with pytest.raises(ConfigError, match="timeout"):
            app.run_until_idle(timeout=value)
    for value in WRONG_CALLS["task_id"]:
        with pytest.raises(ConfigError, match="task id"):
            app.AsyncResult(value)


def test_countdown_and_eta_exclude_each_other(app):
    task = app.task(lambda: None, name="t")
    with pytest.raises(ConfigError, match="not both"):
        task.apply_async(countdown=1, eta=dt.datetime.now(dt.timezone.utc))


@pytest.mark.parametrize("args", ["ab", b"ab", {"x": 1}, {1, 2}, 5, iter([1, 2])])
def test_arguments_are_a_sequence_and_a_mapping(app, args):
    task = app.task(lambda *args, **kwargs: None, name="t")
    for call in (
        lambda: task.apply_async(args),
        lambda: asyncio.run(task.aapply_async(args)),
        lambda: task.apply_async((1,), [args]),
        lambda: task.apply_async(kwargs="x"),
    ):
        with pytest.raises(EncodeError, match=r"arguments of task 't' must be a"):
            call()
    for one in (args, (args, {}), ([1], "x"), (1,), (1, 2, 3)):
        if not isinstance(one, dict):
            with pytest.raises(EncodeError, match="of task 't'"):
                item_arguments(one, "t")
    if not hasattr(args, "__next__"):
        with pytest.raises(EncodeError, match="of task 't'"):
            [item_arguments(one, "t") for one in many_calls(args, "t")]


def test_arguments_of_other_kinds_are_taken():
    assert arguments(None, None, "t") == ((), {})
    assert arguments(range(2), MappingProxyType({"a": 1}), "t") == ([0, 1], {"a": 1})
    assert item_arguments(([1], None), "t") == ([1], {})


# What is no function, or has no name.


class Callable:
    def __call__(self, n):
        return n


class AsyncCallable:
    async def __call__(self, n):
        return n


def generates(n):
    yield n


async def agenerates(n):
    yield n


class Generates:
    def __call__(self, n):
        yield n


@pytest.mark.parametrize("function", [generates, agenerates, Generates(), functools.partial(generates, 1)])
def test_generators_are_refused(app, function):
    with pytest.raises(ConfigError, match="task t is a generator: a call of it runs nothing"):
        app.task(function, name="t")
    assert not app.tasks


@pytest.mark.parametrize("function", ["x", 5, classmethod(generates), [generates]])
def test_what_is_no_function_is_refused(app, function):
    with pytest.raises(ConfigError, match=r"@app\.task takes a function"):
        app.task(function)
    with pytest.raises(ConfigError, match=r"@app\.task takes a function"):
        app.task(name="t")(function)


def test_a_task_is_no_function(app):
    with pytest.raises(ConfigError, match="'t' is a task already"):
        app.task(app.task(lambda: None, name="t"), name="u")


@pytest.mark.parametrize("function", [Callable(), functools.partial(Callable(), 1)])
def test_what_has_no_name_needs_one(app, function):
    with pytest.raises(ConfigError, match=r"has no name .* app\.task\(name="):
        app.task(function)
    assert not app.task(function, name="t").is_async


@pytest.mark.parametrize("name", NO_TEXTS)
def test_a_tasks_name_is_text(app, name):
    with pytest.raises(ConfigError, match="name must be text"):
        app.task(lambda: None, name=name)


async def coroutine(n):
    return n


@pytest.mark.parametrize("function", [coroutine, AsyncCallable(), functools.partial(coroutine, 1)])
def test_async_functions_are_known(app, function):
    assert app.task(function, name="t").is_async


def test_what_stands_on_a_function_hides_nothing_of_the_task(app):
    def f():
        pass

    f.delay, f.name, f.app, f.mark = 1, "x", 2, 3
    task = app.task(f, name="t")
    assert (task.name, task.app, task.mark) == ("t", app, 3)
    assert callable(task.delay)


def test_bind_needs_an_argument(app):
    with pytest.raises(ConfigError, match=r"task t has bind=True"):
        app.task(lambda: None, name="t", bind=True)
    with pytest.raises(ConfigError, match=r"task t has bind=True"):
        app.task(lambda *, n: None, name="t", bind=True)
    assert key(app.task(lambda *args: None, name="t", bind=True), 1, 2) is None


def test_a_function_that_is_defined_anew_is_said(app, caplog):
    sources = ["def f(n): return n", "def f(n): return n", "\ndef f(n): return n + 1"]
    for source in sources:
        scope = {"__name__": "mod"}
        exec(compile(source, "mod.py", "exec"), scope)
        app.task(scope["f"])
    assert [record.getMessage() for record in caplog.records] == [
        "task mod.f is defined a second time, and the first is not called any more: f (mod.py:1), then f (mod.py:2)"
    ]
    assert app.tasks["mod.f"](1) == 2


def test_two_tasks_of_one_name_are_told_apart(app):
    app.task(generates_nothing, name="t")
    with pytest.raises(
        ConfigError, match=r"two tasks are named 't': generates_nothing \(.*test_task_options.py:\d+\) and <"
    ):
        app.task(Callable(), name="t")
    app.task(generates_nothing, name="t")


def generates_nothing(n):
    pass
