"""Tasks that are sent by their names, from a program that does not have their code."""

from __future__ import annotations

import asyncio

import pytest

from streamtask import ConfigError, ShardKeyError, StreamTask, TaskError
from tests.helpers import wait_until

SHOP = """
app = make_app(backend=True)

@app.task(name="put", shard_key="k")
def put(k, n):
    note("S", k, n)
    note("E", k, n)
    return f"{k}/{n}"

@app.task(name="free", queue="mails")
async def free(n):
    note("S", None, n)
    note("E", None, n)
    return n
"""


def test_what_is_sent_by_name_keeps_its_place_among_the_calls_of_the_task(redis_server, site):
    site = site(redis_server, SHOP)
    elsewhere = StreamTask("t", broker=redis_server.url, backend=True)
    put, results = site.task("put"), []

    async def send_interleaved() -> None:
        for n in range(0, 30, 5):
            for key in ("a", "b"):
                results.append(put.delay(key, n))
                results.append(elsewhere.send_task("put", (key, n + 1), shard_key=key))
                results.append(await put.adelay(key, n + 2))
                results.append(await elsewhere.asend_task("put", [key], {"n": n + 3}, shard_key=key))
                results.append(site.app.send_task("put", (key,), {"n": n + 4}))  # has the code, and so the key

    try:
        asyncio.run(send_interleaved())
        free = [
            elsewhere.send_task("free", (100,), queue="mails", task_id="one-hundred"),
            site.app.send_task("free", kwargs={"n": 101}),
            elsewhere.send_task("free", (102,), queue="mails", countdown=0.05),
        ]
        keyless = elsewhere.send_task("put", ("c", 0))  # its order is nobody's then
        twice = [elsewhere.send_task("put", ("d", 0), shard_key="d", dedupe_id="x") for _ in range(2)]
        assert [one.stored for one in twice] == [True, False]

        site.pod(2)
        wait_until(lambda: site.ended() == 60 + len(free) + 2, 20, lambda: str(site))
        for key in ("a", "b"):
            assert site.started(key) == list(range(30))
        assert [one.get(timeout=5) for one in results[:5]] == ["a/0", "a/1", "a/2", "a/3", "a/4"]
        assert [one.get(timeout=5) for one in free] == [100, 101, 102]
        assert free[0].id == "one-hundred"
        assert keyless.get(timeout=5) == "c/0"
        assert {event.shard for event in site.of("S", "c")} == {"shared"}
        assert twice[1].get(timeout=5) == "d/0"
    finally:
        elsewhere.close()


def test_of_a_task_that_the_app_has_its_own_rules_hold(streamtask_app):
    @streamtask_app.task(name="pay", shard_key="order.customer")
    def pay(order):
        return order["customer"]

    @streamtask_app.task(name="mail", queue="mails")
    def mail(n):
        return n

    sent = streamtask_app.send_task("pay", ({"customer": 7},))
    there = streamtask_app.send_task("mail", (1,))
    elsewhere = streamtask_app.send_task("mail", (2,), queue="default")
    with pytest.raises(ShardKeyError):
        streamtask_app.send_task("pay", ({},))
    with pytest.raises(TypeError, match=r"pay\(\)"):
        streamtask_app.send_task("pay", (1, 2))
    assert streamtask_app.run_until_idle() == 3
    assert [one.get(timeout=1) for one in (sent, there, elsewhere)] == [7, 1, 2]


@pytest.mark.parametrize("name", ["", None, 5, b"put"])
def test_a_name_is_text(streamtask_app, name):
    with pytest.raises(ConfigError, match="name must be"):
        streamtask_app.send_task(name)
    with pytest.raises(ConfigError, match="name must be"):
        asyncio.run(streamtask_app.asend_task(name))


@pytest.mark.parametrize("options", [{"queue": ""}, {"queue": 5}, {"countdown": "5"}])
def test_wrong_options_are_refused_as_at_apply_async(streamtask_app, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        streamtask_app.send_task("put", **options)


def test_a_name_that_no_worker_has_is_a_dead_letter(streamtask_app):
    streamtask_app.send_task("not.there", (1,), queue="default")
    with pytest.raises(TaskError, match=r"no task is registered as 'not\.there'"):
        streamtask_app.run_until_idle()
