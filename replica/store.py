"""A node's own disk: the data (`Store`) and the metadata file (`FileOfMetadata`), with what may block off the loop.

These two classes are the seam of the simulator: it has its own pair with the same methods and a disk made of faults.
Page-cache reads and writes run inline (about a microsecond for 4 KiB); everything that waits for a device runs in a
thread.
"""

import asyncio
import errno
import math
import os
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from nbdserver.blockfile import BlockFile
from replica.group_commit import GroupCommit
from replica.metadata import MetadataFile, at_once
from replica.page_cache import PageCache

T = TypeVar("T")


class Store(Protocol):
    """The data of one volume. Offsets and lengths in bytes, inside `size_bytes`; all raise OSError."""

    size_bytes: int
    #: `zero` with `punch`, on whole 4 KiB blocks, is sure to be quicker than a write of zeroes.
    punches_fast: bool

    def headroom_bytes(self) -> float:
        """How much may be written before writers should wait for the medium (`replica.backpressure`)."""

    def room_bytes(self) -> int:
        """How large the backing is now: it may have been grown behind the volume's end."""

    def write_now(self, offset: int, data: bytes | memoryview) -> None:
        """Write to the page cache (readable at once, durable after `flush`)."""

    def read_now(self, offset: int, length: int, *, ahead: bool = True) -> bytes | None:
        """Read if that needs no device; None if it does."""

    async def read(self, offset: int, length: int, *, ahead: bool = True) -> bytes:
        """Not `ahead`, here and in `read_now`: have the disk read this and nothing else."""

    async def read_medium(self, offset: int, length: int) -> bytes:
        """Read what the medium has, as far as that is not about to be written: not what the page cache remembers."""

    async def write_durable(self, offset: int, data: bytes) -> None:
        """Write these bytes and make them (not others) durable."""

    async def zero(self, offset: int, length: int, punch: bool) -> None: ...

    async def next_data(self, offset: int, end: int) -> tuple[int, int]:
        """The next (start, stop) that is not a hole in [offset, end); (end, end) when there is none."""

    async def prefetch(self, offset: int, length: int) -> None:
        """Begin to read the range into the page cache."""

    def flush_now(self) -> bool:
        """Flush if that needs no device; False if it does."""

    async def flush(self) -> None:
        """Durable: every write that had returned when this was called. Concurrent calls share one fdatasync."""

    async def forget_cache(self) -> None:
        """Flush, and read from the medium from now on: what an earlier process failed to flush is seen to be gone."""

    def close(self) -> None: ...


class FileStore:
    """`Store` on a real file or block device."""

    def __init__(self, file: BlockFile, size_bytes: int) -> None:
        self._file = file
        self.size_bytes = size_bytes
        self.punches_fast = file.punches_fast
        self.write_now = file.write_now
        self.read_now = file.read_now
        # Reads and flushes have threads of their own, so that a slow flush never delays a read.
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="disk")
        self._flush_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flush")
        self._commit = GroupCommit(self._flush_in_thread)
        self._page_cache = PageCache()

    def headroom_bytes(self) -> float:
        return math.inf if self._file.in_memory else self._page_cache.headroom_bytes()

    def room_bytes(self) -> int:
        return self._file.refresh_size()

    def _run(self, call: Callable[..., T], *args: object) -> "asyncio.Future[T]":
        return asyncio.get_running_loop().run_in_executor(self._threads, call, *args)

    def _flush_in_thread(self) -> "asyncio.Future[None]":
        return asyncio.get_running_loop().run_in_executor(self._flush_thread, self._file.flush)

    async def read(self, offset: int, length: int, *, ahead: bool = True) -> bytes:
        return await self._run(lambda: self._file.read(offset, length, ahead=ahead))

    async def read_medium(self, offset: int, length: int) -> bytes:
        return await self._run(self._file.read_medium, offset, length)

    async def write_durable(self, offset: int, data: bytes) -> None:
        await self._run(self._file.write_durable, offset, data)

    async def zero(self, offset: int, length: int, punch: bool) -> None:
        await self._run(self._file.zero, offset, length, punch)

    async def next_data(self, offset: int, end: int) -> tuple[int, int]:
        return await self._run(self._file.next_data, offset, end)

    async def prefetch(self, offset: int, length: int) -> None:
        await self._run(self._file.prefetch, offset, length)

    def flush_now(self) -> bool:
        if not self._file.in_memory:
            return False
        self._commit.flush_at_once(self._file.flush)
        return True

    async def flush(self) -> None:
        if not self.flush_now():
            await self._commit.flush()

    async def forget_cache(self) -> None:
        await self._run(self._file.forget_cache)

    def close(self) -> None:
        """Wait for calls in threads, then close the file (and with it the lock on it)."""
        self._threads.shutdown(wait=True)
        self._flush_thread.shutdown(wait=True)
        self._page_cache.close()
        self._file.close()


