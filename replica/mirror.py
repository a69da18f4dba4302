"""The Secondary's side of replication: applies the Primary's frames to the local disk and answers them.

Plain writes are applied inline, in order, and answered by one cumulative acknowledgement per batch. What may block runs
in a task and is answered by its own DONE; the Primary keeps overlapping writes back until then, so order needs no lock
here.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from replica import wire
from replica.link import PeerLink
from replica.store import Store
from replica.tasks import spawn

log = logging.getLogger("replica.mirror")


class Mirror:
    """Handlers of one link's replication frames. Dropped with the link."""

    def __init__(self, link: PeerLink, store: Store, protocol: str, disk_failed: Callable[[OSError], None]) -> None:
        self._link = link
        self._store = store
        self._disk_failed = disk_failed
        self._early_word = protocol == "B"
        self._tasks: set[asyncio.Task[None]] = set()
        link.on_writes = self._on_writes
        link.handlers[wire.WRITE_DURABLE] = self._on_write_durable
        link.handlers[wire.ZERO] = self._on_zero
        link.handlers[wire.FLUSH] = self._on_flush

    async def finished(self) -> None:
        """Return when nothing that this link brought is under way any more (before this node is promoted)."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _on_writes(self, writes: Sequence[tuple[int, memoryview]], last: int) -> None:
        if self._early_word:
            self._link.send(wire.RECEIVED, sequence=last)
        size, write_now = self._store.size_bytes, self._store.write_now
        for offset, data in writes:
            if offset + len(data) > size:
                raise wire.ProtocolError(f"a write of {len(data)} bytes at {offset} is beyond the volume's end.")
            try:
                write_now(offset, data)
            except OSError as error:
                self._disk_failed(error)
                return
        self._link.send(wire.APPLIED, sequence=last)

    def _on_write_durable(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        self._check(offset, len(payload))
        data = bytes(payload)
        self._start(sequence, self._store.write_durable(offset, data))

    def _on_zero(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        length = wire.unpack_length(payload)
        self._check(offset, length)
        self._start(sequence, self._store.zero(offset, length, bool(flags & wire.FLAG_PUNCH)))

    def _on_flush(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        self._start(sequence, self._store.flush())

    def _check(self, offset: int, length: int) -> None:
        if not length or offset + length > self._store.size_bytes:
            raise wire.ProtocolError(f"a change of {length} bytes at {offset} is beyond the volume's end.")

    def _start(self, sequence: int, work: Coroutine[Any, Any, None]) -> None:
        task = spawn(self._answer(sequence, work), "change for the peer")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, sequence: int, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except OSError as error:
            self._link.send(wire.DONE, flags=wire.FLAG_ERROR, sequence=sequence, offset=error.errno or 5)
            self._disk_failed(error)
        else:
            self._link.send(wire.DONE, sequence=sequence)
