"""Byte ranges on which something slow is under way.

Plain writes run inline and in order, so they need no lock. What runs off the loop (a durable write, a zeroing, a
resync read) holds its range here meanwhile; a write that overlaps it waits, so that both nodes see the two in the
same order and a resync block read before a write can never land after it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class RangeLocks:
    """The ranges held right now; few at any time, so a list is searched."""

    def __init__(self, released: Callable[[], None]) -> None:
        """`released` is called after each release (the volume retries what it had put off)."""
        self.held: list[tuple[int, int]] = []
        self._released = released
        self._waiters: list[asyncio.Future[None]] = []

    def overlaps(self, start: int, stop: int) -> bool:
        """Whether [start, stop) shares a byte with a held range."""
        return any(start < held_stop and held_start < stop for held_start, held_stop in self.held)

    async def free(self, start: int, stop: int) -> None:
        """Wait until no held range overlaps [start, stop) — true only until the caller next awaits."""
        while self.overlaps(start, stop):
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    @asynccontextmanager
    async def hold(self, start: int, stop: int) -> AsyncIterator[None]:
        """Hold [start, stop) once nobody else does."""
        await self.free(start, stop)
        held = (start, stop)
        self.held.append(held)
        try:
            yield
        finally:
            self.held.remove(held)
            self._released()
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)
