"""How long clients' requests take, while somebody wants to know (`replica.sync_rate`). One of each kind is timed at a
time, as TCP times round trips: nothing is kept for each of them.
"""

from collections.abc import Callable, Sequence
from typing import Final

from replica import wire
from replica.link import PeerLink
from replica.store import Store
from replica.sync_rate import Clients

#: A read takes as many times longer as it has such pieces.
_READ_BYTES: Final = 128 << 10


class ClientTimes:
    """Stands between a volume and its link and its disk; the volume uses `send_buffers`, `read_now` and `read` then."""

    def __init__(
        self, link: PeerLink, store: Store, newest: Callable[[], int], clients: Clients, clock_s: Callable[[], float]
    ) -> None:
        """`newest`: the number of the last write that was handed over."""
        self._link = link
        self._send: Final = link.send_buffers
        self._acknowledged: Final = link.handlers[wire.APPLIED]
        self._store_read_now: Final = store.read_now
        self._store_read: Final = store.read
        self._newest = newest
        self._clients = clients
        self._clock_s: Final = clock_s
        self._number = 0
        self._sent_s = 0.0
        self._reading = False
        link.handlers[wire.APPLIED] = self._on_applied

    def end(self) -> None:
        """Out of the way of the link again."""
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
            self._clients.wrote(self._sent_s, self._clock_s())

    def read_now(self, offset: int, length: int) -> bytes | None:
        """As of `Store`."""
        data = self._store_read_now(offset, length)
        if data is not None:
            self._clients.read_at_once(self._clock_s())
        return data

    async def read(self, offset: int, length: int) -> bytes:
        """As of `Store`."""
        if self._reading:
            return await self._store_read(offset, length)
        self._reading, begun_s = True, self._clock_s()
        try:
            data = await self._store_read(offset, length)
        finally:
            self._reading = False
        ended_s = self._clock_s()
        self._clients.read(begun_s, begun_s + (ended_s - begun_s) / max(1.0, length / _READ_BYTES))
        return data
