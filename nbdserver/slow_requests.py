"""Requests that may block, one coroutine each: from the export to the whole reply. OSError when the export fails.

READ and BLOCK_STATUS have structured replies where these were negotiated; all others have simple ones, always.
"""

from collections.abc import Awaitable, Coroutine
from typing import Any

from nbdserver import constants as c
from nbdserver import structured
from nbdserver.export import Export
from nbdserver.extents import DATA, HOLE, MAX_EXTENTS, Extent, without_small_holes
from nbdserver.transmission import REPLY_OK, reply

#: A hole is sent as a hole only if it is as long as this; a shorter read is not looked at for holes. Finding them
#: costs a call in a thread, and each piece of data between them another: more than copying some zeroes.
MIN_HOLE_BYTES = 32 * 1024


async def read_simple(export: Export, cookie: bytes, offset: int, length: int) -> list[bytes]:
    """A READ without structured replies."""
    return [REPLY_OK + cookie, await export.read(offset, length)]


async def read_structured(export: Export, cookie: bytes, offset: int, length: int, *, whole: bool) -> list[bytes]:
    """A READ with structured replies; `whole`: as a single chunk of data (DF).

    Everything is read before the first chunk is sent, so that an error is the whole reply.
    """
    extents: list[Extent] = [(length, DATA)]
    if not whole and length >= MIN_HOLE_BYTES:
        extents = without_small_holes(await export.block_status(offset, length, MAX_EXTENTS), MIN_HOLE_BYTES)
    chunks: list[bytes] = []
    at, end = offset, offset + length
    for extent_bytes, flags in [*extents, (end, DATA)]:  # what a bounded walk has left out is read
        stop = min(end, at + extent_bytes)
        if flags == HOLE and stop > at:
            chunks.append(structured.hole(cookie, at, stop - at, last=stop == end))
            at = stop
        while at < stop:
            # No chunk is longer than the maximum that was advertised.
            piece = min(stop - at, c.MAX_BLOCK_BYTES)
            data = await export.read(at, piece)
            chunks += (structured.data(cookie, at, piece, last=at + piece == end), data)
            at += piece
    return chunks


def neither_read_nor_write(
    export: Export, command: int, flags: int, cookie: bytes, offset: int, length: int
) -> Coroutine[Any, Any, list[bytes]]:
    """Any other request, which has been found valid."""
    if command == c.CMD_BLOCK_STATUS:
        return _block_status(export, cookie, offset, length, 1 if flags & c.CMD_FLAG_REQ_ONE else MAX_EXTENTS)
    if command == c.CMD_WRITE_ZEROES:
        return _write_zeroes(export, cookie, offset, length, flags)
    if command == c.CMD_TRIM:
        return without_data(export, cookie, export.trim(offset, length), bool(flags & c.CMD_FLAG_FUA))
    if command == c.CMD_CACHE:
        return without_data(export, cookie, export.prefetch(offset, length))
    return without_data(export, cookie, export.flush())


async def _block_status(export: Export, cookie: bytes, offset: int, length: int, most: int) -> list[bytes]:
    return [structured.block_status(cookie, await export.block_status(offset, length, most))]


async def _write_zeroes(export: Export, cookie: bytes, offset: int, length: int, flags: int) -> list[bytes]:
    punch = not flags & c.CMD_FLAG_NO_HOLE
    if flags & c.CMD_FLAG_FAST_ZERO and not export.zeroes_fast(offset, length, punch):
        return [reply(cookie, c.ENOTSUP)]  # before anything is changed
    return await without_data(export, cookie, export.zero(offset, length, punch), bool(flags & c.CMD_FLAG_FUA))


async def without_data(export: Export, cookie: bytes, work: Awaitable[None], flush_after: bool = False) -> list[bytes]:
    """Any request that is answered by a bare success; `flush_after`: with FUA."""
    await work
    if flush_after:
        await export.flush()
    return [REPLY_OK + cookie]
