"""Background tasks that are neither lost to the garbage collector nor silent when they fail."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from replica.errors import ReplicaError

log = logging.getLogger("replica")

T = TypeVar("T")

# The event loop itself refers to tasks only weakly.
_running: set["asyncio.Task[Any]"] = set()


def spawn(work: Coroutine[Any, Any, T], name: str) -> "asyncio.Task[T]":
    """Run `work` in the background. Its failure is logged; whoever awaits the task still gets it too."""
    task = asyncio.create_task(work, name=name)
    _running.add(task)
    task.add_done_callback(_finished)
    return task


async def to_its_end(work: Coroutine[Any, Any, T], name: str) -> T:
    """`await work`, but a cancellation that comes in the middle of it takes effect when it has ended."""
    task = spawn(work, name)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _finished(task: "asyncio.Task[Any]") -> None:
    _running.discard(task)
    if task.cancelled():
        return
    error = task.exception()
    if error is None:
        return
    if isinstance(error, (OSError, ReplicaError)):
        log.warning("%s: %s", task.get_name(), error)
    else:
        log.error("%s failed unexpectedly", task.get_name(), exc_info=error)
