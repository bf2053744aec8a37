"""What a task takes its shard key from, and which options are refused."""

from __future__ import annotations

import functools
import inspect
import uuid
from types import SimpleNamespace

import pytest

from streamtask import StreamTask
from streamtask.errors import ConfigError, ShardKeyError


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


@pytest.mark.parametrize(
    "options",
    [
        {"colour": "red"},
        {"time_limit": 0},
        {"time_limit": -1},
        {"time_limit": "10"},
        {"time_limit": True},
        {"time_limit": float("nan")},
        {"soft_time_limit": 0},
        {"expires": 0},
        {"expires": -5},
        {"max_retries": -1},
        {"max_retries": 1.5},
        {"max_retries": "3"},
        {"max_retries": True},
        {"rate_limit": 0},
        {"rate_limit": "100"[:0]},
        {"rate_limit": "ten/m"},
        {"rate_limit": "10/d"},
        {"rate_limit": "-1/s"},
        {"rate_limit": float("nan")},
        {"rate_limit": "inf"},
        {"rate_limit": "10/m/s"},
        {"autoretry_for": ["ValueError"]},
        {"autoretry_for": 5},
        {"dont_autoretry_for": (int,)},
        {"serializer": "no-such-serializer"},
    ],
    ids=repr,
)
def test_wrong_options_are_refused_by_name(app, options):
    (name,) = options
    with pytest.raises(ConfigError, match="serializer" if name == "serializer" else name):

        @app.task(name="t", **options)
        def task():
            pass

    assert "t" not in app.tasks


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


@pytest.mark.parametrize(
    "options",
    [
        {"shards": 0}, {"shards": 1025}, {"shards": True}, {"shards": "8"}, {"queue_shards": {"a": 0}}, {"lease": 0},
        {"colour": 1}, {"ack": "never"}, {"on_dead": "x"}, {"prefetch": 201}, {"max_message_bytes": -1},
        {"dedupe_ttl": 0}, {"send_timeout": 0}, {"serializer": "no-such"},
    ],
    ids=repr,
)  # fmt: skip
def test_wrong_settings_are_refused_by_name(options):
    (name,) = options
    with pytest.raises(ConfigError, match="serializer" if name == "serializer" else name.removeprefix("queue_")):
        StreamTask("t", broker="redis://localhost:1", **options)
