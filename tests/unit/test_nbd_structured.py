"""Structured replies on the wire, chunk by chunk, from a real server through raw sockets."""

import asyncio
import errno
import struct

import pytest

from nbdserver import constants as c
from nbdserver.extents import DATA, HOLE, MAX_EXTENTS
from nbdserver.slow_requests import MIN_HOLE_BYTES
from tests.unit.nbd_bench import MIB, SIZE, Client, request, write
from tests.unit.test_nbd_handshake import option
from tests.unit.test_nbd_meta_context import ALLOCATION, query

DONE = c.REPLY_FLAG_DONE


class StructuredClient(Client):
    """With structured replies and, unless told otherwise, base:allocation negotiated."""

    @classmethod
    async def connect(cls, path, *, allocation=True):
        reader, writer = await asyncio.open_unix_connection(path)
        await reader.readexactly(18)
        options = [(c.OPT_STRUCTURED_REPLY, b"")]
        if allocation:
            options.append((c.OPT_SET_META_CONTEXT, query(b"", ALLOCATION)))
        writer.write(struct.pack(">I", 3) + b"".join(option(number, data) for number, data in options))
        writer.write(option(c.OPT_EXPORT_NAME, b""))
        expected = [(c.OPT_STRUCTURED_REPLY, c.REP_ACK)]
        if allocation:
            expected += [(c.OPT_SET_META_CONTEXT, c.REP_META_CONTEXT), (c.OPT_SET_META_CONTEXT, c.REP_ACK)]
        for awaited in expected:
            _, number, kind, length = struct.unpack(">QIII", await reader.readexactly(20))
            assert (number, kind) == awaited
            await reader.readexactly(length)
        await reader.readexactly(10)
        return cls(reader, writer)

    async def chunk(self):
        """(cookie, flags, type, payload)"""
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", await self.reader.readexactly(20))
        assert magic == 0x668E33EF
        return cookie, flags, kind, await self.reader.readexactly(length)

    async def failure(self):
        """(cookie, error) of a reply that is one error chunk with a text."""
        cookie, flags, kind, payload = await self.chunk()
        error, length = struct.unpack_from(">IH", payload)
        assert (flags, kind, len(payload)) == (DONE, 0x8001, 6 + length)
        assert payload[6:].decode()
        return cookie, error


def status(*extents):
    return struct.pack(">I", 1) + b"".join(struct.pack(">II", *extent) for extent in extents)


def test_cached_read_is_one_chunk_without_a_task(run):
    async def scenario(bench):
        bench.disk.data[4096:4100] = b"data"
        client = await StructuredClient.connect(bench.path)
        client.send(*(request(c.CMD_READ, n, 4096, 4) for n in range(3)))
        for n in range(3):
            assert await client.chunk() == (n, DONE, c.REPLY_OFFSET_DATA, struct.pack(">Q", 4096) + b"data")
        assert {call[0] for call in bench.disk.calls} == {"opened", "read_now"}

    run(scenario)


def test_other_commands_keep_simple_replies(run):
    async def scenario(bench):
        client = await StructuredClient.connect(bench.path)
        commands = (c.CMD_TRIM, c.CMD_WRITE_ZEROES, c.CMD_CACHE)
        client.send(write(50, 0, b"x"), write(51, SIZE, b"x"), request(c.CMD_FLUSH, c.CMD_FLUSH))
        client.send(*(request(command, command, 0, 4096) for command in commands))
        assert await client.replies(6) == {50: 0, 51: c.ENOSPC, c.CMD_FLUSH: 0, **dict.fromkeys(commands, 0)}

    run(scenario)


def test_holes_of_a_slow_read(run):
    async def scenario(bench):
        hole, small = 2 * MIN_HOLE_BYTES, MIN_HOLE_BYTES // 2
        bench.disk.cold = True
        bench.disk.data[:] = b"d" * SIZE
        bench.disk.extents = [(hole, HOLE), (4096, DATA), (small, HOLE), (4096, DATA), (hole, HOLE)]
        client = await StructuredClient.connect(bench.path)
        total = sum(length for length, _ in bench.disk.extents)
        client.send(request(c.CMD_READ, 1, 512, total))
        data = small + 8192
        assert await client.chunk() == (1, 0, c.REPLY_OFFSET_HOLE, struct.pack(">QI", 512, hole))
        assert await client.chunk() == (1, 0, c.REPLY_OFFSET_DATA, struct.pack(">Q", 512 + hole) + b"d" * data)
        assert await client.chunk() == (1, DONE, c.REPLY_OFFSET_HOLE, struct.pack(">QI", 512 + hole + data, hole))
        client.send(request(c.CMD_READ, 2, 512, total + 4096))  # the walk ended before the range does
        chunks = [await client.chunk() for _ in range(4)]
        assert [chunk[:3] for chunk in chunks[2:]] == [(2, 0, c.REPLY_OFFSET_HOLE), (2, DONE, c.REPLY_OFFSET_DATA)]
        assert chunks[3][3] == struct.pack(">Q", 512 + total) + b"d" * 4096

    run(scenario)


@pytest.mark.parametrize(("length", "flags"), [(MIN_HOLE_BYTES - 1, 0), (MIB, c.CMD_FLAG_DF)])
def test_a_short_or_unfragmented_read_is_one_chunk_of_data(run, length, flags):
    async def scenario(bench):
        bench.disk.cold = True
        bench.disk.extents = [(length, HOLE)]
        client = await StructuredClient.connect(bench.path)
        client.send(request(c.CMD_READ, 1, 0, length, flags=flags))
        assert await client.chunk() == (1, DONE, c.REPLY_OFFSET_DATA, bytes(8 + length))
        assert "block_status" not in {call[0] for call in bench.disk.calls}

    run(scenario)