class _Here(MetadataFile):
    """A metadata file in whatever thread it is called in: its methods block and never suspend."""

    def __init__(self, file: BlockFile) -> None:
        self._file = file

    async def read(self, offset: int, length: int) -> bytes:
        """Beyond its end a sparse metadata file reads as zeroes, like any hole in it."""
        present = max(0, min(length, os.fstat(self._file.fd).st_size - offset))
        data = self._file.read(offset, present) if present else b""
        return data + bytes(length - len(data))

    async def write(self, offset: int, data: bytes) -> None:
        self._file.write_now(offset, data)

    async def flush(self) -> None:
        self._file.flush()

    async def punch(self, offset: int, length: int) -> None:
        self._file.zero(offset, length, True)

    async def next_data(self, offset: int, end: int) -> tuple[int, int]:
        return self._file.next_data(offset, end)


class FileOfMetadata(MetadataFile):
    """`replica.metadata.MetadataFile` on a real file: plain positional I/O in one thread, in order."""

    def __init__(self, file: BlockFile) -> None:
        self._file = file
        self._here = _Here(file)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="metadata")

    @classmethod
    def open(cls, path: Path) -> "FileOfMetadata":
        """Open and lock the metadata file; raises BlockFileError with a sentence."""
        return cls(BlockFile.open(path))

    def _in_thread(self, work: Coroutine[Any, Any, T]) -> "asyncio.Future[T]":
        return asyncio.get_running_loop().run_in_executor(self._thread, at_once, work)

    async def read(self, offset: int, length: int) -> bytes:
        return await self._in_thread(self._here.read(offset, length))

    async def write(self, offset: int, data: bytes) -> None:
        await self._in_thread(self._here.write(offset, data))

    async def flush(self) -> None:
        await self._in_thread(self._here.flush())

    async def forget_cache(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._file.forget_cache)

    async def punch(self, offset: int, length: int) -> None:
        await self._in_thread(self._here.punch(offset, length))

    async def next_data(self, offset: int, end: int) -> tuple[int, int]:
        return await self._in_thread(self._here.next_data(offset, end))

    async def write_pieces(self, pieces: Sequence[tuple[int, bytes]]) -> None:
        await self._in_thread(self._here.write_pieces(pieces))

    async def read_pieces(self, offset: int, end: int, most: int) -> tuple[list[tuple[int, bytes]], int]:
        return await self._in_thread(self._here.read_pieces(offset, end, most))

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        self._file.close()


def backing_fingerprint(file: BlockFile) -> str:
    """What tells a volume's backing from another one put in its place.

    A regular file is known by its inode: a copy or a new file of the same size and name is *not* the disk that the
    metadata speaks of. A block device's numbers change from boot to boot, so only its size is held against it.
    """
    if file.is_block_device:
        return f"device:{file.size_bytes}"
    return f"inode:{os.fstat(file.fd).st_ino}"


def same_backing(recorded: str, found: str) -> bool:
    """Whether a backing may be the one that the metadata were made for. A device may have been grown since."""
    if recorded.startswith("device:") and found.startswith("device:"):
        return int(found.removeprefix("device:")) >= int(recorded.removeprefix("device:"))
    return recorded == found


class FailedStore:
    """What takes the place of a store that is no longer used: every call fails with the error that ended it."""

    def __init__(self, size_bytes: int, error: OSError) -> None:
        self.size_bytes = size_bytes
        self.punches_fast = False
        self._errno = error.errno or errno.EIO

    def _fail(self) -> OSError:
        return OSError(self._errno, "the disk has failed and is no longer used")

    def headroom_bytes(self) -> float:
        return math.inf

    def room_bytes(self) -> int:
        raise self._fail()

    def write_now(self, offset: int, data: bytes | memoryview) -> None:
        raise self._fail()

    def read_now(self, offset: int, length: int, *, ahead: bool = True) -> bytes | None:
        raise self._fail()

    async def read(self, offset: int, length: int, *, ahead: bool = True) -> bytes:
        raise self._fail()

    async def read_medium(self, offset: int, length: int) -> bytes:
        raise self._fail()

    async def write_durable(self, offset: int, data: bytes) -> None:
        raise self._fail()

    async def zero(self, offset: int, length: int, punch: bool) -> None:
        raise self._fail()

    async def next_data(self, offset: int, end: int) -> tuple[int, int]:
        raise self._fail()

    async def prefetch(self, offset: int, length: int) -> None:
        raise self._fail()

    def flush_now(self) -> bool:
        raise self._fail()

    async def flush(self) -> None:
        raise self._fail()

    async def forget_cache(self) -> None:
        raise self._fail()

    def close(self) -> None:
        """Nothing to let go of."""
