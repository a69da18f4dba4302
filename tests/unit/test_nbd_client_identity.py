"""A client that claims the server: what it sent on connections that it has given up is never executed later."""

import asyncio
import struct

import pytest

from nbdserver import constants as c
from nbdserver.client_identity import ClientIdentity
from nbdserver.handshake import Handshake
from nbdserver.limits import Limits
from tests.unit.nbd_bench import MIB, Client, request, write

ME, OTHER = b"m" * 16, b"o" * 16


class Claimant(Client):
    """A raw client that names itself in its handshake."""

    @classmethod
    async def greeted(cls, path):
        reader, writer = await asyncio.open_unix_connection(path)
        assert await reader.readexactly(18) == b"NBDMAGICIHAVEOPT\x00\x03"
        writer.write(struct.pack(">I", 3))
        return cls(reader, writer)

    def option(self, number, data):
        self.writer.write(struct.pack(">QII", c.OPTION_MAGIC, number, len(data)) + data)

    async def answer(self):
        """(kind, data)"""
        magic, _, kind, length = struct.unpack(">QIII", await self.reader.readexactly(20))
        assert magic == c.OPTION_REPLY_MAGIC
        return kind, await self.reader.readexactly(length)

    async def open(self):
        self.option(c.OPT_EXPORT_NAME, b"")
        await self.reader.readexactly(10)

    async def dropped(self):
        try:
            return await self.ended()
        except ConnectionResetError:  # what it had sent was not read
            return True

    @classmethod
    async def claiming(cls, path, client, generation):
        self = await cls.greeted(path)
        self.option(c.OPT_CLAIM, ClientIdentity(client, generation).packed())
        return self

    @classmethod
    async def opened(cls, path, client, generation):
        self = await cls.claiming(path, client, generation)
        assert await self.answer() == (c.REP_ACK, b"")
        await self.open()
        return self


def test_a_replaced_connection_executes_nothing_more_and_is_waited_for(run):
    async def scenario(bench):
        disk = bench.disk
        disk.hold = True
        old = await Claimant.opened(bench.path, ME, 1)
        # The first ones are being executed, and for the last one there is no room: it waits in the server.
        old.send(*(write(n, n * 4096, b"old!" * 1024) for n in range(600)))
        await disk.until(lambda: disk.held_bytes > MIB // 2)

        new = await Claimant.claiming(bench.path, ME, 2)
        assert await old.dropped()
        executing = disk.held_bytes // 4096
        assert executing < 600
        acknowledged = asyncio.ensure_future(new.answer())
        bystander = await bench.client()
        bystander.send(request(c.CMD_READ, 1, 0, 4))
        assert await bystander.reply(4) == (1, 0, bytes(4))
        assert not acknowledged.done()
        disk.hold = False
        disk.release()
        assert await acknowledged == (c.REP_ACK, b"")
        await new.open()
        new.send(write(1, 0, b"new!"), request(c.CMD_READ, 2, 599 * 4096, 4))
        assert await new.reply() == (1, 0, b"")
        assert await new.reply(4) == (2, 0, bytes(4))
        assert disk.data[:4] == b"new!"
        assert sum(length for batch in disk.batches for _, length in batch) == executing * 4096 + 4
        bystander.send(request(c.CMD_READ, 3, 0, 4))
        assert await bystander.reply(4) == (3, 0, b"new!")

    run(scenario, Limits(in_flight_bytes=MIB))


def test_connections_of_one_generation_and_other_clients_live_side_by_side(run):
    async def scenario(bench):
        clients = [
            await Claimant.opened(bench.path, client, generation)
            for client, generation in ((ME, 7), (ME, 7), (OTHER, 1), (OTHER, 1))
        ]
        for number, client in enumerate(clients):
            client.send(write(number, number * 4096, b"x"))
            assert await client.reply() == (number, 0, b"")

    run(scenario)


def test_an_older_claim_is_refused_while_a_newer_one_holds(run):
    async def scenario(bench):
        newer = await Claimant.opened(bench.path, ME, 2)
        older = await Claimant.claiming(bench.path, ME, 1)
        kind, sentence = await older.answer()
        assert kind == c.REP_ERR_POLICY
        assert b"newer connections" in sentence
        newer.send(write(1, 0, b"x"))
        assert await newer.reply() == (1, 0, b"")

    run(scenario)


def test_an_older_claim_that_still_waits_gives_way_to_a_newer_one(run):
    async def scenario(bench):
        disk = bench.disk
        disk.hold = True
        first = await Claimant.opened(bench.path, ME, 1)
        first.send(write(1, 0, b"first"))
        await disk.until(lambda: disk.held_bytes == 5)
        second = await Claimant.claiming(bench.path, ME, 2)
        assert await first.dropped()
        third = await Claimant.claiming(bench.path, ME, 3)
        assert await second.dropped()
        disk.release()
        assert await third.answer() == (c.REP_ACK, b"")

    run(scenario)


@pytest.mark.parametrize("data", [b"", bytes(23), bytes(25)])
def test_a_claim_of_another_size_is_refused_and_haggling_goes_on(data):
    handshake = Handshake(None)
    handshake._directory = type("Empty", (), {"shutting_down": False})()
    handshake.feed(struct.pack(">I", 3))
    output = handshake.feed(struct.pack(">QII", c.OPTION_MAGIC, c.OPT_CLAIM, len(data)) + data)
    assert struct.unpack_from(">QIII", output)[2] == c.REP_ERR_INVALID
    assert handshake.claim is None
    assert handshake.outcome is None
