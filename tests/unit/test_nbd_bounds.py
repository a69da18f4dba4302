"""What one client can make the server hold, however it cuts up its requests; the export keeps all that it gets."""

import asyncio
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserver import constants as c
from nbdserver.limits import Limits
from nbdserver.receive_buffer import RECEIVE_BUFFER_BYTES
from tests.fuzz import nbd_target
from tests.fuzz.nbd_target import LIMITS, OPENINGS, SIZE_BYTES, Delivery

KEEPS = Delivery(piece_bytes=1 << 30, keeps=True, reads_late=False, opening=OPENINGS[0])
#: What a request costs beside its data: the objects that stand for it.
REQUEST_COST_BYTES = 300


def request(command: int, cookie: int, offset: int, length: int, data: bytes = b"") -> bytes:
    return struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, command, cookie, offset, length) + data


def push(stream: Iterator[bytes]) -> tuple[int, int]:
    """Send until the server takes no more: how many writes the export holds then, and in how much memory."""
    fixture = nbd_target.Fixture()

    async def run() -> tuple[int, int]:
        client = fixture.client(KEEPS)
        await client.send(OPENINGS[0])
        for data in stream:
            while data and client.wire.reading:
                room = client.connection.get_buffer(-1)
                taken = min(len(room), len(data))
                room[:taken] = data[:taken]
                data = data[taken:]
                client.connection.buffer_updated(taken)
            if not client.wire.reading:
                break
            await asyncio.sleep(0)
        held = [data for writes, _, _ in client.export._held for _, data in writes]
        found = len(held), len({id(data.obj) for data in held}) * RECEIVE_BUFFER_BYTES
        while client.export.release():
            pass
        await client.leave()
        return found

    found: tuple[int, int] = fixture.run(run())
    return found


def test_the_documented_bound_is_the_real_one() -> None:
    document = (Path(__file__).resolve().parents[2] / "docs/security.md").read_text()
    assert f"**{Limits().client_bytes >> 20} MiB**" in document
    assert f"{Limits().client_bytes * 64 / (1 << 30):.1f} GiB" in document
    assert f"{8 * Limits(in_flight_bytes=8 << 20).client_bytes >> 20} MiB" in document


@pytest.mark.parametrize("length", [0, 1, 4])
def test_tiny_writes_are_not_free(length: int) -> None:
    tiny = request(c.CMD_WRITE, 1, 0, length, b"t" * length) * 5000
    writes, _ = push(iter([tiny] * 100))
    most = (LIMITS.in_flight_bytes + RECEIVE_BUFFER_BYTES / len(tiny) * 5000 * 1024) / REQUEST_COST_BYTES
    assert writes < most


def test_a_byte_does_not_keep_a_buffer_each() -> None:
    """A small write that is held, then data that is thrown away: over and over, as much as a receive buffer takes."""
    small = request(c.CMD_WRITE, 1, 0, 1, b"s")
    rejected = request(c.CMD_WRITE, 2, SIZE_BYTES, 480_000, bytes(480_000))
    _, memory_bytes = push(iter([small + rejected] * 50))
    assert memory_bytes <= LIMITS.in_flight_bytes + 2 * RECEIVE_BUFFER_BYTES


def test_the_same_client_goes_on_when_its_writes_are_done() -> None:
    """Nothing of the accounting is left over."""
    fixture = nbd_target.Fixture()
    small = request(c.CMD_WRITE, 1, 0, 1, b"s")
    rejected = request(c.CMD_WRITE, 2, SIZE_BYTES, 480_000, bytes(480_000))
    stream = (small + rejected + small * 3000) * 8

    async def run() -> None:
        client = fixture.client(KEEPS)
        await client.send(OPENINGS[0])
        sent = len(client.wire.sent)
        await client.send(stream)
        assert len(client.wire.sent) - sent == 16 * (8 * 3002)
        assert client.connection._received.held_bytes == 0
        await client.leave()

    fixture.run(run())
