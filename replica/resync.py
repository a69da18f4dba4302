"""Resynchronisation: the source walks the bitmap and sends what is dirty; the target applies it.

The rules this file keeps (docs/architecture, "Cover" and "Resync against application writes"):

* a bit is cleared, on both nodes, only after the target has *flushed* the block;
* a block read before an application's write must not be applied after it: reads and sends happen in one step of the
  event loop, or under a range lock that keeps the write back;
* application writes go on meanwhile, on the same connection, so that order on the wire is order on the target.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final

from replica import wire
from replica.bitmap import BLOCK_SHIFT, BLOCK_SIZE, Bitmap, blocks_of
from replica.link import PeerLink
from replica.range_lock import RangeLocks
from replica.store import Store
from replica.tasks import spawn

CHUNK_BYTES: Final = 256 << 10
#: Sent and not yet acknowledged: bounds how long an application's write can queue behind resync data.
WINDOW_BYTES: Final = 4 << 20
#: Dirty blocks looked at in one go, and the longest hole sent in one frame.
RUN_BYTES: Final = 256 << 20
#: Shorter holes are sent as data: a round trip each would cost more than it saves.
MIN_HOLE_BYTES: Final = 64 << 10
#: A flush on the target is asked for after so much data or time; bits are cleared, and progress shows, at that pace.
CHECKPOINT_BYTES: Final = 64 << 20
CHECKPOINT_INTERVAL_S: Final = 0.5

Ranges = list[tuple[int, int]]


class SyncSource:
    """Brings the peer in step over `link`. `run` returns when nothing is dirty; LinkLost ends it early."""

    def __init__(
        self, link: PeerLink, store: Store, bitmap: Bitmap, locks: RangeLocks, rate_bytes_s: int | None
    ) -> None:
        self._link = link
        self._store = store
        self._bitmap = bitmap
        self._locks = locks
        self._rate = rate_bytes_s
        self._number = 0
        self._unacknowledged: dict[int, int] = {}
        self._in_window = 0
        self._sent: Ranges = []
        self._sent_bytes = 0
        self._checkpoint_due_s = 0.0
        self._checkpoints: dict[int, Ranges] = {}
        self._progress = asyncio.Event()
        self._running = asyncio.Event()
        self._running.set()
        self._next_send_s = 0.0
        link.handlers[wire.SYNC_ACK] = self._on_ack
        link.handlers[wire.SYNC_FLUSHED] = self._on_flushed

    def pause(self, paused: bool) -> None:
        """Stop sending (what is sent is still settled), or go on."""
        if paused:
            self._running.clear()
        else:
            self._running.set()

    async def run(self) -> None:
        """Send until no bit is left. Cancel it when the link is lost."""
        while self._bitmap.count:
            cursor = 0
            while (run := self._bitmap.next_run(cursor, RUN_BYTES >> BLOCK_SHIFT)) is not None:
                first, count = run
                cursor = first + count
                stop = min(cursor << BLOCK_SHIFT, self._store.size_bytes)
                await self._send_range(first << BLOCK_SHIFT, stop)
            await self._until(lambda: not self._unacknowledged)
            self._checkpoint()
            await self._until(lambda: not self._checkpoints)

    # ── sending ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _send_range(self, position: int, stop: int) -> None:
        """Send [position, stop) in pieces of whole blocks: what of it is in the source, and its holes as holes."""
        while position < stop:
            await self._running.wait()
            start, data_stop = await self._next_data(position, stop)
            if start - position >= MIN_HOLE_BYTES or start >= stop:
                piece_stop = await self._send_hole(position, start)
                self._settle(position, piece_stop)
                position = piece_stop
                continue
            while position < data_stop:
                piece_stop = min(position + CHUNK_BYTES, data_stop)
                await self._room(piece_stop - position)
                await self._send_data(position, piece_stop)
                self._settle(position, piece_stop)
                position = piece_stop

    async def _next_data(self, position: int, stop: int) -> tuple[int, int]:
        """The store's next data, widened to whole blocks: a bit must not be cleared for half a block."""
        start, data_stop = await self._store.next_data(position, stop)
        if start >= stop:
            return stop, stop
        start = max(position, start >> BLOCK_SHIFT << BLOCK_SHIFT)
        return start, min(stop, (data_stop + BLOCK_SIZE - 1) >> BLOCK_SHIFT << BLOCK_SHIFT)

    async def _send_hole(self, start: int, stop: int) -> int:
        """Send [start, stop) as a hole; returns how far that is still true once writes are kept back."""
        async with self._locks.hold(start, stop):
            data_start, _ = await self._next_data(start, stop)
            stop = min(stop, data_start)
            if stop > start:
                number = self._numbered(0)
                self._link.send(wire.SYNC_ZERO, wire.pack_length(stop - start), sequence=number, offset=start)
                await self._until(lambda: number not in self._unacknowledged)
        return stop

    async def _send_data(self, start: int, stop: int) -> None:
        data = None if self._locks.overlaps(start, stop) else self._store.read_now(start, stop - start)
        if data is None:
            async with self._locks.hold(start, stop):
                self._send_read(start, await self._store.read(start, stop - start))
        else:
            self._send_read(start, data)
        if self._link.congested:
            await self._link.drained()

    def _send_read(self, start: int, data: bytes) -> None:
        self._link.send(wire.SYNC_DATA, data, sequence=self._numbered(len(data)), offset=start)
        self._sent_bytes += len(data)

    def _numbered(self, length: int) -> int:
        self._number += 1
        self._unacknowledged[self._number] = length
        self._in_window += length
        return self._number

    async def _room(self, length: int) -> None:
        """Wait until `length` bytes may be sent: not paused, window open, rate kept."""
        await self._running.wait()
        await self._until(lambda: self._in_window < WINDOW_BYTES)
        if self._rate is not None:
            loop = asyncio.get_running_loop()
            now = loop.time()
            if self._next_send_s > now:
                await asyncio.sleep(self._next_send_s - now)
            self._next_send_s = max(self._next_send_s, now) + length / self._rate

    # ── settling ─────────────────────────────────────────────────────────────────────────────────────────────

    def _settle(self, start: int, stop: int) -> None:
        """[start, stop) was sent: the next checkpoint, due now or later, is to clear its bits."""
        if start < stop:
            self._sent.append(blocks_of(start, stop - start))
        if self._sent_bytes >= CHECKPOINT_BYTES or asyncio.get_running_loop().time() >= self._checkpoint_due_s:
            self._checkpoint()

    def _checkpoint(self) -> None:
        """Ask the target for a flush; its answer clears the bits of everything sent before."""
        if not self._sent:
            return
        self._number += 1
        self._checkpoints[self._number] = self._sent
        self._sent, self._sent_bytes = [], 0
        self._checkpoint_due_s = asyncio.get_running_loop().time() + CHECKPOINT_INTERVAL_S
        self._link.send(wire.SYNC_FLUSH, sequence=self._number)

    def _on_ack(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        self._in_window -= self._unacknowledged.pop(sequence, 0)
        self._progress.set()

    def _on_flushed(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        for first, count in self._checkpoints.pop(sequence, ()):
            self._bitmap.clear_range(first, count)
        self._progress.set()

    async def _until(self, true: Callable[[], bool]) -> None:
        while not true():
            self._progress.clear()
            await self._progress.wait()


class SyncTarget:
    """Applies a resync that comes in over `link`. The superblock says Inconsistent before this exists."""

    def __init__(self, link: PeerLink, store: Store, bitmap: Bitmap, disk_failed: Callable[[OSError], None]) -> None:
        self._link = link
        self._store = store
        self._bitmap = bitmap
        self._disk_failed = disk_failed
        self._applied: Ranges = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.received_bytes = 0
        link.handlers[wire.SYNC_DATA] = self._on_data
        link.handlers[wire.SYNC_ZERO] = self._on_zero
        link.handlers[wire.SYNC_FLUSH] = self._on_flush

    async def finished(self) -> None:
        """Return when nothing that this link brought is under way any more."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _on_data(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        self._check(offset, len(payload))
        try:
            self._store.write_now(offset, payload)
        except OSError as error:
            self._disk_failed(error)
            return
        self.received_bytes += len(payload)
        self._note(offset, len(payload))
        self._link.send(wire.SYNC_ACK, sequence=sequence)

    def _on_zero(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        length = wire.unpack_length(payload)
        self._check(offset, length)
        self._start(self._make_hole(sequence, offset, length))

    def _on_flush(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        applied, self._applied = self._applied, []
        self._start(self._flush(sequence, applied))

    async def _make_hole(self, sequence: int, offset: int, length: int) -> None:
        """Deallocate, even where this disk seems to have a hole already: after a failed flush its page cache may show
        one that the disk does not have (found by the simulator).
        """
        try:
            await self._store.zero(offset, length, True)
        except OSError as error:
            self._disk_failed(error)
            return
        self._note(offset, length)
        self._link.send(wire.SYNC_ACK, sequence=sequence)

    async def _flush(self, sequence: int, applied: Ranges) -> None:
        try:
            await self._store.flush()
        except OSError as error:
            self._disk_failed(error)
            return
        for first, count in applied:
            self._bitmap.clear_range(first, count)
        self._link.send(wire.SYNC_FLUSHED, sequence=sequence)

    def _note(self, offset: int, length: int) -> None:
        self._applied.append(blocks_of(offset, length))

    def _check(self, offset: int, length: int) -> None:
        if not length or offset + length > self._store.size_bytes:
            raise wire.ProtocolError(f"resync data of {length} bytes at {offset} is beyond the volume's end.")

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = spawn(work, "resync from the peer")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
