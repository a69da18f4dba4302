"""Comparing two copies while clients write: the driver walks the range and asks, the other node answers.

What is compared must be the same point in the stream of writes on both nodes, or a write that is on its way would be
taken for a difference, or hide one:

1. the driver takes the range lock: its own clients' writes to the range wait from here on;
2. it asks, behind all its writes on the wire; the other node takes its range lock, hashes, and answers behind all its
   own writes. (Only one of the two is Primary. Neither needs to know which, nor that it changes meanwhile.)
3. the driver hashes only when it has the answer: by now it has applied everything that the other had written;
4. both let go when the driver has said what it found.

Where both have a hole nothing is read. Reads go to the medium: what is verified is what the disk has.
"""

import asyncio
import errno
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

from replica import wire
from replica.bitmap import BLOCK_SHIFT, BLOCK_SIZE, blocks_of, whole_blocks
from replica.digests import Runs, block_digests, differing, digest, pack_runs, unpack_runs
from replica.errors import ReplicaError
from replica.group_commit import GroupCommit
from replica.link import PeerLink
from replica.tasks import spawn
from replica.throttle import Throttle
from replica.verify_report import VerifyProgress

if TYPE_CHECKING:
    from replica.volume import Volume

#: What is locked, asked and compared at once, at most: a client's write to it waits for a round trip and two reads.
CHUNK_BYTES: Final = 256 << 10
#: Asked for and not yet compared: bounds what a client's write can queue behind, and the ranges that are locked.
WINDOW_BYTES: Final = 4 << 20
#: Shorter holes are read like data: a round trip each would cost more than it saves.
MIN_HOLE_BYTES: Final = 1 << 20
#: The longest hole that is asked about, and locked meanwhile.
MAX_HOLE_BYTES: Final = 1 << 30
#: Ranges that the other node may have us hold.
MAX_HELD: Final = 256
#: A peer that is alive and does not answer for so long will not.
ANSWER_TIMEOUT_S: Final = 60.0


class CannotVerify(ReplicaError):
    """The run cannot go on; the sentence (without a full stop) says why."""


class Marks:
    """Blocks that were found to differ: dirty at once, durably so soon after."""

    def __init__(self, volume: "Volume") -> None:
        self._volume = volume
        self._commit = GroupCommit(lambda: spawn(volume.metadata.save_bitmap(volume.bitmap), "marks of a verification"))
        self._unsaved = self._saving = False

    def set(self, start: int, stop: int, runs: Runs) -> int:
        """Mark blocks of [start, stop); how many bytes of the volume they are."""
        if not runs:
            return 0
        first, found_bytes = start >> BLOCK_SHIFT, 0
        for block, count in runs:
            self._volume.bitmap.set_range(first + block, count)
            at = start + (block << BLOCK_SHIFT)
            found_bytes += min(at + (count << BLOCK_SHIFT), stop) - at
        self._unsaved = True
        if not self._saving:
            self._saving = True
            spawn(self._save_in_background(), "marks of a verification")
        return found_bytes

    async def _save_in_background(self) -> None:
        try:
            while self._unsaved:
                self._unsaved = False
                await self._commit.flush()
        finally:
            self._saving = False

    async def save(self) -> None:
        """Return when everything marked (or cleared) so far is durable. OSError."""
        await self._commit.flush()


