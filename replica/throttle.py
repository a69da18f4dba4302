"""Background work on a link (a resync, a verification) is kept back as its `Pace` says."""

import asyncio
import math
from collections.abc import Callable
from typing import Final

from replica.sync_rate import Pace


class Throttle:
    """Ask for `room`, say when the work has `begun` and when the peer has `ended` it."""

    def __init__(self, pace: Pace, clock_s: Callable[[], float]) -> None:
        self._pace = pace
        self._now: Final = clock_s
        self._in_flight_bytes = 0
        self._changed = asyncio.Event()
        self._running = asyncio.Event()
        self._running.set()

    def pause(self, paused: bool) -> None:
        """Give room to nobody, or go on."""
        if paused:
            self._running.clear()
        else:
            self._running.set()

    async def running(self) -> None:
        """Return when it is not paused."""
        await self._running.wait()

    def piece_bytes(self) -> int:
        """The longest piece to work on now."""
        return self._pace.piece_bytes(self._now())

    def gives_way(self) -> bool:
        """Whether clients are there and are to be considered."""
        return self._pace.gives_way(self._now())

    async def room(self, length: int) -> None:
        """Wait until work on `length` bytes may begin."""
        while True:
            await self._running.wait()
            wait_s = self._pace.wait_s(length, self._in_flight_bytes, self._now())
            if wait_s <= 0:
                return
            changed = self._changed
            try:
                async with asyncio.timeout(None if wait_s == math.inf else wait_s):
                    await changed.wait()
            except TimeoutError:
                continue

    def begun(self, length: int, on_wire: int) -> float:
        """Work on `length` bytes begins, of which `on_wire` are sent; when that was, for `ended`."""
        now_s = self._now()
        self._in_flight_bytes += length
        self._pace.sent(length, on_wire, now_s)
        return now_s

    def ended(self, length: int, begun_s: float) -> None:
        """It has ended."""
        now_s = self._now()
        self._in_flight_bytes -= length
        self._pace.acknowledged(length, now_s - begun_s, self._in_flight_bytes, now_s)
        self._tell()

    # ── what clients do (sync_rate.Clients) ──────────────────────────────────────────────────────────────────

    def wrote(self, sent_s: float, now_s: float) -> None:
        """A client's write that went to the peer at `sent_s` is acknowledged."""
        self._pace.wrote(sent_s, now_s)
        self._tell()

    def read(self, begun_s: float, now_s: float) -> None:
        """A client's read that had to wait for the disk is done."""
        self._pace.read(begun_s, now_s)
        self._tell()

    def read_at_once(self, now_s: float) -> None:
        """A client's read was answered from the page cache. Nobody who waits may go on because of that."""
        self._pace.read_at_once(now_s)

    def _tell(self) -> None:
        """Something has changed for all who wait."""
        self._changed.set()
        self._changed = asyncio.Event()
