"""Resynchronisation: the source walks the bitmap and sends what is dirty; the target applies it.

Where it pays, hashes are sent first, and the target answers which blocks differ (`replica.sync_hash`). How fast it goes
is decided in `replica.sync_rate`.

The rules this file keeps (docs/architecture, "Cover" and "Resync against application writes"):

* a bit is cleared, on both nodes, only after the target has *flushed* the block, also one that was found to be equal;
* a block read before an application's write must not be applied after it: reads and sends happen in one step of the
  event loop, or under a range lock that keeps the write back;
* application writes go on meanwhile, on the same connection, so that order on the wire is order on the target.
"""

import asyncio
import collections
from collections.abc import Callable, Coroutine
from typing import Any, Final

from replica import sync_hash, wire
from replica.backpressure import Backpressure
from replica.bitmap import BLOCK_SHIFT, BLOCK_SIZE, Bitmap, add_run, blocks_of, whole_blocks
from replica.digests import block_digests, digest
from replica.link import PeerLink
from replica.range_lock import RangeLocks
from replica.store import Store
from replica.sync_rate import pace_of
from replica.tasks import spawn
from replica.throttle import Throttle

CHUNK_BYTES: Final = 256 << 10
#: Sent and not yet acknowledged, at most.
WINDOW_BYTES: Final = 4 << 20
#: What the disk reads ahead, once it has to be waited for.
READ_AHEAD_BYTES: Final = 8 << 20
#: Dirty blocks looked at in one go, and the longest hole sent in one frame.
RUN_BYTES: Final = 256 << 20
MOST_HOLES: Final = 8
#: Shorter holes are sent as data: a round trip each would cost more than it saves.
MIN_HOLE_BYTES: Final = 64 << 10
#: A flush on the target is asked for after so much data or time; bits are cleared, and progress shows, at that pace.
CHECKPOINT_BYTES: Final = 64 << 20
CHECKPOINT_INTERVAL_S: Final = 0.5

Ranges = list[tuple[int, int]]