class Walker:
    """The driver's side of one run, from `progress.start` to `progress.stop`."""

    def __init__(
        self,
        link: PeerLink,
        volume: "Volume",
        throttle: Throttle,
        progress: VerifyProgress,
        seed: int,
        first_number: int,
    ) -> None:
        self._link = link
        self._volume = volume
        self._locks = volume.admission.locks
        self._throttle = throttle
        self._progress = progress
        self._seed = seed
        #: The number of the last range. Never used again on a link: an answer of an earlier run is told from ours.
        self.number = first_number
        self.marks = Marks(volume)
        self._answers: dict[int, asyncio.Future[tuple[int, int, bytes]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._under_way_bytes = 0
        self._moved = asyncio.Event()
        self._failure: OSError | ReplicaError | None = None

    async def walk(self) -> None:
        """Compare everything. OSError of the own disk, CannotVerify, LinkLost; cancel it at any time."""
        try:
            position = self._progress.start
            while position < self._progress.stop:
                position = await self._walk_from(position)
            await self._until(lambda: not self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)

    def answered(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        """VERIFY_DIGEST or VERIFY_DATA has come."""
        future = self._answers.get(sequence)
        if future is not None and not future.done():
            future.set_result((flags, offset, bytes(payload)))

    # ── the walk ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _walk_from(self, position: int) -> int:
        """Compare the next hole or the next piece of data, from `position` on; where it ends."""
        end = self._progress.stop
        start, stop = await self._next_data(position, end)
        if start - position >= MIN_HOLE_BYTES or start >= end:
            await self._until(lambda: self._under_way_bytes < WINDOW_BYTES)
            position, stop = await self._common_hole(position, min(start, position + MAX_HOLE_BYTES))
        while position < stop:
            await self._until(lambda: self._under_way_bytes < WINDOW_BYTES)
            piece_stop = min(position + self._throttle.piece_bytes(), stop)
            await self._throttle.room(piece_stop - position)
            self._begin(position, piece_stop)
            position = piece_stop
        return position

    async def _next_data(self, position: int, end: int) -> tuple[int, int]:
        """The next data here, widened to whole blocks."""
        return whole_blocks(position, end, *await self._volume.store.next_data(position, end))

    async def _common_hole(self, start: int, stop: int) -> tuple[int, int]:
        """Up to where [start, stop), a hole here, is one on both nodes, and where the other's data then end."""
        front = self._progress.front
        front.begin(start)
        async with self._locks.hold(start, stop):
            number = self._next_number()
            offset, payload = await self._ask(wire.VERIFY_HOLE, number, start, stop)
            theirs, theirs_stop = whole_blocks(start, stop, offset, offset + wire.unpack_length(payload))
            # Here as well only now: what the other node had written is applied by now.
            mine, mine_stop = await self._next_data(start, stop)
            self._link.send(wire.VERIFY_DONE, sequence=number, offset=min(theirs, mine))
        front.end(start, min(theirs, mine))
        return (theirs, theirs_stop) if theirs <= mine else (mine, mine_stop)

    def _begin(self, start: int, stop: int) -> None:
        self._progress.front.begin(start)
        self._under_way_bytes += stop - start
        begun_s = self._throttle.begun(stop - start, stop - start)
        task = spawn(self._compare(start, stop, begun_s), "verification of a range")
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._moved.set()

    async def _compare(self, start: int, stop: int, begun_s: float) -> None:
        try:
            await self._compare_locked(start, stop)
        except (OSError, ReplicaError) as error:
            self._failure = self._failure or error
        self._under_way_bytes -= stop - start
        self._throttle.ended(stop - start, begun_s)

    async def _compare_locked(self, start: int, stop: int) -> None:
        async with self._locks.hold(start, stop):
            number = self._next_number()
            _, theirs = await self._ask(wire.VERIFY_HASH, number, start, stop)
            data = await self._volume.store.read_medium(start, stop - start)
            runs: Runs = []
            if digest(data, self._seed) != theirs:
                _, theirs = await self._ask(wire.VERIFY_BLOCKS, number, start, stop)
                # A disk that reads differently each time: which of its blocks are right is not known.
                runs = differing(block_digests(data, self._seed), theirs) or [(0, blocks_of(start, stop - start)[1])]
            self._progress.found_bytes += self.marks.set(start, stop, runs)
            self._link.send(wire.VERIFY_DONE, pack_runs(runs), sequence=number, offset=stop)
        self._progress.front.end(start, stop)

    # ── asking ───────────────────────────────────────────────────────────────────────────────────────────────

    def _next_number(self) -> int:
        self.number += 1
        return self.number

    async def _ask(self, kind: int, number: int, start: int, stop: int) -> tuple[int, bytes]:
        """The other node's answer: its offset and payload."""
        future: asyncio.Future[tuple[int, int, bytes]] = asyncio.get_running_loop().create_future()
        self._answers[number] = future
        self._link.send(kind, wire.pack_length(stop - start), sequence=number, offset=start)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                flags, offset, payload = await future
        except TimeoutError:
            raise CannotVerify(f"the peer has not answered for {ANSWER_TIMEOUT_S:g} s") from None
        finally:
            del self._answers[number]
        if flags & wire.FLAG_ERROR:
            raise CannotVerify(f"the peer's disk could not be read (errno {offset})")
        return offset, payload

    async def _until(self, true: Callable[[], bool]) -> None:
        while self._failure is None and not true():
            self._moved.clear()
            await self._moved.wait()
        if self._failure is not None:
            raise self._failure


class Answers:
    """The other node's side of one run."""

    def __init__(
        self,
        link: PeerLink,
        volume: "Volume",
        throttle: Throttle,
        progress: VerifyProgress,
        seed: int,
        disk_failed: Callable[[OSError], None],
    ) -> None:
        self._link = link
        self._volume = volume
        self._throttle = throttle
        self._progress = progress
        self._seed = seed
        self._disk_failed = disk_failed
        self.marks = Marks(volume)
        #: Ranges that the driver has us hold: start, stop, and what is set when it lets go.
        self._held: dict[int, tuple[int, int, asyncio.Event]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def end(self) -> None:
        """Let go of everything."""
        for task in self._tasks:
            task.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def on_hash(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        """VERIFY_HASH."""
        start, stop = self._range(sequence, offset, payload)
        if stop - start > wire.MAX_PAYLOAD_BYTES:
            raise wire.ProtocolError(f"a verification of {stop - start} bytes at once is out of bounds.")
        self._hold(sequence, start, stop, self._hash)

    def on_hole(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        """VERIFY_HOLE."""
        start, stop = self._range(sequence, offset, payload)
        self._hold(sequence, start, stop, self._find_data)

    def on_blocks(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        """VERIFY_BLOCKS."""
        if sequence not in self._held:
            raise wire.ProtocolError("the digests of a range are asked for that is not held.")
        start, stop, _ = self._held[sequence]
        self._start(self._answer(sequence, self._hash_blocks(sequence, start, stop)))

    def on_done(self, flags: int, sequence: int, offset: int, payload: memoryview) -> None:
        """VERIFY_DONE."""
        held = self._held.pop(sequence, None)
        if held is None:
            raise wire.ProtocolError("a range is let go of that is not held.")
        start, stop, let_go = held
        runs = unpack_runs(payload, blocks_of(start, stop - start)[1])
        self._progress.found_bytes += self.marks.set(start, stop, runs)
        self._progress.front.end(start, min(offset, stop))
        let_go.set()

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────────

    def _range(self, sequence: int, offset: int, payload: memoryview) -> tuple[int, int]:
        stop = offset + wire.unpack_length(payload)
        if not self._progress.start <= offset < stop <= self._progress.stop or offset % BLOCK_SIZE:
            raise wire.ProtocolError(f"a verification of {offset} to {stop} is beyond what was agreed on.")
        if sequence in self._held or len(self._held) >= MAX_HELD:
            raise wire.ProtocolError("a verification holds too many ranges, or one of them twice.")
        return offset, stop

    def _hold(
        self, sequence: int, start: int, stop: int, answer: Callable[[int, int, int], Coroutine[Any, Any, None]]
    ) -> None:
        let_go = asyncio.Event()
        self._held[sequence] = (start, stop, let_go)
        self._progress.front.begin(start)
        self._start(self._hold_until(sequence, start, stop, let_go, answer))

    async def _hold_until(
        self,
        sequence: int,
        start: int,
        stop: int,
        let_go: asyncio.Event,
        answer: Callable[[int, int, int], Coroutine[Any, Any, None]],
    ) -> None:
        # Of a hole nothing is read.
        length = 0 if answer == self._find_data else stop - start
        await self._throttle.room(length)
        begun_s = self._throttle.begun(length, length)
        async with self._volume.admission.locks.hold(start, stop):
            await self._answer(sequence, answer(sequence, start, stop))
            await let_go.wait()
        self._throttle.ended(length, begun_s)

    async def _answer(self, sequence: int, answer: Coroutine[Any, Any, None]) -> None:
        try:
            await answer
        except OSError as error:
            self._link.send(
                wire.VERIFY_DIGEST, flags=wire.FLAG_ERROR, sequence=sequence, offset=error.errno or errno.EIO
            )
            self._disk_failed(error)

    async def _hash(self, sequence: int, start: int, stop: int) -> None:
        data = await self._volume.store.read_medium(start, stop - start)
        self._link.send(wire.VERIFY_DIGEST, digest(data, self._seed), sequence=sequence)

    async def _hash_blocks(self, sequence: int, start: int, stop: int) -> None:
        data = await self._volume.store.read_medium(start, stop - start)
        self._link.send(wire.VERIFY_DIGEST, block_digests(data, self._seed), sequence=sequence)

    async def _find_data(self, sequence: int, start: int, stop: int) -> None:
        data_start, data_stop = await self._volume.store.next_data(start, stop)
        length = wire.pack_length(data_stop - data_start)
        self._link.send(wire.VERIFY_DATA, length, sequence=sequence, offset=data_start)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = spawn(work, "answer to a verification")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
