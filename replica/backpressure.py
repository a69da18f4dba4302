"""Writes wait here, not in the kernel. A write to the page cache takes a microsecond, until more of it is dirty than
the kernel tolerates: then it puts whoever writes to sleep, a good part of a second at a time (balance_dirty_pages), and
with it the event loop: pings, the status, all clients. So a node takes no more writes a little earlier: from clients
(the gate "page cache" of a volume's admission), or from the peer (nothing more is read from the link).
"""

import asyncio
import math
from collections.abc import Callable
from typing import Final

#: Looked at after so many bytes, and earlier where there is little room (there are other writers).
LEAST_BETWEEN_LOOKS: Final = 256 << 10
_MOST_BETWEEN_LOOKS: Final = 4 << 20
_SHARE_BETWEEN_LOOKS: Final = 8
#: Writes go on when there is so much room again.
_ENOUGH_BYTES: Final = 1 << 20
_POLL_S: Final = 0.002
#: What is dirty may be somebody else's, on a slow disk: then the kernel has to decide who waits.
_MOST_HELD_S: Final = 0.2


class Backpressure:
    """Calls `hold` when the page cache has no room for writes, and then `go_on` when it has, or after a while."""

    def __init__(
        self, headroom_bytes: Callable[[], float], hold: Callable[[], None], go_on: Callable[[], None]
    ) -> None:
        """`headroom_bytes`: as of `replica.store.Store`."""
        self._headroom_bytes = headroom_bytes
        self._hold = hold
        self._go_on = go_on
        self._until_look = 0.0
        self._held_until_s = 0.0

    def wrote(self, length: int) -> None:
        """So much was written to the page cache (this is on the hot path)."""
        self._until_look -= length
        if self._until_look <= 0:
            self._look()

    def _look(self) -> None:
        headroom = self._headroom_bytes()
        if headroom > 0:
            share = headroom / _SHARE_BETWEEN_LOOKS
            self._until_look = max(float(LEAST_BETWEEN_LOOKS), min(share, float(_MOST_BETWEEN_LOOKS)))
            return
        self._until_look = math.inf
        self._hold()
        self._held_until_s = asyncio.get_running_loop().time() + _MOST_HELD_S
        self._wait()

    def _wait(self) -> None:
        asyncio.get_running_loop().call_later(_POLL_S, self._poll)

    def _poll(self) -> None:
        is_over = asyncio.get_running_loop().time() >= self._held_until_s
        if is_over or self._headroom_bytes() >= _ENOUGH_BYTES:
            self._until_look = float(LEAST_BETWEEN_LOOKS)
            self._go_on()
        else:
            self._wait()