class SyncSource:
    """Brings the peer in step over `link`. `run` returns when nothing is dirty; LinkLost ends it early.

    `rate_bytes_s`: a fixed rate; None: what clients hardly feel. `ask`: where it pays, ask the target first which
    blocks differ (`replica.sync_hash`).
    """

    def __init__(
        self,
        link: PeerLink,
        store: Store,
        bitmap: Bitmap,
        locks: RangeLocks,
        rate_bytes_s: int | None,
        clock_s: Callable[[], float],
        *,
        ask: bool = False,
    ) -> None:
        self._link = link
        self._store = store
        self._bitmap = bitmap
        self._locks = locks
        self.throttle: Final = Throttle(pace_of(rate_bytes_s, CHUNK_BYTES, WINDOW_BYTES), clock_s)
        self._sampling = sync_hash.Sampling() if ask else None
        self._now: Final = clock_s
        self._number = 0
        #: Number of a frame -> how much work it is, and when it was sent.
        self._unacknowledged: dict[int, tuple[int, float]] = {}
        #: Number of a question -> the range that it is about.
        self._asked: dict[int, tuple[int, int]] = {}
        #: What differs, as the target says.
        self._wanted: collections.deque[tuple[int, int]] = collections.deque()
        #: (from, start, stop): a hole from "from" to "start", then data up to "stop"; or so it was a moment ago. To ask
        #: for each dirty block would be a call in a thread for each.
        self._known = (0, 0, 0)
        self._tasks: asyncio.TaskGroup
        #: Holes that are being sent, each in a task: together they have one round trip, not one each.
        self._holes = 0
        #: Where what was read ahead begins and ends, since the first read that had to wait for the disk.
        self._ahead = (0, 0)
        #: What was sent as data, and what was found to be equal, since this began.
        self.data_bytes = 0
        self.equal_bytes = 0
        self._sent: Ranges = []
        self._sent_bytes = 0
        self._checkpoint_due_s = 0.0
        self._checkpoints: dict[int, Ranges] = {}
        self._progress = asyncio.Event()
        self.pause: Final = self.throttle.pause
        link.handlers[wire.SYNC_ACK] = self._on_ack
        link.handlers[wire.SYNC_FLUSHED] = self._on_flushed
        if ask:
            link.handlers[wire.SYNC_DIFFERS] = self._on_differs

    async def run(self) -> None:
        """Send until no bit is left. Cancel it when the link is lost. OSError."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                await self._run()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _run(self) -> None:
        while self._bitmap.count:
            cursor, self._known = 0, (0, 0, 0)
            while (run := self._bitmap.next_run(cursor, RUN_BYTES >> BLOCK_SHIFT)) is not None:
                first, count = run
                cursor = first + count
                stop = min(cursor << BLOCK_SHIFT, self._store.size_bytes)
                await self._send_range(first << BLOCK_SHIFT, stop)
            while self._asked or self._wanted:
                await self._until(lambda: not self._asked or bool(self._wanted))
                await self._send_wanted()
            await self._until(lambda: not self._unacknowledged and not self._holes)
            self._checkpoint()
            await self._until(lambda: not self._checkpoints)

    # ── sending ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _send_range(self, position: int, stop: int) -> None:
        """Send [position, stop) in pieces of whole blocks: what of it is in the source, and its holes as holes."""
        while position < stop:
            await self.throttle.running()
            start, data_stop = await self._next_data(position, stop)
            if start - position >= MIN_HOLE_BYTES or start >= stop:
                await self._until(lambda: self._holes < MOST_HOLES)
                self._holes += 1
                self._tasks.create_task(self._send_hole(position, start))
                position = start
                continue
            while position < data_stop:
                piece_stop = min(position + self.throttle.piece_bytes(), data_stop)
                await self._send_piece(position, piece_stop)
                await self._send_wanted()
                position = piece_stop

    async def _next_data(self, position: int, stop: int) -> tuple[int, int]:
        """The store's next data in [position, stop). It may be known from before: what has become a hole meanwhile may
        be sent as data, and `_send_hole` makes sure of its hole.
        """
        known_from, start, data_stop = self._known
        if not known_from <= position < data_stop:
            start, data_stop = await self._look(position, min(position + RUN_BYTES, self._store.size_bytes))
            self._known = position, start, data_stop
        return max(position, min(start, stop)), min(data_stop, stop)

    async def _look(self, position: int, stop: int) -> tuple[int, int]:
        """Ask the store; widened to whole blocks: a bit must not be cleared for half a block."""
        return whole_blocks(position, stop, *await self._store.next_data(position, stop))

    async def _send_hole(self, start: int, stop: int) -> None:
        """Send [start, stop) as a hole, as far as that is still true once writes are kept back. (They are until the
        target has made it, which it does beside the stream.) What is data by now stays dirty, for the next walk.
        """
        async with self._locks.hold(start, stop):
            stop, _ = await self._look(start, stop)
            if stop > start:
                self._number = number = self._number + 1
                self._unacknowledged[number] = 0, 0.0
                self._link.send(wire.SYNC_ZERO, wire.pack_length(stop - start), sequence=number, offset=start)
                await self._until(lambda: number not in self._unacknowledged)
        self._holes -= 1
        self._settle(start, stop)
        self._told()

    async def _send_piece(self, start: int, stop: int) -> None:
        """Send [start, stop), or ask the target whether it has to be sent."""
        if self._sampling is not None and self._sampling.wanted(blocks_of(start, stop - start)[1]):
            await self.throttle.room(stop - start)
            await self._read_and(self._send_question, start, stop)
        else:
            await self._send_data(start, stop)

    async def _send_wanted(self) -> None:
        """Send what the target has answered that it lacks."""
        while self._wanted:
            start, stop = self._wanted.popleft()
            while start < stop:
                piece_stop = min(start + self.throttle.piece_bytes(), stop)
                await self._send_data(start, piece_stop)
                start = piece_stop

    async def _send_data(self, start: int, stop: int) -> None:
        await self.throttle.room(stop - start)
        await self._read_and(self._send_read, start, stop)
        self._settle(start, stop)

    async def _read_and(self, send: Callable[[int, bytes], None], start: int, stop: int) -> None:
        """Read [start, stop) and send it, or something about it, with no write in between."""
        # Clients' reads would wait behind all that the disk was asked for.
        ahead = not self.throttle.gives_way()
        data = None if self._locks.overlaps(start, stop) else self._store.read_now(start, stop - start, ahead=ahead)
        if data is None:
            if ahead:
                await self._read_ahead(start)
            async with self._locks.hold(start, stop):
                send(start, await self._store.read(start, stop - start, ahead=ahead))
        else:
            send(start, data)
        if self._link.congested:
            await self._link.drained()

    async def _read_ahead(self, position: int) -> None:
        """The disk has to be read: have it read what comes next, too, while that which is read is sent."""
        ahead_from, ahead_stop = self._ahead
        if ahead_from <= position < ahead_stop - READ_AHEAD_BYTES // 2:
            return
        block = position >> BLOCK_SHIFT
        run = self._bitmap.next_run(block, READ_AHEAD_BYTES >> BLOCK_SHIFT)
        if run is not None and run[0] == block:
            stop = min((block + run[1]) << BLOCK_SHIFT, self._store.size_bytes)
            self._ahead = position, position + READ_AHEAD_BYTES
            await self._store.prefetch(position, stop - position)

    def _send_read(self, start: int, data: bytes) -> None:
        number = self._numbered(len(data), len(data))
        self._link.send_in_place(wire.SYNC_DATA, data, sequence=number, offset=start)
        self._sent_bytes += len(data)
        self.data_bytes += len(data)

    def _send_question(self, start: int, data: bytes) -> None:
        hashes = block_digests(data, self._link.session)
        number = self._numbered(len(data), len(hashes))
        self._asked[number] = start, start + len(data)
        self._link.send(wire.SYNC_HASH, hashes, sequence=number, offset=start)

    def _numbered(self, length: int, on_wire: int) -> int:
        self._number += 1
        self._unacknowledged[self._number] = length, self.throttle.begun(length, on_wire)
        return self._number

    # ── settling ─────────────────────────────────────────────────────────────────────────────────────────────

    def _settle(self, start: int, stop: int) -> None:
        """[start, stop) is the same on the target: the next checkpoint, due now or later, is to clear its bits. (It has
        a thousand neighbouring pieces: clearing them one by one would hold the event loop.)
        """
        if start < stop:
            add_run(self._sent, *blocks_of(start, stop - start))
        if self._sent_bytes >= CHECKPOINT_BYTES or self._now() >= self._checkpoint_due_s:
            self._checkpoint()

    def _checkpoint(self) -> None:
        """Ask the target for a flush; its answer clears the bits of everything sent before."""
        if not self._sent:
            return
        self._number += 1
        self._checkpoints[self._number] = self._sent
        self._sent, self._sent_bytes = [], 0
        self._checkpoint_due_s = self._now() + CHECKPOINT_INTERVAL_S
        self._link.send(wire.SYNC_FLUSH, sequence=self._number)

    def _on_ack(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        self._acknowledged(sequence)

    def _acknowledged(self, sequence: int) -> None:
        length, sent_s = self._unacknowledged.pop(sequence, (0, 0.0))
        if length:
            self.throttle.ended(length, sent_s)
        self._told()

    def _on_differs(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        """What is equal needs no data, but a flush all the same: the target may have it in its page cache only."""
        if sequence not in self._asked or self._sampling is None:
            raise wire.ProtocolError("the peer answers a question about blocks that was not asked.")
        start, stop = self._asked.pop(sequence)
        blocks = blocks_of(start, stop - start)[1]
        equal = 0
        try:
            for differ, first, count in sync_hash.runs(payload, blocks):
                run_start = start + (first << BLOCK_SHIFT)
                run_stop = min(run_start + (count << BLOCK_SHIFT), stop)
                if differ:
                    self._wanted.append((run_start, run_stop))
                else:
                    equal += count
                    self.equal_bytes += run_stop - run_start
                    self._settle(run_start, run_stop)
        except ValueError as error:
            raise wire.ProtocolError(f"the peer's answer about blocks could not be read ({error}).") from error
        self._sampling.learned(equal, blocks)
        self._acknowledged(sequence)

    def _on_flushed(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        for first, count in self._checkpoints.pop(sequence, ()):
            self._bitmap.clear_range(first, count)
        self._told()

    async def _until(self, true: Callable[[], bool]) -> None:
        while not true():
            await self._progress.wait()

    def _told(self) -> None:
        """Something has changed for all who wait."""
        self._progress.set()
        self._progress = asyncio.Event()


class SyncTarget:
    """Applies a resync that comes in over `link`. The superblock says Inconsistent before this exists."""

    def __init__(self, link: PeerLink, store: Store, bitmap: Bitmap, disk_failed: Callable[[OSError], None]) -> None:
        self._link = link
        self._store = store
        self._bitmap = bitmap
        self._disk_failed = disk_failed
        self._backpressure = Backpressure(store.headroom_bytes, link.pause_reading, link.resume_reading)
        self._applied: Ranges = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.received_bytes = 0
        link.handlers[wire.SYNC_DATA] = self._on_data
        link.handlers[wire.SYNC_ZERO] = self._on_zero
        link.handlers[wire.SYNC_FLUSH] = self._on_flush
        link.handlers[wire.SYNC_HASH] = self._on_hash

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
        self._backpressure.wrote(len(payload))

    def _on_zero(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        length = wire.unpack_length(payload)
        self._check(offset, length)
        self._start(self._make_hole(sequence, offset, length))

    def _on_hash(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        try:
            count = sync_hash.count_of(payload)
        except ValueError as error:
            raise wire.ProtocolError(f"a question about blocks could not be read ({error}).") from error
        length = min(count << BLOCK_SHIFT, self._store.size_bytes - offset)
        if offset % BLOCK_SIZE or length <= 0 or blocks_of(offset, length)[1] != count:
            raise wire.ProtocolError(f"a question about {count} blocks at {offset} is beyond the volume's end.")
        try:
            data = self._store.read_now(offset, length)
        except OSError as error:
            self._disk_failed(error)
            return
        if data is None:
            self._start(self._read_and_compare(sequence, offset, length, bytes(payload)))
        else:
            self._compare(sequence, offset, data, payload)

    async def _read_and_compare(self, sequence: int, offset: int, length: int, hashes: bytes) -> None:
        """(Writes may be applied meanwhile. Both nodes get those, whatever is read of them here.)"""
        try:
            data = await self._store.read(offset, length)
        except OSError as error:
            self._disk_failed(error)
            return
        self._compare(sequence, offset, data, hashes)

    def _compare(self, sequence: int, offset: int, data: bytes, hashes: bytes | memoryview) -> None:
        seed = self._link.session
        # Of a block, and of the last one of the volume, which may be shorter: a hole has the same bytes.
        zeroes = {digest(bytes(length), seed) for length in (BLOCK_SIZE, len(data) % BLOCK_SIZE) if length}
        answer = sync_hash.differing(block_digests(data, seed), bytes(hashes), zeroes)
        for differ, first, count in sync_hash.runs(answer, sync_hash.count_of(hashes)):
            if not differ:
                add_run(self._applied, (offset >> BLOCK_SHIFT) + first, count)
        self._link.send(wire.SYNC_DIFFERS, answer, sequence=sequence)

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
        add_run(self._applied, *blocks_of(offset, length))

    def _check(self, offset: int, length: int) -> None:
        if not length or offset + length > self._store.size_bytes:
            raise wire.ProtocolError(f"resync data of {length} bytes at {offset} is beyond the volume's end.")

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = spawn(work, "resync from the peer")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
