"""A volume's durable metadata: superblock, activity log and bitmap in one sparse file (see docs/on-disk.md).

Every update is safe against a power cut at any moment that tears it at 512-byte boundaries and reorders what was
not flushed: loading then gives the state before or after it.  Beyond that, one rotten copy of the superblock or of
a log snapshot is outlived, and rotten bitmap sectors read as "all dirty".
"""

import asyncio
import errno
import fcntl
import os
import secrets
import tempfile
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from replica import superblock as superblocks
from replica.activity_log import EXTENT_SIZE, ActivityLog, Recovered, recover
from replica.bitmap import SECTOR_BYTES, Bitmap
from replica.superblock import FORMAT_VERSION, SUPERBLOCK_BYTES, MetadataError, PeerRecord, Superblock

__all__ = [
    "Metadata",
    "MetadataError",
    "MetadataFile",
    "PeerRecord",
    "Superblock",
    "create_metadata",
    "dump_metadata",
]

T = TypeVar("T")
#: Of the bitmap per read or write, so that the event loop is not held for long.
_CHUNK_SECTORS = 512
_CHUNK_BYTES = _CHUNK_SECTORS * SECTOR_BYTES


class MetadataFile(Protocol):
    """The file, as real or simulated storage gives it; offsets and lengths in bytes; all may raise OSError.

    `read` returns exactly `length` bytes, zeroes beyond the end.  `next_data` returns the next (start, stop) in
    [offset, end) that may hold anything but zeroes, (end, end) when there is none.
    """

    async def read(self, offset: int, length: int) -> bytes: ...

    async def write(self, offset: int, data: bytes) -> None: ...

    async def flush(self) -> None: ...

    async def punch(self, offset: int, length: int) -> None: ...

    async def next_data(self, offset: int, end: int) -> tuple[int, int]: ...

    async def write_pieces(self, pieces: Sequence[tuple[int, bytes]]) -> None:
        """`write` them all. (A real file does that in one go; a call for each would take longer than the writing.)"""
        for offset, data in pieces:
            await self.write(offset, data)

    async def read_pieces(self, offset: int, end: int, most: int) -> tuple[list[tuple[int, bytes]], int]:
        """(offset, data) of about the first `most` bytes that are not holes in [offset, end), and where to go on."""
        pieces: list[tuple[int, bytes]] = []
        while most > 0 and offset < end:
            start, stop = await self.next_data(offset, end)
            start -= start % SECTOR_BYTES
            stop = min(-(-stop // SECTOR_BYTES) * SECTOR_BYTES, start + most)
            if start < stop:
                pieces.append((start, await self.read(start, stop - start)))
                most -= stop - start
            offset = stop
        return pieces, offset


class Metadata:
    """The metadata of one volume.  Change `superblock`'s fields freely; what counts is the next `save_superblock`.

    A save that is cancelled goes on in the background: a half-done update must not be overtaken by the next one.
    After a save has raised OSError, what is on disk is the old state or the new one, and another save may be tried.
    """

    def __init__(self, file: MetadataFile, superblock: Superblock, *, where: str = "the metadata") -> None:
        self.superblock = superblock
        self.warnings: list[str] = []
        self._file = file
        self._where = where
        self._sequence = 0
        self._next_copy = 0
        self._log_sequence = 0
        self._failed_flushes = 0
        self._superblock_lock = asyncio.Lock()
        self._log_lock = asyncio.Lock()
        self._bitmap_lock = asyncio.Lock()

    @classmethod
    async def format(cls, file: MetadataFile, superblock: Superblock) -> Self:
        """Write new metadata with an empty log and an empty bitmap to an empty file, durably."""
        self = cls(file, superblock)
        await self._write_superblock()
        log = ActivityLog.encode((), 0, superblock.al_copy_bytes)
        await file.write(superblock.al_offset, log + log)
        await file.flush()
        return self

    @classmethod
    async def load(cls, file: MetadataFile, *, where: str = "the metadata") -> Self:
        """Read the newest superblock; a stale or damaged copy is rewritten, a damaged one noted in `warnings`.

        MetadataError (and nothing is changed): no valid copy, a newer format, or the file can't be read.
        """
        try:
            chosen = superblocks.choose(await _copies(file, 0, SUPERBLOCK_BYTES, 2), where)
            self = cls(file, chosen.superblock, where=where)
            self.warnings.extend(chosen.warnings)
            self._sequence = chosen.sequence
            for copy in chosen.stale:
                await file.write(copy * SUPERBLOCK_BYTES, chosen.data)
                await file.flush()
            self._log_sequence = (await self._recover_log()).sequence
        except OSError as error:
            problem = error.strerror or str(error)
            raise MetadataError(f"{where} can't be read: {problem}: check its disk.") from error
        return self

    async def _flush(self, failed_before: int) -> None:
        """Make durable what was written since `_failed_flushes` was this.  OSError.

        A flush that fails throws away what was written on behalf of others, too, and the next one succeeds without it
        (Rebello et al., "Can applications recover from fsync failures?", USENIX ATC 2020).
        """
        try:
            await self._file.flush()
        except OSError:
            self._failed_flushes += 1
            raise
        if self._failed_flushes != failed_before:
            raise OSError(errno.EIO, "a flush failed meanwhile")

    # ---- superblock

    async def save_superblock(self) -> None:
        """Make the superblock durable, with its fields as they are when the write starts.  OSError."""
        await _to_its_end(self._save_superblock())

    async def _save_superblock(self) -> None:
        async with self._superblock_lock:
            await self._write_superblock()

    async def _write_superblock(self) -> None:
        # One copy after the other, each flushed: at any moment one of them is whole.  After a failure we go on with
        # the copy that failed, for the other one is the only good one.
        self._sequence += 1
        data = superblocks.encode(self.superblock, self._sequence)
        for _ in range(2):
            failed_before = self._failed_flushes
            await self._file.write(self._next_copy * SUPERBLOCK_BYTES, data)
            await self._flush(failed_before)
            self._next_copy = 1 - self._next_copy

    # ---- activity log

    async def save_activity_log(self, extents: Iterable[int]) -> None:
        """Replace the log by a snapshot of these extents, durably.  OSError; ValueError: more than al_slots."""
        await _to_its_end(self._save_activity_log(tuple(extents)))

    async def _save_activity_log(self, extents: tuple[int, ...]) -> None:
        async with self._log_lock:
            sequence = self._log_sequence + 1
            copy = ActivityLog.encode(extents, sequence, self.superblock.al_copy_bytes)
            failed_before = self._failed_flushes
            await self._file.write(self.superblock.al_offset + (sequence & 1) * 2 * len(copy), copy + copy)
            await self._flush(failed_before)
            self._log_sequence = sequence

    async def load_activity_log(self) -> set[int]:
        """The extents that may have been written to since they were last settled.  OSError.

        When no copy of the log is left: every extent of the volume, with a sentence in `warnings`.
        """
        extents = (await self._recover_log()).extents
        if extents is None:
            self.warnings.append(f"{self._where}: the activity log is damaged, so all blocks count as dirty.")
            return set(range(-(-self.superblock.size_bytes // EXTENT_SIZE)))
        return set(extents)

    async def _recover_log(self) -> Recovered:
        return recover(await _copies(self._file, self.superblock.al_offset, self.superblock.al_copy_bytes, 4))

    # ---- bitmap

    def _bitmap_region(self) -> tuple[int, int]:
        return self.superblock.bitmap_region(self.superblock.peers[0].bitmap_slot)

    async def load_bitmap(self, bitmap: Bitmap) -> None:
        """Fill `bitmap` with what is on disk.  OSError; ValueError when it has another number of blocks."""
        superblock = self.superblock
        if bitmap.blocks != superblock.blocks:
            raise ValueError(f"a bitmap of {bitmap.blocks} blocks for a volume of {superblock.blocks}")
        if superblock.bitmap_default_ones:
            bitmap.set_all()
        else:
            bitmap.clear_all()
        offset, length = self._bitmap_region()
        at, end = offset, offset + length
        while at < end:
            pieces, at = await self._file.read_pieces(at, end, _CHUNK_BYTES)
            for start, data in pieces:
                first = (start - offset) // SECTOR_BYTES
                for index in range(len(data) // SECTOR_BYTES):
                    piece = data[index * SECTOR_BYTES : (index + 1) * SECTOR_BYTES]
                    bitmap.load_sector(first + index, superblock.bitmap_epoch, piece)
        bitmap.replaced = False
        bitmap.take_changed()

    async def save_bitmap(self, bitmap: Bitmap) -> None:
        """Make everything that was changed in `bitmap` before this call durable.  OSError: it stays "changed".

        Sectors are written in place: a torn one reads as "all dirty".  After `set_all` or `clear_all` the whole
        durable bitmap is replaced first, see `_replace_bitmap`.
        """
        await _to_its_end(self._save_bitmap(bitmap))

    async def set_all_bits(self, bitmap: Bitmap) -> None:
        """All blocks dirty, in memory at once and durable on return: one superblock update.  OSError."""
        bitmap.set_all()
        await self.save_bitmap(bitmap)

    async def clear_all_bits(self, bitmap: Bitmap) -> None:
        """All blocks clean, in memory at once and durable on return.  OSError.

        Only for copies known to be equal: a crash on the way may leave any of the bits, or none.
        """
        bitmap.clear_all()
        await self.save_bitmap(bitmap)

    async def grow(self, bitmap: Bitmap, size_bytes: int, *, clean: bool) -> None:
        """Extend the volume, durably on return. What is new is dirty unless it is called `clean`.  OSError.

        First the bits, behind the end that the superblock knows as yet; then the superblock. A power cut in between
        leaves the old size, and bits that are not looked at. (What is stored there of an earlier time is replaced:
        all sectors of what is new have changed.)
        """
        superblock, blocks = self.superblock, bitmap.blocks
        ends_inside_a_block = superblock.size_bytes % superblock.block_size > 0
        bitmap.grow(-(-size_bytes // superblock.block_size))
        if clean:
            bitmap.clear_range(blocks, bitmap.blocks - blocks)
        elif ends_inside_a_block:
            bitmap.set_range(blocks - 1, 1)  # a part of it is new
        await self.save_bitmap(bitmap)
        superblock.size_bytes = size_bytes
        await self.save_superblock()

    async def _save_bitmap(self, bitmap: Bitmap) -> None:
        async with self._bitmap_lock:
            while bitmap.replaced or not await self._write_sectors(bitmap):
                await self._replace_bitmap(bitmap)

    async def _replace_bitmap(self, bitmap: Bitmap) -> None:
        """Durably forget the stored sectors and set the default.

        All dirty: the new epoch invalidates every stored sector (invalid = all dirty) and the new default makes the
        holes dirty; both are in one superblock update, so there is nothing between "old bitmap" and "all dirty".

        All clean: (1) punch and flush.  A crash in between leaves some sectors, and holes that mean the old default.
        If that was "dirty", more is dirty than need be; if it was "clean", bits are gone that the caller has just
        declared needless.  (2) The superblock with the new default and epoch: nothing is stored that it could
        misread.  A sector that rots into being or was written by an older epoch reads as all dirty.
        """
        ones = bitmap.default_ones
        bitmap.replaced = False
        try:
            if not ones:
                failed_before = self._failed_flushes
                await self._file.punch(*self._bitmap_region())
                await self._flush(failed_before)
            async with self._superblock_lock:
                self.superblock.bitmap_epoch += 1
                self.superblock.bitmap_default_ones = ones
                await self._write_superblock()
        except BaseException:
            bitmap.replaced = True
            raise

    async def _write_sectors(self, bitmap: Bitmap) -> bool:
        """Write the changed sectors and flush; False when the bitmap was replaced meanwhile."""
        taken = bitmap.take_changed()
        if not taken:
            return True
        offset, _ = self._bitmap_region()
        failed_before = self._failed_flushes
        try:
            for at in range(0, len(taken), _CHUNK_SECTORS):
                if bitmap.replaced:
                    # Its default is no longer the durable one, so sectors encoded now would mean something else.
                    return False
                epoch = self.superblock.bitmap_epoch
                pieces = []
                for first, last in _stretches(taken[at : at + _CHUNK_SECTORS]):
                    data = b"".join(bitmap.encode_sector(index, epoch) for index in range(first, last + 1))
                    pieces.append((offset + first * SECTOR_BYTES, data))
                await self._file.write_pieces(pieces)
            if bitmap.replaced:
                return False
            await self._flush(failed_before)
        except BaseException:
            if not bitmap.replaced:
                bitmap.changed.update(taken)
            raise
        return True


def _stretches(sectors: list[int]) -> Iterator[tuple[int, int]]:
    """(first, last) of neighbouring sectors in an ascending list."""
    if not sectors:
        return
    first = sectors[0]
    for one, following in pairwise(sectors):
        if following != one + 1:
            yield first, one
            first = following
    yield first, sectors[-1]


async def _copies(file: MetadataFile, offset: int, size: int, count: int) -> list[bytes]:
    data = await file.read(offset, count * size)
    return [data[at : at + size] for at in range(0, count * size, size)]


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end even if the caller is cancelled."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        # Nobody is left to hear of a failure, and asyncio must not complain about that.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        raise


# ---- for the command line: plain blocking functions


class _BlockingFile(MetadataFile):
    """`MetadataFile` on a descriptor, whose methods never suspend; for `at_once`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    async def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.fd, length, offset).ljust(length, b"\0")

    async def write(self, offset: int, data: bytes) -> None:
        while data:
            written = os.pwrite(self.fd, data, offset)
            data, offset = data[written:], offset + written

    async def flush(self) -> None:
        os.fsync(self.fd)

    async def punch(self, offset: int, length: int) -> None:
        raise OSError("no metadata command punches holes")

    async def next_data(self, offset: int, end: int) -> tuple[int, int]:
        try:
            start = os.lseek(self.fd, offset, os.SEEK_DATA)
            stop = os.lseek(self.fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end of the file
                return end, end
            raise
        return min(start, end), min(stop, end)


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never suspends; needs no event loop, so it may run inside one, too."""
    try:
        work.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise RuntimeError("a blocking metadata function was suspended")


def create_metadata(
    path: Path,
    *,
    cluster: str,
    resource: str,
    volume: int,
    node: str,
    peer: str,
    size_bytes: int,
    al_slots: int,
    backing_fingerprint: str,
    force: bool,
) -> None:
    """Make the metadata file of a new copy (just created, Inconsistent, no generation); all or nothing, durable.

    MetadataError: it exists and `force` is False, it is in use, or it can't be written.  Missing folders are made.
    """
    superblock = Superblock(
        cluster=cluster,
        resource=resource,
        volume=volume,
        node=node,
        device_id=secrets.randbits(64),
        size_bytes=size_bytes,
        al_slots=al_slots,
        backing_fingerprint=backing_fingerprint,
        peers=[PeerRecord(peer)],
    )
    superblocks.encode(superblock, 0)  # a bad value is an error before anything is touched
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path, force):
            _write_new(path, superblock)
    except OSError as error:
        problem = error.strerror or str(error)
        raise MetadataError(f"{path} can't be written: {problem}: check the folder and its disk.") from error


@contextmanager
def _locked(path: Path, force: bool) -> Iterator[None]:
    """Hold the lock of an existing file; MetadataError when a daemon holds it or when it must not be replaced."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield
        return
    try:
        if not force:
            raise MetadataError(f"{path} exists already: to throw this state away, run create-md with --force.")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MetadataError(f"{path} is in use by a running replicad: stop it first.") from error
        yield
    finally:
        os.close(fd)


def _write_new(path: Path, superblock: Superblock) -> None:
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        try:
            os.ftruncate(fd, sum(superblock.bitmap_region()))
            at_once(Metadata.format(_BlockingFile(fd), superblock))
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def dump_metadata(path: Path) -> dict[str, Any]:
    """What the file says, as plain values (ids in hexadecimal); it is only read and may be in use.  MetadataError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        advice = "make it with 'replicactl create-md'" if error.errno == errno.ENOENT else "check its owner and disk"
        raise MetadataError(f"{path} can't be opened: {error.strerror}: {advice}.") from error
    try:
        return at_once(_dump(_BlockingFile(fd), str(path)))
    except OSError as error:
        raise MetadataError(f"{path} can't be read: {error.strerror}: check its disk.") from error
    finally:
        os.close(fd)


async def _dump(file: _BlockingFile, where: str) -> dict[str, Any]:
    chosen = superblocks.choose(await _copies(file, 0, SUPERBLOCK_BYTES, 2), where)
    superblock = chosen.superblock
    metadata = Metadata(file, superblock, where=where)
    log = await metadata._recover_log()
    bitmap = Bitmap(superblock.blocks)
    await metadata.load_bitmap(bitmap)
    generations = superblock.generations
    return {
        "file": where,
        "format_version": FORMAT_VERSION,
        "sequence": chosen.sequence,
        "warnings": list(chosen.warnings),
        **asdict(superblock),
        "device_id": f"{superblock.device_id:016x}",
        "generations": {
            "current": f"{generations.current:016x}",
            "base": f"{generations.base:016x}",
            "history": [f"{one:016x}" for one in generations.history],
        },
        "activity_log": {
            "sequence": log.sequence,
            "extents": None if log.extents is None else sorted(log.extents),
            "damaged_copies": list(log.damaged),
        },
        "out_of_sync_bytes": min(bitmap.count * superblock.block_size, superblock.size_bytes),
    }
