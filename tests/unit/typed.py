"""An app as type checkers see it (``test_types.py``): the lines that end with "# wrong" are refused, and no others."""

import datetime as dt
from typing import Any

from typing_extensions import assert_type

from streamtask import AsyncResult, StreamTask, Task

app = StreamTask("shop", broker="memory://types", backend=True, lease=3, ack="each", queue_shards={"x": 2})

StreamTask("shop", leese=5)  # wrong
StreamTask("shop", lease="5")  # wrong
StreamTask("shop", ack="eech")  # wrong


@app.task
def add(a: int, b: int = 2) -> int:
    return a + b


@app.task(shard_key="user_id", max_retries=None, autoretry_for=(OSError,), rate_limit="10/s", retry_backoff=0.5)
def push(user_id: int, *, text: str) -> str:
    return text


@app.task(shard_key=lambda user_id: user_id, autoretry_for=OSError, time_limit=dt.timedelta(minutes=1))
async def fetch(user_id: int) -> bytes:
    return b""


@app.task(bind=True, name="shop.charge")
def charge(self: Task[..., Any], user_id: int, cents: int = 0) -> None:
    if self.request.attempt:
        raise self.retry(countdown=1)
    raise self.retry(countdwn=1)  # wrong


@app.task(bind=True)
async def bound_fetch(self: Any, user_id: int) -> list[int]:
    return [user_id]


@app.task(bind=True)
def without_hints(self, user_id):
    return user_id


@app.task(queue="x")
def without_result_hint(user_id: int, text: str):
    pass


@app.task(max_retrys=5)  # wrong
def misspelt() -> None: ...


@app.task(max_retries="5")  # wrong
def text_for_a_number() -> None: ...


@app.task(autoretry_for=(5,))  # wrong
def no_exception() -> None: ...


# Calling the task calls the function.
assert_type(add(1), int)
charge(1, cents=5)
add("1")  # wrong
charge()  # wrong

# delay takes the arguments of the function, without self.
add.delay(1, b=3)
push.delay(1, text="hi")
charge.delay(user_id=1, cents=5)
bound_fetch.delay(1)
without_hints.delay(1)
without_result_hint.delay(1, "x")
add.delay("1")  # wrong
add.delay()  # wrong
add.delay(1, c=2)  # wrong
push.delay(1, "x")  # wrong
push.delay(1, txt="x")  # wrong
fetch.delay("1")  # wrong
charge.delay("1")  # wrong
charge.delay(1, 2, 3)  # wrong
bound_fetch.delay(1, 2)  # wrong
without_result_hint.delay("x", "y")  # wrong

# apply_async checks its options.
add.apply_async((1,), {"b": 2}, countdown=5)
charge.apply_async([1], eta=dt.datetime.now(dt.timezone.utc), dedupe_id="x", shard_key=5, headers={"a": 1})
add.apply_async((1,), countdown=dt.timedelta(minutes=1), queue="x", timeout=dt.timedelta(seconds=1))
add.apply_async((1,), countdwn=5)  # wrong
add.apply_async((1,), countdown="5")  # wrong
add.apply_async((1,), kwargs=[1])  # wrong

# send_task knows nothing of the arguments, but of the options.
app.send_task("shop.push", (1,), {"text": "x"}, shard_key=1, queue="x", countdown=5)
app.send_task("shop.push", (1,), countdwn=5)  # wrong

# get gives what the function returns, and of an async def what it awaits.
assert_type(add.delay(1), AsyncResult[int])
assert_type(add.delay(1).get(timeout=5), int)
assert_type(push.apply_async(kwargs={"user_id": 1, "text": "x"}).get(), str)
assert_type(add.send_many([{"a": 1}, ((1, 2), {})]), list[AsyncResult[int]])
assert_type(fetch.delay(1).get(), bytes)
assert_type(bound_fetch.apply_async((1,)).get(), list[int])
assert_type(app.AsyncResult("an id").get(), Any)
text: str = add.delay(1).get()  # wrong
number: int = fetch.delay(1).get()  # wrong


async def main() -> None:
    assert_type(await fetch(1), bytes)
    assert_type((await fetch.adelay(1)).get(), bytes)
    assert_type((await add.aapply_async((1,), countdown=1, task_id="x")).get(), int)
    assert_type(await fetch.delay(1).aget(timeout=dt.timedelta(seconds=5)), bytes)
    assert_type(await (await add.adelay(1)).aget(), int)
    assert_type(await add.asend_many([{"a": 1}], timeout=5), list[AsyncResult[int]])
    await add.aapply_async((1,), queue="x")
    await add.adelay("1")  # wrong
    await add.aapply_async((1,), countdwn=5)  # wrong
