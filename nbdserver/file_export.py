"""A plain file or block device as an export."""

import asyncio
import errno
from collections.abc import Callable, Sequence
from typing import TypeVar

from nbdserver import extents
from nbdserver.blockfile import BlockFile, LostWriteError
from nbdserver.constants import MAX_BLOCK_BYTES
from nbdserver.export import NO_ERRORS, Export, WriteDone
from nbdserver.transmission import wire_error

_T = TypeVar("_T")


class FileExport(Export):
    """Serves a BlockFile, which stays the caller's to close.

    After a failed flush every write and flush fails: the kernel has dropped the pages it could not write
    and would report the next flush as a success.
    """

    name: str
    description: str
    size_bytes: int
    read_only: bool

    def __init__(self, file: BlockFile, *, name: str = "", description: str = "", read_only: bool = False) -> None:
        self.name = name
        self.description = description
        self.size_bytes = file.size_bytes
        self.read_only = read_only
        self._file = file
        self._lost_writes = False

    def write_batch(self, writes: Sequence[tuple[int, memoryview]], done: WriteDone) -> bool:
        if self._lost_writes:
            done(dict.fromkeys(range(len(writes)), wire_error(errno.EIO)))
            return False
        write_now = self._file.write_now
        errors: dict[int, int] | None = None
        for index, (offset, data) in enumerate(writes):
            try:
                write_now(offset, data)
            except OSError as error:
                errors = errors or {}
                errors[index] = wire_error(error.errno)
        done(errors or NO_ERRORS)
        return False

    def read_now(self, offset: int, length: int) -> bytes | None:
        return self._file.read_now(offset, length)

    async def read(self, offset: int, length: int) -> bytes:
        return await _in_thread(lambda: self._file.read(offset, length))

    async def write_durable(self, offset: int, data: bytes) -> None:
        await self._durably(lambda: self._file.write_durable(offset, data))

    async def flush(self) -> None:
        await self._durably(self._file.flush)

    async def trim(self, offset: int, length: int) -> None:
        await self.zero(offset, length, True)

    async def zero(self, offset: int, length: int, punch: bool) -> None:
        self._check()
        await _in_thread(lambda: self._file.zero(offset, length, punch))

    def zeroes_fast(self, offset: int, length: int, punch: bool) -> bool:
        return extents.zeroes_fast(self._file.punches_fast, offset, length, punch)

    async def block_status(self, offset: int, length: int, most: int) -> list[extents.Extent]:
        return await extents.walk(self._next_data, offset, length, most, asyncio.get_running_loop().time)

    async def _next_data(self, offset: int, end: int) -> tuple[int, int]:
        return await _in_thread(lambda: self._file.next_data(offset, end))

    async def prefetch(self, offset: int, length: int) -> None:
        # No more than one request can ask for: a hint must not empty the page cache.
        await _in_thread(lambda: self._file.prefetch(offset, min(length, MAX_BLOCK_BYTES)))

    async def _durably(self, call: Callable[[], None]) -> None:
        self._check()
        try:
            await _in_thread(call)
        except LostWriteError:
            self._lost_writes = True
            raise
        self._check()  # another flush failed meanwhile: the kernel reports a lost page to one of them only

    def _check(self) -> None:
        if self._lost_writes:
            raise OSError(errno.EIO, f"an earlier flush of {self._file.path} failed")


async def _in_thread(call: Callable[[], _T]) -> _T:
    return await asyncio.get_running_loop().run_in_executor(None, call)
