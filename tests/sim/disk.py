"""Simulated disks: a page cache over what is durable, and the node's two views of them (store and metadata file)."""

import asyncio
import errno
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbdserver.blockfile import LostWriteError
from replica.group_commit import GroupCommit
from replica.metadata import MetadataFile
from tests.sim.loop import MachineDied, World

if TYPE_CHECKING:
    from tests.sim.node import Incarnation

SECTOR = 512
BLOCK = 4096
_ZEROES = bytes(SECTOR)
#: A sector, the number of the write that it shows, and its bytes.
Page = tuple[int, int, bytearray]


@dataclass
class DiskFaults:
    """How a disk behaves; the scenario draws these per seed, and faults change them for a while."""

    write_s: float = 0.0005
    read_s: float = 0.0005
    flush_s: float = 0.003
    slowness: float = 1.0
    uncached_read: float = 0.1
    #: How often a writer that asks should wait.
    full_cache: float = 0.0
    write_back: float = 0.02
    read_error: float = 0.0
    write_error: float = 0.0
    flush_error: float = 0.0
    #: As a file in memory is: a flush takes no time.
    flushes_at_once: bool = False


class SimDisk:
    """The medium and its page cache. `watch(first, count)` is called after each change of either."""

    def __init__(self, rng: random.Random, size_bytes: int, faults: DiskFaults) -> None:
        self.rng = rng
        self.faults = faults
        self.size_bytes = size_bytes
        self.cache = bytearray(size_bytes)
        self.durable = bytearray(size_bytes)
        #: The first eight bytes of each sector as a number: which write it is of (`tests.sim.client.payload`).
        self.values = memoryview(self.cache).cast("Q")[:: SECTOR // 8]
        self.durable_values = memoryview(self.durable).cast("Q")[:: SECTOR // 8]
        #: Sector -> number of its last write, for sectors written since they were last made durable.
        self.dirty: dict[int, int] = {}
        self.version = 0
        self.durable_changes = 0
        self.wrote: Callable[[int, int], None] = lambda first, count: None
        self.persisted: Callable[[list[int]], None] = lambda sectors: None
        self.lost: Callable[[list[int]], None] = lambda sectors: None
        #: Clean as far as the cache knows, and yet not durable: a flush failed.
        self._unwritten: dict[int, int | None] = {}
        self._durable_version: dict[int, int] = {}
        self._allocated = bytearray(-(-size_bytes // BLOCK))

    def leave(self, offset: int, data: bytes) -> None:
        """The disk has something that nobody wrote there: of an earlier use, or rotten."""
        self.cache[offset : offset + len(data)] = self.durable[offset : offset + len(data)] = data
        self._allocate(offset, len(data))

    # ── the cache ────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, offset: int, length: int) -> bytes:
        data = bytes(self.cache[offset : offset + length])
        return data + bytes(length - len(data))

    def write(self, offset: int, data: bytes | memoryview) -> None:
        length = len(data)
        if offset % SECTOR or length % SECTOR or offset + length > self.size_bytes:
            raise AssertionError(f"a write of {length} bytes at {offset} of {self.size_bytes}")
        self.cache[offset : offset + length] = data
        first, count = offset // SECTOR, length // SECTOR
        self._allocate(offset, length)
        self._touched(first, count)

    def zero(self, offset: int, length: int, punch: bool) -> None:
        self.cache[offset : offset + length] = bytes(length)
        if punch:
            for block in range(-(-offset // BLOCK), (offset + length) // BLOCK):
                self._allocated[block] = 0
        else:
            self._allocate(offset, length)
        self._touched(offset // SECTOR, -(-length // SECTOR))

    def _allocate(self, offset: int, length: int) -> None:
        first, last = offset // BLOCK, -(-(offset + length) // BLOCK)
        self._allocated[first:last] = b"\1" * (last - first)

    def _touched(self, first: int, count: int) -> None:
        self.version += 1
        version = self.version
        self.dirty.update(dict.fromkeys(range(first, first + count), version))
        if self._unwritten:
            for sector in range(first, first + count):
                self._unwritten.pop(sector, None)
        self.wrote(first, count)
        rate = self.faults.write_back
        if rate and self.rng.random() < rate:
            chosen = [sector for sector in range(first, first + count) if self.rng.random() < 0.5]
            self._persist(
                [(sector, version, self.cache[sector * SECTOR : (sector + 1) * SECTOR]) for sector in chosen],
                clean=False,
            )

    def next_data(self, offset: int, end: int) -> tuple[int, int]:
        allocated = self._allocated
        block, last = offset // BLOCK, -(-end // BLOCK)
        start = allocated.find(1, block, last)
        if start < 0:
            return end, end
        stop = allocated.find(0, start, last)
        stop = last if stop < 0 else stop
        return max(start * BLOCK, offset), min(stop * BLOCK, end)

    # ── the medium ───────────────────────────────────────────────────────────────────────────────────────────

    def snapshot(self, first: int | None = None, count: int = 0) -> list[Page]:
        """What a flush that begins now will have made durable when it ends."""
        cache, dirty = self.cache, self.dirty
        if first is None:
            sectors: Iterable[int] = dirty
        else:
            sectors = [sector for sector in range(first, first + count) if sector in dirty]
        return [(sector, dirty[sector], cache[sector * SECTOR : sector * SECTOR + SECTOR]) for sector in sectors]

    def _persist(self, pages: list[Page], *, clean: bool = True) -> None:
        durable, versions, dirty = self.durable, self._durable_version, self.dirty
        changed = []
        for sector, version, data in pages:
            is_newer = versions.get(sector, 0) < version
            if is_newer:
                versions[sector] = version
                durable[sector * SECTOR : sector * SECTOR + SECTOR] = data
            if clean and dirty.get(sector) == version:
                del dirty[sector]
                changed.append(sector)
            elif is_newer:
                changed.append(sector)
        if changed:
            self.durable_changes += 1
            self.persisted(changed)

    def flushed(self, pages: list[Page]) -> None:
        """The pages of a snapshot are on the medium."""
        self._persist(pages)

    def drop(self, pages: list[Page]) -> None:
        """A flush failed: some of its pages were written, the others are no longer dirty, and may be forgotten."""
        kept = [page for page in pages if self.rng.random() < 0.5]
        self._persist(kept)
        gone = [sector for sector, version, _ in pages if self.dirty.get(sector) == version]
        forget = self.rng.random() < 0.5
        for sector in gone:
            del self.dirty[sector]
            if not forget:
                self._unwritten[sector] = None
            else:
                self._forget(sector)
        if gone:
            self.durable_changes += 1
            self.lost(gone)
            self.persisted(gone)

    def forget_cache(self) -> None:
        """Read from the medium what is clean."""
        gone = [sector for sector in self._unwritten if sector not in self.dirty]
        self._unwritten.clear()
        for sector in gone:
            self._forget(sector)
        if gone:
            self.lost(gone)

    def _forget(self, sector: int) -> None:
        """The cache shows what is on the medium."""
        at = sector * SECTOR
        data = self.cache[at : at + SECTOR] = self.durable[at : at + SECTOR]
        if data != _ZEROES:
            self._allocated[at // BLOCK] = 1

    @property
    def has_unwritten(self) -> bool:
        """Whether a failed flush has left pages that are clean in the cache and not on the medium."""
        return bool(self._unwritten)

    def power_cut(self) -> int:
        """Any subset of what was not flushed survives. Returns how many sectors did not."""
        keep = self.rng.choice((0.0, 0.0, 0.1, 0.5, 0.9, 1.0))
        pages = self.snapshot()
        self._persist([page for page in pages if self.rng.random() < keep])
        lost = list(self.dirty | self._unwritten)
        for sector in lost:
            self._forget(sector)
        self.dirty.clear()
        self._unwritten.clear()
        self.durable_changes += 1
        self.lost(lost)
        self.persisted(lost)
        return len(lost)

    def rot(self, offset: int, length: int) -> None:
        """Some bytes of [offset, offset + length) change on the medium (and in the cache)."""
        for _ in range(self.rng.randint(1, 8)):
            at = offset + self.rng.randrange(length)
            self.cache[at] = self.durable[at] = self.durable[at] ^ self.rng.randint(1, 255)
        self.durable_changes += 1
        self.persisted([])


class _File:
    """What both views share: work that takes time, on a disk, for one incarnation."""

    def __init__(self, incarnation: "Incarnation", disk: SimDisk) -> None:
        self.incarnation = incarnation
        self.disk = disk
        self.world: World = incarnation.world
        self._under_way: dict[int, Callable[[], None]] = {}
        self._numbers = 0
        self._closed = False

    def _alive(self) -> None:
        """Called at each use: a dead incarnation has no effect on a disk, and a fuse may blow here."""
        if self.incarnation.dead:
            raise MachineDied
        if self._closed:
            raise OSError(errno.EBADF, "the file is closed")

    def _work(self, delay_s: float, effect: Callable[[], Any]) -> "asyncio.Future[Any]":
        """Run `effect` in a while, as a thread would (whoever still waits for it), and give its result."""
        self._alive()
        future: asyncio.Future[Any] = self.incarnation.loop.create_future()
        self._numbers += 1
        number = self._numbers

        def finish() -> None:
            if self._under_way.pop(number, None) is None:
                return
            try:
                result, error = effect(), None
            except OSError as failure:
                result, error = None, failure
            if not self.incarnation.dead:
                self.incarnation.loop.call_soon(_answer, future, result, error)

        self._under_way[number] = finish
        self.world.after(delay_s * self.disk.faults.slowness, finish)
        return future

    def abandon(self) -> None:
        """The process died: each system call under way may or may not have had its effect."""
        for finish in list(self._under_way.values()):
            if self.disk.rng.random() < 0.3:
                finish()
        self._under_way.clear()

    async def flush(self) -> None:
        raise NotImplementedError

    async def forget_cache(self) -> None:
        """Read what is clean from the medium from here on; what is dirty is flushed first."""
        await self.flush()
        self.disk.forget_cache()

    def close(self) -> None:
        """Wait for what is under way (in no time), then let go."""
        if self.incarnation.dead:
            return
        self._closed = True
        for finish in list(self._under_way.values()):
            finish()
        self.incarnation.files.pop(self, None)

    def _maybe_fail(self, rate: float, what: str) -> None:
        if rate and not self.incarnation.machine.faults_off and self.disk.rng.random() < rate:
            self.incarnation.machine.trace.fault(f"{what}-error", self.incarnation.machine.name)
            raise OSError(errno.EIO, f"simulated {what} error")

    def _flush_work(self) -> "asyncio.Future[None]":
        effect = self._begin_flush()
        return self._work(self.disk.faults.flush_s * (0.2 + 1.6 * self.disk.rng.random()), effect)

    def _begin_flush(self) -> Callable[[], None]:
        """A flush of what is written by now; what is returned is its end."""
        self._alive()
        self.incarnation.burn()
        disk, rng = self.disk, self.disk.rng
        pages = disk.snapshot()

        def effect() -> None:
            rate = disk.faults.flush_error
            if rate and pages and not self.incarnation.machine.faults_off and rng.random() < rate:
                self.incarnation.machine.trace.fault("flush-error", self.incarnation.machine.name)
                disk.drop(pages)
                raise LostWriteError(errno.EIO, "simulated flush error")
            disk.flushed(pages)

        return effect


def _answer(future: "asyncio.Future[Any]", result: Any, error: OSError | None) -> None:
    if not future.done():
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


class SimStore(_File):
    """`replica.store.Store`."""

    def __init__(self, incarnation: "Incarnation", disk: SimDisk, size_bytes: int) -> None:
        super().__init__(incarnation, disk)
        self.size_bytes = size_bytes
        self.punches_fast = True
        # The node's own group commit, as the real store has it.
        self._commit = GroupCommit(self._flush_work)

    def write_now(self, offset: int, data: bytes | memoryview) -> None:
        self._alive()
        self.incarnation.burn()
        self._maybe_fail(self.disk.faults.write_error, "write")
        self.disk.write(offset, data)

    def read_now(self, offset: int, length: int, *, ahead: bool = True) -> bytes | None:
        self._alive()
        if self.disk.rng.random() < self.disk.faults.uncached_read:
            return None
        self._maybe_fail(self.disk.faults.read_error, "read")
        return self.disk.read(offset, length)

    async def read(self, offset: int, length: int, *, ahead: bool = True) -> bytes:
        disk = self.disk
        early: list[bytes] = []

        def effect() -> bytes:
            self._maybe_fail(disk.faults.read_error, "read")
            return early[0] if early else disk.read(offset, length)

        if disk.rng.random() < 0.5:  # the data is taken at the beginning of the call, or at its end
            early.append(disk.read(offset, length))
        data: bytes = await self._work(disk.faults.read_s * 2 * disk.rng.random(), effect)
        return data

    read_medium = read

    def headroom_bytes(self) -> float:
        return 0.0 if self.disk.rng.random() < self.disk.faults.full_cache else 64.0 * SECTOR

    def room_bytes(self) -> int:
        return self.disk.size_bytes

    async def write_durable(self, offset: int, data: bytes) -> None:
        disk = self.disk

        def write() -> None:
            self._maybe_fail(disk.faults.write_error, "write")
            disk.write(offset, data)

        await self._work(disk.faults.write_s * 2 * disk.rng.random(), write)
        pages = disk.snapshot(offset // SECTOR, len(data) // SECTOR)
        await self._work(disk.faults.flush_s * disk.rng.random(), lambda: disk.flushed(pages))

    async def zero(self, offset: int, length: int, punch: bool) -> None:
        disk = self.disk

        def effect() -> None:
            self._maybe_fail(disk.faults.write_error, "write")
            disk.zero(offset, length, punch)

        await self._work(disk.faults.write_s * 2 * disk.rng.random(), effect)

    async def next_data(self, offset: int, end: int) -> tuple[int, int]:
        found: tuple[int, int] = await self._work(0.0001, lambda: self.disk.next_data(offset, end))
        return found

    async def prefetch(self, offset: int, length: int) -> None:
        await self._work(0.0001, lambda: None)

    def flush_now(self) -> bool:
        if not self.disk.faults.flushes_at_once:
            return False
        self._commit.flush_at_once(self._begin_flush())
        return True

    async def flush(self) -> None:
        if not self.flush_now():
            await self._commit.flush()


class SimMetadataFile(_File, MetadataFile):
    """`replica.metadata.MetadataFile`: one thread, in order."""

    def __init__(self, incarnation: "Incarnation", disk: SimDisk) -> None:
        super().__init__(incarnation, disk)
        self._free_s = 0.0

    def _in_order(self, delay_s: float, effect: Callable[[], Any]) -> "asyncio.Future[Any]":
        self._free_s = max(self._free_s, self.world.now_s) + delay_s * self.disk.faults.slowness
        return self._work((self._free_s - self.world.now_s) / self.disk.faults.slowness, effect)

    async def read(self, offset: int, length: int) -> bytes:
        def effect() -> bytes:
            self._maybe_fail(self.disk.faults.read_error, "metadata-read")
            return self.disk.read(offset, length)

        data: bytes = await self._in_order(self.disk.faults.read_s * self.disk.rng.random(), effect)
        return data

    async def write(self, offset: int, data: bytes) -> None:
        self._alive()
        self.incarnation.burn()

        def effect() -> None:
            self._maybe_fail(self.disk.faults.write_error, "metadata-write")
            self.disk.write(offset, data)

        await self._in_order(self.disk.faults.write_s * self.disk.rng.random(), effect)

    async def flush(self) -> None:
        self._alive()
        self.incarnation.burn()
        disk = self.disk
        pages: list[Page] = []

        def begin() -> None:
            pages.extend(disk.snapshot())

        def effect() -> None:
            rate = disk.faults.flush_error
            if rate and pages and not self.incarnation.machine.faults_off and disk.rng.random() < rate:
                self.incarnation.machine.trace.fault("metadata-flush-error", self.incarnation.machine.name)
                disk.drop(pages)
                raise LostWriteError(errno.EIO, "simulated metadata flush error")
            disk.flushed(pages)

        await self._in_order(0.0, begin)
        await self._in_order(disk.faults.flush_s * (0.2 + 1.6 * disk.rng.random()), effect)

    async def punch(self, offset: int, length: int) -> None:
        self._alive()
        await self._in_order(self.disk.faults.write_s, lambda: self.disk.zero(offset, length, True))

    async def next_data(self, offset: int, end: int) -> tuple[int, int]:
        found: tuple[int, int] = await self._in_order(0.0, lambda: self.disk.next_data(offset, end))
        return found


class SimBacking:
    """`replica.runtime.OpenBacking`."""

    def __init__(self, incarnation: "Incarnation", disk: SimDisk) -> None:
        self._incarnation = incarnation
        self._disk = disk
        self.size_bytes = disk.size_bytes
        self.fingerprint = f"sim:{incarnation.machine.name}"

    def store(self, size_bytes: int) -> SimStore:
        store = SimStore(self._incarnation, self._disk, size_bytes)
        self._incarnation.files[store] = None
        return store

    def close(self) -> None:
        pass
