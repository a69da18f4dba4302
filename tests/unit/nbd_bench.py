"""A real server on a real loop, spoken to through raw sockets; only the storage behind it is in memory."""

import asyncio
import struct
from collections.abc import Callable

import pytest
import uvloop

from nbdserver import constants as c
from nbdserver.export import NO_ERRORS, Export
from nbdserver.extents import DATA
from nbdserver.server import Server

MIB = 1024 * 1024
SIZE = 16 * MIB


class MemoryDisk(Export):
    """Storage whose answers can be held back.

    While `hold` is set writes stay in `held` (keeping the views, as a replicated volume does); while `gate`
    is closed the coroutines wait. `failing` maps offsets to errnos.
    """

    name: str
    description: str
    size_bytes: int
    read_only: bool

    def __init__(self, name="disk", *, size_bytes=SIZE, read_only=False, refused=None):
        self.name, self.description, self.size_bytes, self.read_only = name, "", size_bytes, read_only
        self.refused = refused
        self.extents = []
        self.fast = False
        self.data = bytearray(size_bytes)
        self.hold = self.cold = False
        self.held = []
        self.failing: dict[int, int] = {}
        self.calls = []
        self.batches = []
        self.clients = []
        self.gate = asyncio.Event()
        self.gate.set()
        self._changed = asyncio.Event()

    def note(self, *call):
        self.calls.append(call)
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def refusal(self):
        return self.refused

    def opened(self, client):
        self.clients.append(client)
        self.note("opened")

    def closed(self, client):
        self.clients.remove(client)
        self.note("closed")

    def write_batch(self, writes, done):
        self.batches.append([(offset, len(data)) for offset, data in writes])
        self.held.append((writes, done))
        if not self.hold:
            self.release()
        self.note("batch")
        return self.hold

    @property
    def held_bytes(self):
        return sum(len(data) for writes, _ in self.held for _, data in writes)

    def release(self, index=None):
        """Finish held batches: one, or all."""
        batches = self.held[:] if index is None else [self.held[index]]
        for batch in batches:
            self.held.remove(batch)
            writes, done = batch
            errors = {}
            for number, (offset, data) in enumerate(writes):
                if offset in self.failing:
                    errors[number] = self.failing[offset]
                else:
                    self.data[offset : offset + len(data)] = data
            done(errors or NO_ERRORS)

    def read_now(self, offset, length):
        self.note("read_now", offset, length)
        if offset in self.failing:
            raise OSError(self.failing[offset], "failing")
        return None if self.cold else bytes(self.data[offset : offset + length])

    async def _slow(self, *call):
        self.note(*call)
        await self.gate.wait()
        if len(call) > 1 and call[1] in self.failing:
            raise OSError(self.failing[call[1]], "failing")

    async def read(self, offset, length):
        await self._slow("read", offset, length)
        return bytes(self.data[offset : offset + length])

    async def write_durable(self, offset, data):
        await self._slow("write_durable", offset, len(data))
        self.data[offset : offset + len(data)] = data

    async def flush(self):
        await self._slow("flush")

    async def trim(self, offset, length):
        await self._slow("trim", offset, length)

    async def zero(self, offset, length, punch):
        await self._slow("zero", offset, length, punch)

    def zeroes_fast(self, offset, length, punch):
        return self.fast

    async def block_status(self, offset, length, most):
        await self._slow("block_status", offset, length, most)
        return self.extents[:most] or [(length, DATA)]

    async def prefetch(self, offset, length):
        await self._slow("prefetch", offset, length)


def request(command, cookie, offset=0, length=0, data=b"", *, flags=0, magic=c.REQUEST_MAGIC):
    return struct.pack(">IHHQQI", magic, flags, command, cookie, offset, length or len(data)) + data


def write(cookie, offset, data, *, flags=0):
    return request(c.CMD_WRITE, cookie, offset, data=data, flags=flags)


class Client:
    """A raw-socket client in the transmission phase."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, path, name=b"", **options):
        reader, writer = await asyncio.open_unix_connection(path, **options)
        assert await reader.readexactly(18) == b"NBDMAGICIHAVEOPT\x00\x03"
        writer.write(struct.pack(">IQII", 3, c.OPTION_MAGIC, c.OPT_EXPORT_NAME, len(name)) + name)
        await reader.readexactly(10)
        return cls(reader, writer)

    def send(self, *requests):
        self.writer.write(b"".join(requests))

    async def reply(self, length=0):
        """(cookie, error, data)"""
        magic, error, cookie = struct.unpack(">IIQ", await self.reader.readexactly(16))
        assert magic == c.SIMPLE_REPLY_MAGIC
        return cookie, error, await self.reader.readexactly(0 if error else length)

    async def replies(self, count):
        """{cookie: error} of replies without data"""
        found = [await self.reply() for _ in range(count)]
        assert len({cookie for cookie, _, _ in found}) == count
        return {cookie: error for cookie, error, _ in found}

    async def ended(self):
        return await self.reader.read(1) == b""


class Bench:
    """One server with one disk, and clients of it."""

    def __init__(self, path, disk, server):
        self.path, self.disk, self.server = path, disk, server

    async def client(self, **options):
        return await Client.connect(self.path, **options)


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request, tmp_path):
    """Run a scenario(bench) on a loop; nothing may reach the loop's exception handler."""

    def runner(scenario, limits=None, tls=None, **disk_options):
        problems = []

        async def main():
            asyncio.get_running_loop().set_exception_handler(lambda _loop, context: problems.append(context))
            disk = MemoryDisk(**disk_options)
            server = Server(default=disk, limits=limits, tls=tls)
            path = str(tmp_path / "nbd.sock")
            await server.listen_unix(path)
            try:
                async with asyncio.timeout(20):
                    await scenario(Bench(path, disk, server))
            finally:
                disk.gate.set()
                disk.release()
                server.abort()
                async with asyncio.timeout(20):
                    for connection in list(server.connections):
                        await connection.closed.wait()

        with asyncio.Runner(loop_factory=request.param) as loop_runner:
            loop_runner.run(main())
        assert problems == []

    return runner
