"""A resync between two real files, over a real connection."""

import asyncio
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdserver.blockfile import BlockFile
from replica import sync_hash, wire
from replica.bitmap import BLOCK_SIZE, Bitmap
from replica.range_lock import RangeLocks
from replica.resync import MIN_HOLE_BYTES, SyncSource, SyncTarget
from replica.store import FileStore
from tests.unit.test_link import opened, run

MIB = 1 << 20
SIZE_BYTES = 4 * MIB + 512  # its last block is a part of one
BLOCKS = -(-SIZE_BYTES // BLOCK_SIZE)


class GatedStore(FileStore):
    """Its flushes wait until the gate is open."""

    def __init__(self, file: BlockFile, size_bytes: int) -> None:
        super().__init__(file, size_bytes)
        self.gate = asyncio.Event()
        self.gate.set()
        self.flush_asked = asyncio.Event()

    async def flush(self) -> None:
        self.flush_asked.set()
        await self.gate.wait()
        await super().flush()


class ColdStore(FileStore):
    """Nothing is in its page cache."""

    def __init__(self, file: BlockFile, size_bytes: int) -> None:
        super().__init__(file, size_bytes)
        self.read_now = self._not_now
        self.prefetched = 0
        self.ahead: set[bool] = set()

    def _not_now(self, offset: int, length: int, *, ahead: bool = True) -> bytes | None:
        self.ahead.add(ahead)
        return None

    async def read(self, offset: int, length: int, *, ahead: bool = True) -> bytes:
        self.ahead.add(ahead)
        return await super().read(offset, length, ahead=ahead)

    async def prefetch(self, offset: int, length: int) -> None:
        self.prefetched += 1
        await super().prefetch(offset, length)


class NoticedLocks(RangeLocks):
    """Tells when somebody finds a range held."""

    def __init__(self) -> None:
        super().__init__(lambda: None)
        self.noticed = asyncio.Event()

    def overlaps(self, start: int, stop: int) -> bool:
        if super().overlaps(start, stop):
            self.noticed.set()
            return True
        return False


class Copies:
    """Two files, source and target, with every block dirty, and the resync between them."""

    def __init__(self, folder: Path, mine: bytes, theirs: bytes, store: type[FileStore] = FileStore) -> None:
        self.paths = folder / "source", folder / "target"
        for path, data in zip(self.paths, (mine, theirs), strict=True):
            path.write_bytes(data)
        files = [BlockFile.open(path) for path in self.paths]
        self.source_store, self.target_store = store(files[0], len(mine)), GatedStore(files[1], len(mine))
        self.bitmaps = Bitmap(BLOCKS), Bitmap(BLOCKS)
        for bitmap in self.bitmaps:
            bitmap.set_all()
        self.locks = NoticedLocks()
        self.frames: dict[int, int] = {}
        self.asked = asyncio.Event()
        self.failed: list[OSError] = []

    async def begin(self, *, ask: bool = True, rate: int | None = None) -> "Copies":
        self.near, self.far = await opened()
        self.source = SyncSource(
            self.near.link, self.source_store, self.bitmaps[0], self.locks, rate, time.monotonic, ask=ask
        )
        self.target = SyncTarget(self.far.link, self.target_store, self.bitmaps[1], self.failed.append)
        for end in (self.near, self.far):
            for kind, handler in list(end.link.handlers.items()):
                end.link.handlers[kind] = self._counting(kind, handler)
        return self

    def _counting(self, kind: int, handler: Callable[..., None]) -> Callable[..., None]:
        def handle(*frame: object) -> None:
            self.frames[kind] = self.frames.get(kind, 0) + 1
            if kind == wire.SYNC_HASH:
                self.asked.set()
            handler(*frame)

        return handle

    async def end(self) -> None:
        await self.target.finished()
        assert not self.failed
        for end in (self.near, self.far):
            end.link.close("the test is over.")
        for store in (self.source_store, self.target_store):
            store.close()

    def check(self) -> None:
        assert [bitmap.count for bitmap in self.bitmaps] == [0, 0]
        assert self.paths[0].read_bytes() == self.paths[1].read_bytes()


def data(seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(SIZE_BYTES)


def changed(original: bytes, *blocks: int) -> bytes:
    copy = bytearray(original)
    for block in blocks:
        copy[block * BLOCK_SIZE] ^= 1
    return bytes(copy)


@pytest.mark.parametrize("store", [FileStore, ColdStore])
def test_blocks_that_are_equal_are_not_sent(tmp_path: Path, store: type[FileStore]) -> None:
    async def test() -> None:
        differ = 0, 7, 8, 500, BLOCKS - 1
        copies = await Copies(tmp_path, data(), changed(data(), *differ), store).begin()
        await copies.source.run()
        await copies.end()
        copies.check()
        assert copies.target.received_bytes == copies.source.data_bytes == (len(differ) - 1) * BLOCK_SIZE + 512
        assert copies.source.equal_bytes == SIZE_BYTES - copies.source.data_bytes

    run(test)


@pytest.mark.parametrize("store", [FileStore, ColdStore])
def test_a_target_that_cannot_compare_gets_everything(tmp_path: Path, store: type[FileStore]) -> None:
    async def test() -> None:
        copies = await Copies(tmp_path, data(), changed(data(), 3), store).begin(ask=False)
        await copies.source.run()
        await copies.end()
        copies.check()
        assert copies.target.received_bytes == SIZE_BYTES
        assert wire.SYNC_HASH not in copies.frames

    run(test)


@pytest.mark.parametrize("is_client_there", [True, False])
def test_the_disk_is_read_ahead_only_while_no_client_waits_for_it(tmp_path: Path, is_client_there: bool) -> None:
    async def test() -> None:
        copies = await Copies(tmp_path, data(1), data(2), ColdStore).begin(ask=False)
        store = copies.source_store
        assert isinstance(store, ColdStore)
        if is_client_there:
            copies.source.throttle.read_at_once(time.monotonic())
        await copies.source.run()
        await copies.end()
        copies.check()
        assert (store.prefetched == 0) == is_client_there
        assert store.ahead == {not is_client_there}

    run(test)


def test_where_nothing_is_equal_hardly_anything_is_asked(tmp_path: Path) -> None:
    async def test() -> None:
        copies = await Copies(tmp_path, data(1), data(2)).begin()
        copies.source._sampling.learned(0, 1)  # type: ignore[union-attr]
        while copies.source._sampling.wanted(sync_hash.LEAST_BLOCKS):  # type: ignore[union-attr]
            copies.source._sampling.learned(0, 1)  # type: ignore[union-attr]
        await copies.source.run()
        await copies.end()
        copies.check()
        assert copies.frames[wire.SYNC_HASH] <= 2

    run(test)


def test_an_equal_block_is_clean_only_once_the_target_has_flushed_it(tmp_path: Path) -> None:
    """It may be in the target's page cache only."""

    async def test() -> None:
        copies = await Copies(tmp_path, data(), data()).begin()
        copies.target_store.gate.clear()
        running = asyncio.ensure_future(copies.source.run())
        await copies.target_store.flush_asked.wait()
        while copies.source.equal_bytes + copies.target.received_bytes < SIZE_BYTES:
            await copies.source._progress.wait()
        assert [bitmap.count for bitmap in copies.bitmaps] == [BLOCKS, BLOCKS]
        copies.target_store.gate.set()
        await running
        await copies.end()
        copies.check()
        assert copies.target.received_bytes == 512  # a single block is sent at once

    run(test)


def test_what_was_equal_and_is_written_meanwhile_stays_right(tmp_path: Path) -> None:
    """The question is on its way when the client writes: the write follows it on the wire."""

    async def test() -> None:
        copies = await Copies(tmp_path, data(), data()).begin()
        new = b"n" * BLOCK_SIZE
        copies.far.link.on_writes = lambda writes, last: [  # type: ignore[assignment, return-value]
            copies.target_store.write_now(offset, payload) for offset, payload in writes
        ]
        running = asyncio.ensure_future(copies.source.run())
        await copies.asked.wait()
        copies.near.link.send(wire.WRITE, new, sequence=1, offset=2 * BLOCK_SIZE)
        copies.source_store.write_now(2 * BLOCK_SIZE, new)
        await running
        await copies.end()
        copies.check()
        assert copies.paths[1].read_bytes()[2 * BLOCK_SIZE : 3 * BLOCK_SIZE] == new

    run(test)


def test_a_locked_range_is_neither_read_nor_asked_about(tmp_path: Path) -> None:
    async def test() -> None:
        copies = await Copies(tmp_path, data(1), data(2)).begin()
        running = asyncio.ensure_future(copies.source.run())
        async with copies.locks.hold(0, BLOCK_SIZE):
            await copies.locks.noticed.wait()
            assert not copies.frames
        await running
        await copies.end()
        copies.check()

    run(test)


@pytest.mark.parametrize("ask", [False, True])
def test_holes_come_as_holes(tmp_path: Path, ask: bool) -> None:
    async def test() -> None:
        copies = Copies(tmp_path, bytes(SIZE_BYTES), data())
        os.truncate(copies.paths[0], 0)
        os.truncate(copies.paths[0], SIZE_BYTES)
        with copies.paths[0].open("r+b") as file:
            file.seek(2 * MIB)
            file.write(b"x" * 1000)
        await copies.begin(ask=ask)
        await copies.source.run()
        await copies.end()
        copies.check()
        assert copies.paths[1].stat().st_blocks * 512 <= copies.paths[0].stat().st_blocks * 512 + MIN_HOLE_BYTES
        assert copies.source.data_bytes <= MIN_HOLE_BYTES

    run(test)


def test_a_hole_that_is_filled_meanwhile_is_sent_as_data(tmp_path: Path) -> None:
    async def test() -> None:
        copies = Copies(tmp_path, bytes(SIZE_BYTES), data())
        os.truncate(copies.paths[0], 0)
        os.truncate(copies.paths[0], SIZE_BYTES)
        await copies.begin()
        running = asyncio.ensure_future(copies.source.run())
        async with copies.locks.hold(MIB, MIB + BLOCK_SIZE):  # a client's write, which the hole has to wait for
            await copies.locks.noticed.wait()
            copies.source_store.write_now(MIB, b"w" * BLOCK_SIZE)
        await running
        await copies.end()
        copies.check()

    run(test)


def test_a_pause_lasts(tmp_path: Path) -> None:
    async def test() -> None:
        copies = await Copies(tmp_path, data(1), changed(data(1), 1)).begin()
        copies.source.pause(True)
        running = asyncio.ensure_future(copies.source.run())
        for _ in range(100):
            await asyncio.sleep(0)
        assert not copies.frames and not running.done()
        copies.source.pause(False)
        await running
        await copies.end()
        copies.check()

    run(test)


@pytest.mark.parametrize(
    ("payload", "offset", "words"),
    [
        (b"", 0, "no hashes"),
        (bytes(17), 0, "no hashes"),
        (bytes(16), 512, "1 blocks at 512"),
        (bytes(16 * (BLOCKS + 1)), 0, f"{BLOCKS + 1} blocks at 0"),
        (bytes(16), BLOCKS * BLOCK_SIZE, "beyond the volume's end"),
        (bytes(16), 1 << 63, "beyond the volume's end"),
    ],
)
def test_a_question_that_makes_no_sense_ends_the_link(tmp_path: Path, payload: bytes, offset: int, words: str) -> None:
    async def test() -> None:
        copies = await Copies(tmp_path, data(), data()).begin()
        copies.near.link.send(wire.SYNC_HASH, payload, sequence=1, offset=offset)
        await copies.far.owner.closed.wait()
        assert words in copies.far.owner.reason
        await copies.end()

    run(test)


@pytest.mark.parametrize(("sequence", "words"), [(77, "was not asked"), (1, "could not be read")])
def test_an_answer_that_makes_no_sense_ends_the_link(tmp_path: Path, sequence: int, words: str) -> None:
    async def test() -> None:
        copies = await Copies(tmp_path, data(), data()).begin()
        copies.far.link.handlers[wire.SYNC_HASH] = lambda *frame: copies.far.link.send(
            wire.SYNC_DIFFERS, b"", sequence=sequence
        )
        running = asyncio.ensure_future(copies.source.run())
        await copies.near.owner.closed.wait()
        running.cancel()
        assert words in copies.near.owner.reason
        await copies.end()

    run(test)


def test_neighbouring_pieces_are_cleared_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand pieces, cleared one by one, held the event loop for milliseconds."""

    async def test() -> None:
        copies = await Copies(tmp_path, data(), changed(data(), 0)).begin(ask=False)
        cleared: list[tuple[int, int]] = []
        for bitmap in copies.bitmaps:
            clear = bitmap.clear_range
            monkeypatch.setattr(
                bitmap,
                "clear_range",
                lambda first, count, clear=clear: (cleared.append((first, count)), clear(first, count)),
            )
        await copies.source.run()
        await copies.end()
        copies.check()
        pieces = copies.frames[wire.SYNC_DATA]
        assert pieces > 8
        assert len(cleared) < pieces

    run(test)


def test_zeroes_that_are_data_become_data(tmp_path: Path) -> None:
    """A hole has the same bytes, and so the same hash; but clients can tell the two, on whichever node."""

    async def test() -> None:
        holder = bytearray(data())
        holder[BLOCK_SIZE : 3 * BLOCK_SIZE] = bytes(2 * BLOCK_SIZE)
        copies = await Copies(tmp_path, bytes(holder), bytes(holder)).begin()
        await copies.target_store.zero(BLOCK_SIZE, 2 * BLOCK_SIZE, True)
        assert await copies.target_store.next_data(BLOCK_SIZE, SIZE_BYTES) != (BLOCK_SIZE, SIZE_BYTES)
        await copies.source.run()
        assert copies.source.equal_bytes
        assert await copies.target_store.next_data(BLOCK_SIZE, SIZE_BYTES) == (BLOCK_SIZE, SIZE_BYTES)
        await copies.end()
        copies.check()

    run(test)
