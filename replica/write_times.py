"""How long mirrored writes take, timed one at a time, as TCP times round trips: nothing is kept for each write."""

from collections.abc import Callable, Sequence
from typing import Final

from replica import wire
from replica.link import PeerLink

#: When a write was sent, and now, when the peer has acknowledged it.
Timed = Callable[[float, float], None]


class WriteTimes:
    """Stands between a volume and its link while somebody wants to know; the volume uses `send_buffers` then."""

    def __init__(self, link: PeerLink, newest: Callable[[], int], timed: Timed, clock_s: Callable[[], float]) -> None:
        """`newest`: the number of the last write that was handed over; `timed` is told of each that was timed."""
        self._send: Final = link.send_buffers
        self._acknowledged: Final = link.handlers[wire.APPLIED]
        self._link = link
        self._newest = newest
        self._timed = timed
        self._clock_s: Final = clock_s
        self._number = 0
        self._sent_s = 0.0
        link.handlers[wire.APPLIED] = self._on_applied

    def end(self) -> None:
        """Out of the way again."""
        self._link.handlers[wire.APPLIED] = self._acknowledged

    def send_buffers(self, buffers: Sequence[bytes | memoryview]) -> bool:
        """As of `PeerLink`."""
        if not self._number:
            self._number, self._sent_s = self._newest(), self._clock_s()
        return self._send(buffers)

    def _on_applied(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        self._acknowledged(flags, sequence, offset, payload)
        if 0 < self._number <= sequence:
            self._number = 0
            self._timed(self._sent_s, self._clock_s())