def test_no_chunk_is_longer_than_the_advertised_maximum(run):
    async def scenario(bench):
        bench.disk.cold = True
        client = await StructuredClient.connect(bench.path)
        client.send(request(c.CMD_READ, 1, 0, 33 * MIB), request(c.CMD_READ, 2, 0, 33 * MIB, flags=c.CMD_FLAG_DF))
        sizes = {}
        assert await client.failure() == (2, c.EOVERFLOW)
        for _ in range(2):
            cookie, flags, _, payload = await client.chunk()
            sizes[struct.unpack_from(">Q", payload)[0]] = (cookie, flags, len(payload) - 8)
        assert sizes == {0: (1, 0, 32 * MIB), 32 * MIB: (1, DONE, MIB)}

    run(scenario, size_bytes=34 * MIB)


def test_empty_read(run):
    async def scenario(bench):
        client = await StructuredClient.connect(bench.path)
        client.send(request(c.CMD_READ, 1, SIZE, 0))
        assert await client.chunk() == (1, DONE, c.REPLY_NONE, b"")

    run(scenario)


@pytest.mark.parametrize("cold", [False, True])
def test_read_errors_are_chunks(run, cold):
    async def scenario(bench):
        bench.disk.cold = cold
        bench.disk.failing = {4096: errno.EIO, 8192: errno.EOPNOTSUPP}
        client = await StructuredClient.connect(bench.path)
        for cookie, (offset, length, flags, error) in enumerate(
            [
                (4096, 512, 0, c.EIO),
                (8192, 512, 0, c.EINVAL),
                (SIZE, 1, 0, c.EINVAL),
                (0, 1, c.CMD_FLAG_NO_HOLE, c.EINVAL),
                (0, 49 * MIB, 0, c.EINVAL),
            ]
        ):
            client.send(request(c.CMD_READ, cookie, offset, length, flags=flags))
            assert await client.failure() == (cookie, error)

    run(scenario)


def test_an_error_in_the_middle_is_the_whole_reply(run):
    async def scenario(bench):
        bench.disk.cold = True
        bench.disk.extents = [(MIB, DATA), (MIB, HOLE), (MIB, DATA)]
        bench.disk.failing = {2 * MIB: errno.EIO}
        client = await StructuredClient.connect(bench.path)
        client.send(request(c.CMD_READ, 1, 0, 3 * MIB), request(c.CMD_READ, 2, 0, 1))
        assert {(await client.failure())[1], (await client.chunk())[0]} == {c.EIO, 2}

    run(scenario)


def test_block_status(run):
    async def scenario(bench):
        bench.disk.extents = [(4096, HOLE), (8192, DATA), (4096, HOLE)]
        client = await StructuredClient.connect(bench.path)
        client.send(request(c.CMD_BLOCK_STATUS, 1, 4096, 16384))
        assert await client.chunk() == (1, DONE, c.REPLY_BLOCK_STATUS, status((4096, 3), (8192, 0), (4096, 3)))
        client.send(request(c.CMD_BLOCK_STATUS, 2, 4096, 16384, flags=c.CMD_FLAG_REQ_ONE | c.CMD_FLAG_FUA))
        assert await client.chunk() == (2, DONE, c.REPLY_BLOCK_STATUS, status((4096, 3)))
        calls = [call for call in bench.disk.calls if call[0] == "block_status"]
        assert calls == [("block_status", 4096, 16384, MAX_EXTENTS), ("block_status", 4096, 16384, 1)]

    run(scenario)


def test_block_status_errors(run):
    async def scenario(bench):
        bench.disk.failing = {4096: errno.EIO}
        client = await StructuredClient.connect(bench.path)
        for cookie, (offset, length, error) in enumerate(
            [(0, 0, c.EINVAL), (SIZE, 1, c.EINVAL), (2**64 - 1, 2, c.EINVAL), (4096, 1, c.EIO)]
        ):
            client.send(request(c.CMD_BLOCK_STATUS, cookie, offset, length))
            assert await client.failure() == (cookie, error)
        other = await StructuredClient.connect(bench.path, allocation=False)
        other.send(request(c.CMD_BLOCK_STATUS, 1, 0, 4096))
        assert await other.failure() == (1, c.EINVAL)

    run(scenario)


def test_fast_zero_is_done_or_refused_at_once(run):
    async def scenario(bench):
        fast, no_hole = c.CMD_FLAG_FAST_ZERO, c.CMD_FLAG_NO_HOLE
        client = await bench.client()
        client.send(request(c.CMD_WRITE_ZEROES, 1, 0, 4096, flags=fast))
        assert await client.reply() == (1, c.ENOTSUP, b"")
        bench.disk.fast = True
        client.send(request(c.CMD_WRITE_ZEROES, 2, 0, 4096, flags=fast | no_hole))
        assert await client.reply() == (2, 0, b"")
        bench.disk.failing = {8192: errno.EOPNOTSUPP}
        client.send(request(c.CMD_WRITE_ZEROES, 3, 8192, 4096))  # ENOTSUP is for FAST_ZERO only
        assert await client.reply() == (3, c.EINVAL, b"")
        assert [call for call in bench.disk.calls if call[0] == "zero"] == [
            ("zero", 0, 4096, False),
            ("zero", 8192, 4096, True),
        ]

    run(scenario)


def test_cache(run):
    async def scenario(bench):
        bench.disk.failing = {4096: errno.EIO}
        client = await bench.client()
        client.send(request(c.CMD_CACHE, 1, 0, SIZE), request(c.CMD_CACHE, 2, 4096, 1, flags=c.CMD_FLAG_FUA))
        assert await client.replies(2) == {1: 0, 2: c.EIO}
        assert ("prefetch", 0, SIZE) in bench.disk.calls

    run(scenario, read_only=True)
