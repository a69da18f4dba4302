"""The data path of one volume on the node that is Primary: every write crosses this file and nothing else.

A write takes one of two ways:

*mirrored*  the peer has a disk and gets every write: one vectored send of the whole batch, then the local writes, then
            the answer when the peer's cumulative acknowledgement covers it (protocol C), when it has been received
            there (B), or when the socket took it (A);
*alone*     the block's bit is set in the bitmap, the local write is done, and the answer is held back until the
            superblock says that the peer is out of sync (`record_alone`).

Three records make a resync after any crash exact (the safety rules of docs/architecture):

hot        extents in the durable activity log; a write to any other extent waits for a transaction;
unsettled  what was sent to the peer and is not yet known to be durable there; becomes dirty when the link drops;
dirty      bits of the bitmap.

A *round* flushes the local disk and the peer; what a round covers is settled. Client flushes and the background
settling are the same rounds, shared by all who wait (group commit).
"""

import asyncio
import collections
import errno
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from nbdserver import extents
from nbdserver.export import NO_ERRORS, WriteDone
from replica import wire
from replica.activity_log import EXTENT_SHIFT, ActivityLog
from replica.admission import Admission
from replica.backpressure import Backpressure
from replica.bitmap import BLOCK_SHIFT, Bitmap, blocks_of
from replica.client_times import ClientTimes
from replica.group_commit import GroupCommit
from replica.link import PeerLink
from replica.metadata import Metadata
from replica.store import FailedStore, Store
from replica.sync_rate import Clients
from replica.tasks import spawn
from replica.unsettled import COUNT_BITS, Unsettled

log = logging.getLogger("replica.volume")

Writes = Sequence[tuple[int, memoryview]]
#: What to call when a batch is done, the errors of the local writes, and how many writes it has.
_Answer = tuple[WriteDone, Mapping[int, int], int]

#: A round is due after so many writes even if they are small: bounds the memory of `unsettled` (8 bytes each).
_SETTLE_WRITES: Final = 1 << 16


@dataclass(frozen=True)
class HandedOver:
    """What waits in a volume whose disk is no longer used: `replica.peer_volume` goes on with it.

    The volume still adds to `in_flight` the batch that it was writing when the disk failed.
    """

    sequence: int
    in_flight: "collections.deque[tuple[int, _Answer]]"
    asked: "dict[int, asyncio.Future[bool]]"
    waiting: list[tuple[int, memoryview, Callable[[int], None]]]


@dataclass(frozen=True)
class VolumeSettings:
    """What the data path needs to know of the configuration."""

    protocol: str
    settle_interval_s: float
    settle_bytes: int


