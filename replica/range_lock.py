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
        """`released` is called after each release, before anyone who waits in `free` or `hold` gets its turn."""
        self.held: list[tuple[int, int]] = []
        self._released = released
        self._waiters: list[asyncio.Future[None]] = []

    def overlaps(self, start: int, stop: int) -> bool:
        """Whether [start, stop) shares a byte with a held range."""
        return any(start < held_stop and held_start < stop for held_start, held_stop in self.held)

    def take(self, start: int, stop: int) -> None:
        """Hold [start, stop), which the caller knows to be free."""
        self.held.append((start, stop))

    def release(self, start: int, stop: int) -> None:
        """Let go of a range that was taken."""
        self.held.remove((start, stop))
        self._released()
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    @asynccontextmanager
    async def hold(self, start: int, stop: int) -> AsyncIterator[None]:
        """Hold [start, stop) once nobody else does."""
        while self.overlaps(start, stop):
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        self.take(start, stop)
        try:
            yield
        finally:
            self.release(start, stop)
