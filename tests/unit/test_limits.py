"""Soft time limits of coroutines: raised where the body waits, once, and nothing else is taken for one."""

from __future__ import annotations

import asyncio
import sys

import pytest

from streamtask.clock import mono_s
from streamtask.errors import SoftTimeLimitExceeded
from streamtask.worker.limits import within


def run(body, seconds=0.01):
    """The outcome of a coroutine function under a limit, by a timer of which no test waits for the end."""

    async def main():
        try:
            return await within(seconds, body(), mono_s())
        except SoftTimeLimitExceeded as exc:
            return exc  # of a task that ends with it asyncio keeps only that it was cancelled

    ended = asyncio.run(main())
    if isinstance(ended, Exception):
        raise ended
    return ended


FAR = 60


def test_a_body_that_ends_in_time_is_left_alone():
    async def body():
        await asyncio.sleep(0)
        return 7

    assert run(body, FAR) == 7


@pytest.mark.parametrize(
    "error", [asyncio.TimeoutError("mine"), ValueError("mine"), SystemExit(3), asyncio.CancelledError()]
)
def test_what_it_raises_by_itself_stays_what_it_is(error):
    async def body():
        await asyncio.sleep(0)
        raise error

    async def main():
        with pytest.raises(type(error)) as caught:
            await within(FAR, body(), mono_s())
        assert caught.value is error

    asyncio.run(main())


def test_it_may_be_caught_and_comes_once():
    async def body():
        with pytest.raises(SoftTimeLimitExceeded, match=r"soft_time_limit of 0\.01 s"):
            await asyncio.sleep(FAR)
        await asyncio.sleep(0.03)
        return "cleaned up"

    assert run(body) == "cleaned up"


def test_it_ends_what_the_body_waits_for():
    ended = []

    async def child():
        try:
            await asyncio.sleep(FAR)
        except asyncio.CancelledError:
            ended.append("child")
            raise

    async def waits_for():
        await asyncio.wait_for(child(), FAR)

    async def gathers():
        await asyncio.gather(child(), asyncio.sleep(FAR))

    async def awaits():
        await asyncio.create_task(child())

    for body in (waits_for, gathers, awaits, child):
        ended.clear()
        with pytest.raises(SoftTimeLimitExceeded):
            run(body)
        assert ended == ["child"], body


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.TaskGroup came with Python 3.11")
def test_the_blocks_of_asyncio_clean_up_and_time_out_as_ever():
    async def groups():
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(FAR))

    with pytest.raises(SoftTimeLimitExceeded):
        run(groups)

    async def times_out_later():
        try:
            await asyncio.sleep(FAR)
        except SoftTimeLimitExceeded:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await asyncio.sleep(FAR)
        assert asyncio.current_task().cancelling() == 0
        return "both"

    assert run(times_out_later) == "both"


def test_a_child_that_does_not_let_itself_be_cancelled_keeps_it_only_for_so_long():
    async def stubborn():
        try:
            await asyncio.sleep(FAR)
        except asyncio.CancelledError:
            return "in spite of it"

    async def body():
        return await asyncio.create_task(stubborn())

    with pytest.raises(SoftTimeLimitExceeded):
        run(body)


def test_any_awaitable():
    async def main():
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.01, future.set_result, 5)
        assert await within(FAR, future, mono_s()) == 5
        with pytest.raises(SoftTimeLimitExceeded):
            await within(0.01, asyncio.get_running_loop().create_future(), mono_s())

    asyncio.run(main())