class Volume:
    """One volume's local disk, activity log and bitmap, and the way of a write to both copies."""

    def __init__(
        self,
        settings: VolumeSettings,
        store: Store,
        metadata: Metadata,
        bitmap: Bitmap,
        activity_log: ActivityLog,
        record_alone: Callable[[], Awaitable[None]],
        disk_failed: Callable[[OSError], None],
    ) -> None:
        self.settings = settings
        self.size_bytes = store.size_bytes
        self.metadata = metadata
        self.bitmap = bitmap
        self.activity_log = activity_log
        #: Superblock says that the peer lacks writes: alone, writes may be answered (safety rule "Ack").
        self.alone_recorded = False
        #: Held while the record of who is in sync changes: counting the peer in and going on without it must not
        #: interleave, or `alone_recorded` and the superblock end up telling different stories (found by the simulator).
        self.membership = asyncio.Lock()
        self.admission = Admission(self)
        #: The peer, Primary without a good disk, works through this volume (replica.peer_service).
        self.serving_peer = False
        #: The disk is not used any more, and the peer goes on without it.
        self.handed_over = False
        self._record_alone = record_alone
        self._disk_failed = disk_failed
        self._use(store)
        self._link: PeerLink | None = None
        #: How writes go to the peer: by its link, or timed on their way. (So do reads of the disk.)
        self._send_writes: Callable[[Sequence[bytes | memoryview]], bool]
        self._client_times: ClientTimes | None = None
        self._sequence = 0
        self._in_flight: collections.deque[tuple[int, _Answer]] = collections.deque()
        self._asked: dict[int, asyncio.Future[bool]] = {}
        self._unsettled = Unsettled()
        self._unflushed_bytes = 0
        #: Of the round that is under way.
        self._flushing_bytes = 0
        self._backpressure = Backpressure(self._headroom_bytes, self._hold_writes, self._let_writes_go_on)
        self.epoch = 1
        self.settled_epoch = 0
        self._rounds = GroupCommit(lambda: spawn(self._run_round(), "flush of both copies"))
        self._changing: set[asyncio.Future[None]] = set()
        self._held: list[_Answer] = []
        self._recording: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def _use(self, store: Store) -> None:
        self.store = store
        # Reads need nothing of the volume.
        self.read_now: Callable[[int, int], bytes | None] = store.read_now
        self.read: Callable[[int, int], Coroutine[Any, Any, bytes]] = store.read
        self.prefetch = store.prefetch

    # ── what the node is doing ───────────────────────────────────────────────────────────────────────────────

    @property
    def mirroring(self) -> bool:
        """Whether every write goes to the peer."""
        return self._link is not None

    def start_mirroring(self, link: PeerLink) -> None:
        """From now on every write goes to the peer on `link`. The caller has put both copies in step, or marked
        what differs in the bitmap and started a resync.
        """
        self.watch_no_clients()
        self._link = link
        self._send_writes = link.send_buffers
        link.handlers[wire.DONE] = self._on_done
        link.handlers[wire.APPLIED] = self._on_acknowledged if self.settings.protocol == "C" else _ignore
        link.handlers[wire.RECEIVED] = self._on_acknowledged if self.settings.protocol == "B" else _ignore

    def watch_clients(self, clients: Clients, clock_s: Callable[[], float]) -> None:
        """Tell `clients` what is read and written, and what it takes, from now on and as long as this link is
        mirrored to.
        """
        assert self._link is not None
        times = ClientTimes(self._link, self.store, lambda: self._sequence, clients, clock_s)
        self._client_times = times
        self._send_writes, self.read_now, self.read = times.send_buffers, times.read_now, times.read

    @property
    def watches_clients(self) -> bool:
        """Whether somebody is told."""
        return self._client_times is not None

    def watch_no_clients(self) -> None:
        """From now on it costs nothing."""
        times, self._client_times = self._client_times, None
        if times is not None and self._link is not None:
            times.end()
            self._send_writes = self._link.send_buffers
            self.read_now, self.read = self.store.read_now, self.store.read

    def stop_mirroring(self) -> None:
        """The link is gone. What the peer may lack becomes dirty; what waited for it waits for the record instead."""
        self.watch_no_clients()
        self._link = None
        if self.handed_over:
            return
        for first, count in self._unsettled.take_all():
            self.bitmap.set_range(first, count)
        in_flight, self._in_flight = self._in_flight, collections.deque()
        for _, answer in in_flight:
            self._finish_alone(answer)
        asked, self._asked = self._asked, {}
        for future in asked.values():
            if not future.done():
                future.set_result(False)

    def abandon_store(self, error: OSError) -> None:
        """Use the local disk no more: everything that needs it fails from now on."""
        self._use(FailedStore(self.size_bytes, error))
        self.stop_timer()  # a disk that has failed is not flushed again; each try would be a line in the log

    def hand_over(self) -> "HandedOver":
        """The store is abandoned, and the peer, which is in sync, goes on without this copy: everything that waits.

        What is under way off the loop fails; what the peer was asked, it will answer to whoever takes this over.
        """
        self.watch_no_clients()
        self._link = None
        self.handed_over = True
        return HandedOver(self._sequence, self._in_flight, self._asked, self.admission.hand_over())

    async def quiet(self) -> None:
        """Return when no change is under way off the loop (nothing new is asked of this volume any more)."""
        await self.admission.idle()
        while self._changing:
            await asyncio.wait(set(self._changing))

    def start_serving_peer(self) -> None:
        """The peer is Primary and works through this volume; that its copy lacks something is on record."""
        self.serving_peer = True
        self.start_timer()

    async def end_serving_peer(self) -> None:
        """It does no more, and nothing of it is under way: flush, and let the activity log rest. OSError."""
        self.stop_timer()
        try:
            if not isinstance(self.store, FailedStore):
                await self.empty_activity_log()
        finally:
            self.serving_peer = False

    def start_timer(self) -> None:
        """Begin background settling (on becoming Primary)."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.settings.settle_interval_s, self._tick)

    def stop_timer(self) -> None:
        """End background settling (on becoming Secondary, or at the end)."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def report_failure(self, error: OSError) -> None:
        """The local disk, or the disk of its metadata, reported an error."""
        self._disk_failed(error)

    # ── plain writes ─────────────────────────────────────────────────────────────────────────────────────────

    def write_batch(self, writes: Writes, done: WriteDone) -> bool:
        """See `nbdserver.export.Export.write_batch`."""
        hot, epoch = self.activity_log.hot, self.epoch
        all_hot = True
        for offset, data in writes:
            extent = offset >> EXTENT_SHIFT
            last = (offset + len(data) - 1) >> EXTENT_SHIFT
            if extent in hot:
                hot[extent] = epoch
            else:
                all_hot = False
            while extent < last:
                extent += 1
                if extent in hot:
                    hot[extent] = epoch
                else:
                    all_hot = False
        if all_hot and self.admission.admits(writes):
            return self.submit(writes, done)
        self.admission.put_off(writes, done)
        return True

    def submit(self, writes: Writes, done: WriteDone) -> bool:
        """Carry out writes that may begin: their extents are hot, and nothing keeps them back."""
        if self._link is not None:
            return self._write_mirrored(self._link, writes, done)
        self._write_alone(writes, done)
        return False

    def _write_mirrored(self, link: PeerLink, writes: Writes, done: WriteDone) -> bool:
        sequence = self._sequence
        note, pack = self._unsettled.recent.append, wire.HEADER.pack
        buffers: list[bytes | memoryview] = []
        total = 0
        for offset, data in writes:
            sequence += 1
            length = len(data)
            check = wire.checksum(wire.WRITE, 0, 0, length, sequence, offset, data) if link.integrity else 0
            buffers.append(pack(wire.WRITE, 0, 0, length, sequence, offset, check))
            buffers.append(data)
            first = offset >> BLOCK_SHIFT
            note(first << COUNT_BITS | (((offset + length - 1) >> BLOCK_SHIFT) - first + 1))
            total += length
        self._sequence = sequence
        # The peer first: it works while the local writes are done.
        keeps = self._send_writes(buffers)
        errors = self._write_local(writes)
        if self.settings.protocol == "A" and not self.handed_over:
            answer = (done, errors, len(writes))
            link.when_drained(lambda: self._finish_alone(answer) if link.closed else done(errors))
        else:
            self._in_flight.append((sequence, (done, errors, len(writes))))
        self._count_unflushed(total)
        return keeps

    def _write_alone(self, writes: Writes, done: WriteDone) -> None:
        total = 0
        for offset, data in writes:
            self.bitmap.set_bytes(offset, len(data))
            total += len(data)
        errors = self._write_local(writes)
        self._count_unflushed(total)
        self._finish_alone((done, errors, len(writes)))

    def _write_local(self, writes: Writes) -> Mapping[int, int]:
        write_now = self.store.write_now
        try:
            for offset, data in writes:
                write_now(offset, data)
        except OSError:
            return self._write_local_carefully(writes)
        return NO_ERRORS

    def _write_local_carefully(self, writes: Writes) -> Mapping[int, int]:
        """After a failure: each write by itself, so that only those that fail are answered with an error."""
        errors: dict[int, int] = {}
        for index, (offset, data) in enumerate(writes):
            try:
                self.store.write_now(offset, data)
            except OSError as error:
                errors[index] = error.errno or errno.EIO
                self.bitmap.set_bytes(offset, len(data))
                self._disk_failed(error)
        return errors

    def _finish_alone(self, answer: _Answer) -> None:
        """Answer a batch that the peer does not have, or hold the answer until the superblock says so."""
        if isinstance(self.store, FailedStore):
            # Neither copy can be relied on to have it.
            _answer_failed(answer)
            return
        if self.alone_recorded:
            done, errors, _ = answer
            done(errors)
            return
        if self.serving_peer:
            # The peer is Primary, has every write by now, and goes on by itself; nobody is left to be answered.
            _answer_failed(answer)
            return
        self._held.append(answer)
        self._start_recording()

    def _on_acknowledged(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        in_flight = self._in_flight
        while in_flight and in_flight[0][0] <= sequence:
            done, errors, _ = in_flight.popleft()[1]
            done(errors)

    # ── holes ────────────────────────────────────────────────────────────────────────────────────────────────

    async def block_status(self, offset: int, length: int, most: int) -> list[extents.Extent]:
        """See `nbdserver.export.Export.block_status`: holes of the local disk, which has every answered write."""

        async def next_data(at: int, end: int) -> tuple[int, int]:
            return await self.store.next_data(at, end)  # the store of that moment: it may be abandoned on the way

        return await extents.walk(next_data, offset, length, most, asyncio.get_running_loop().time)

    def zeroes_fast(self, offset: int, length: int, punch: bool) -> bool:
        """Whether `zero` of this range is sure to be fast on every node that has to do it."""
        punches_fast = self.store.punches_fast and (self._link is None or self._link.peer_punches_fast)
        return extents.zeroes_fast(punches_fast, offset, length, punch)

    # ── writes off the loop ──────────────────────────────────────────────────────────────────────────────────

    async def write_durable(self, offset: int, data: bytes) -> None:
        """Write and return when the data is durable on every in-sync node (FUA)."""
        await self._change(
            offset,
            len(data),
            lambda: self.store.write_durable(offset, data),
            lambda: self._ask(wire.WRITE_DURABLE, data, offset=offset),
        )

    async def zero(self, offset: int, length: int, punch: bool) -> None:
        """Make the range read as zeroes on both nodes; `punch`: and deallocate it where the store can.

        In pieces: a range may be longer than what the activity log can hold, and writes to it wait meanwhile.
        """
        stop = offset + length
        while offset < stop:
            piece_stop = min(stop, offset + self.admission.max_change_bytes)
            await self._zero_piece(offset, piece_stop - offset, punch)
            offset = piece_stop

    async def _zero_piece(self, offset: int, length: int, punch: bool) -> None:
        flags = wire.FLAG_PUNCH if punch else 0
        await self._change(
            offset,
            length,
            lambda: self.store.zero(offset, length, punch),
            lambda: self._ask(wire.ZERO, wire.pack_length(length), flags=flags, offset=offset),
        )

    async def _change(
        self,
        offset: int,
        length: int,
        locally: Callable[[], Awaitable[None]],
        remotely: Callable[[], "asyncio.Future[bool]"],
    ) -> None:
        """A change that may block: under its range lock, on both nodes at once."""
        await self.admission.begin_change(offset, offset + length)
        finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changing.add(finished)
        try:
            by_peer = await self._change_both(offset, length, locally, remotely)
        finally:
            self._changing.discard(finished)
            finished.set_result(None)
            self.admission.end_change(offset, offset + length)
        if not by_peer:
            await self.ensure_alone_recorded()

    async def _change_both(
        self,
        offset: int,
        length: int,
        locally: Callable[[], Awaitable[None]],
        remotely: Callable[[], "asyncio.Future[bool]"],
    ) -> bool:
        """The change itself, on both nodes at once. True when the peer has done it too."""
        blocks = blocks_of(offset, length)
        asked: asyncio.Future[bool] | None = None
        if self._link is not None:
            self._unsettled.note(*blocks)
            asked = remotely()
        else:
            self.bitmap.set_range(*blocks)
        self._count_unflushed(length)
        try:
            await locally()
        except OSError as error:
            self.bitmap.set_range(*blocks)
            self._disk_failed(error)
            raise
        finally:
            by_peer = await asked if asked is not None else False
        return by_peer

    async def send_again(self, offset: int, length: int) -> bool:
        """Send what is here to the peer, which has something else, as if a client had written it just now: the log, the
        order of writes and what is unsettled are as with any other write, so its dirty bits go at once. (A range inside
        one extent.) False when the peer has not taken it, or the disk has not.
        """
        await self.admission.begin_change(offset, offset + length)
        finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changing.add(finished)
        answered: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def done(errors: Mapping[int, int]) -> None:
            if not answered.done():
                answered.set_result(not errors)

        try:
            data = await self.store.read_medium(offset, length)
            if self._link is None:
                return False
            self.bitmap.clear_range(*blocks_of(offset, length))
            self.submit([(offset, memoryview(data))], done)
        finally:
            self._changing.discard(finished)
            finished.set_result(None)
            self.admission.end_change(offset, offset + length)
        return await answered

    def _ask(self, kind: int, payload: bytes = b"", *, flags: int = 0, offset: int = 0) -> "asyncio.Future[bool]":
        """Send a request that the peer answers with DONE. Result: False when the link was lost first."""
        assert self._link is not None
        self._sequence += 1
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._asked[self._sequence] = future
        self._link.send(kind, payload, flags=flags, sequence=self._sequence, offset=offset)
        return future

    def _on_done(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        future = self._asked.pop(sequence, None)
        if future is None or future.done():
            return
        if flags & wire.FLAG_ERROR:
            # The peer's disk failed and it says so by its own UPDATE; without its answer it is not in sync.
            assert self._link is not None
            self._link.refuse(f"the peer's disk failed (errno {offset}).")
            if not future.done():
                future.set_result(False)
        else:
            future.set_result(True)

    # ── rounds: flush on both sides ──────────────────────────────────────────────────────────────────────────

    async def flush(self) -> None:
        """Return when every write answered before this call is durable on every in-sync node."""
        await self._rounds.flush()
        if self.handed_over:
            raise OSError(errno.EIO, "the disk is no longer used")
        if self._link is None and self.bitmap.count:
            # Durable here, but the peer may lack some of it: from this answer on it must not pass for an equal copy.
            await self.ensure_alone_recorded()

    async def settle(self) -> None:
        """Flush this disk, and the peer's if there is one; promises nothing to a client."""
        await self._rounds.flush()

    async def _run_round(self) -> None:
        epoch = self.epoch
        self.epoch += 1
        self._unsettled.begin_round()
        self._flushing_bytes, self._unflushed_bytes = self._unflushed_bytes, 0
        if self._changing:
            # They touched their extents in this epoch; it is not settled before they are done and flushed.
            await asyncio.wait(set(self._changing))
        asked = self._ask(wire.FLUSH) if self._link is not None else None
        try:
            await self.store.flush()
        except OSError as error:
            self._disk_failed(error)
            raise
        by_peer = await asked if asked is not None else False
        while not by_peer and self._link is not None:
            # The peer came (back) meanwhile: it is to be flushed as well.
            by_peer = await self._ask(wire.FLUSH)
        if by_peer:
            self._unsettled.end_round()
        self._flushing_bytes = 0
        self.settled_epoch = epoch

    def _count_unflushed(self, length: int) -> None:
        self._unflushed_bytes += length
        self._backpressure.wrote(length)
        due = self._unflushed_bytes >= self.settings.settle_bytes or len(self._unsettled.recent) >= _SETTLE_WRITES
        if due:
            self._settle_in_background()

    def _headroom_bytes(self) -> float:
        """What is dirty is not this volume's when all of it has been flushed."""
        return self.store.headroom_bytes() if self._unflushed_bytes or self._flushing_bytes else math.inf

    def _hold_writes(self) -> None:
        self.admission.close_gate("page cache")
        self._settle_in_background()

    def _let_writes_go_on(self) -> None:
        self.admission.open_gate("page cache")

    def _tick(self) -> None:
        self._timer = None
        if self._unflushed_bytes:
            self._settle_in_background()
        self.start_timer()

    def _settle_in_background(self) -> None:
        if not self._rounds.running:
            spawn(self.settle(), "background flush of both copies")

    # ── the activity log ─────────────────────────────────────────────────────────────────────────────────────

    async def empty_activity_log(self) -> None:
        """On demotion: everything is flushed, bits that are left are made durable, and no extent stays hot."""
        await self.admission.idle()
        await self.settle()
        await self.metadata.save_bitmap(self.bitmap)
        await self.metadata.save_activity_log(())
        self.activity_log.hot.clear()

    # ── being alone ──────────────────────────────────────────────────────────────────────────────────────────

    async def ensure_alone_recorded(self) -> None:
        """Return when the peer gets every write, or the superblock says that it does not."""
        while not self.alone_recorded and self._link is None:
            if self.serving_peer:
                raise OSError(errno.ENOTCONN, "the Primary that asked for this is gone")
            await asyncio.shield(self._start_recording())

    def _start_recording(self) -> "asyncio.Task[None]":
        if self._recording is None:
            self._recording = spawn(self._run_recording(), "recording that the peer is out of sync")
        return self._recording

    async def _run_recording(self) -> None:
        failure: OSError | None = None
        try:
            if isinstance(self.store, FailedStore):
                # This copy is no longer one to go on with, so the peer must not be put on record as the worse one.
                raise OSError(errno.EIO, "the disk has failed and is no longer used")
            async with self.membership:
                if self._link is None and not self.alone_recorded:
                    # From the record on this copy outranks the peer's, which ran on: what it has in its page cache
                    # only, and a power cut could take, must not be less (found by the simulator).
                    await self.store.flush()
                    await self._record_alone()
                    self.alone_recorded = True
        except OSError as error:
            # Without the record these writes may not be acknowledged, and there is no second try at a failed flush.
            failure = error
            self._disk_failed(error)
            raise
        finally:
            self._recording = None
            held, self._held = self._held, []
            for answer in held:
                if failure is not None or isinstance(self.store, FailedStore):
                    _answer_failed(answer)
                else:
                    answer[0](answer[1])


def _answer_failed(answer: _Answer) -> None:
    done, _, count = answer
    done(dict.fromkeys(range(count), errno.EIO))


def _ignore(flags: int, sequence: int, offset: int, payload: memoryview) -> None:
    """An acknowledgement that this protocol does not wait for."""
