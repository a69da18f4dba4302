"""Work that must not be cut short."""

import asyncio

import pytest

from replica.tasks import to_its_end
from tests.unit.test_link import run


def test_a_cancellation_waits_for_the_end_of_what_must_not_be_cut_short() -> None:
    async def test() -> None:
        begun, may_end, steps = asyncio.Event(), asyncio.Event(), []

        async def work() -> str:
            begun.set()
            await may_end.wait()
            steps.append("work")
            return "done"

        async def caller() -> None:
            try:
                await to_its_end(work(), "work")
            finally:
                steps.append("caller")

        task = asyncio.create_task(caller())
        await begun.wait()
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done() and not steps
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert steps == ["work", "caller"]
        assert await to_its_end(work(), "work") == "done"

    run(test)


def test_its_failure_is_the_callers() -> None:
    async def fail() -> None:
        raise OSError("the disk")

    async def test() -> None:
        with pytest.raises(OSError, match="the disk"):
            await to_its_end(fail(), "work")

    run(test)
