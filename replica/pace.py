"""How fast background work may go: whoever is about to move bytes asks for room first."""

import asyncio
from typing import Protocol


class Pace(Protocol):
    """Keeps background work back."""

    async def room(self, length_bytes: int) -> None:
        """Return when so much more may be moved."""


class FixedRate:
    """At most so many bytes per second; None: as fast as it goes."""

    def __init__(self, rate_bytes_s: int | None) -> None:
        self._rate = rate_bytes_s
        self._next_s = 0.0

    async def room(self, length_bytes: int) -> None:
        if self._rate is None:
            return
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        if self._next_s > now_s:
            await asyncio.sleep(self._next_s - now_s)
        self._next_s = max(self._next_s, now_s) + length_bytes / self._rate
