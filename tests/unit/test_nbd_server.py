"""A real server on a real loop, spoken to through raw sockets; only the storage behind it is in memory."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import struct

import pytest

from nbdserver import constants as c
from nbdserver.engine import WHOLE_WRITE_BYTES
from nbdserver.limits import Limits
from nbdserver.server import ListenError, Server
from tests.unit.nbd_bench import SIZE, Client, MemoryDisk, request, write

KIB, MIB = 1024, 1024 * 1024


def test_write_then_read_in_one_send(run):
    async def scenario(bench):
        client = await bench.client()
        client.send(write(1, 8192, b"abc"), request(c.CMD_READ, 2, 8191, 5))
        assert await client.reply() == (1, 0, b"")
        assert await client.reply(5) == (2, 0, b"\0abc\0")

    run(scenario)


def test_consecutive_writes_become_batches_and_every_cookie_is_answered(run):
    async def scenario(bench):
        client = await bench.client()
        client.send(*(write(n, n * 4096, bytes([n % 251]) * 4096) for n in range(1000)))
        assert await client.replies(1000) == dict.fromkeys(range(1000), 0)
        assert len(bench.disk.batches) < 500
        assert all(bench.disk.data[n * 4096] == n % 251 for n in range(1000))

    run(scenario)


def test_errors_reach_the_right_cookie(run):
    async def scenario(bench):
        bench.disk.failing = {4096: c.ENOSPC, 12288: 9999}
        client = await bench.client()
        client.send(*(write(n, n * 4096, b"x" * 4096) for n in range(5)))
        assert await client.replies(5) == {0: 0, 1: c.ENOSPC, 2: 0, 3: c.EIO, 4: 0}
        client.send(request(c.CMD_READ, 7, 4096, 4096), request(c.CMD_READ, 8, 0, 2))
        assert await client.reply() == (7, c.ENOSPC, b"")
        assert await client.reply(2) == (8, 0, b"xx")

    run(scenario)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (write(1, SIZE - 1, b"xy"), c.ENOSPC),
        (write(1, SIZE - 4096, b"x" * MIB), c.ENOSPC),
        (write(1, 0, b"x" * 4096, flags=c.CMD_FLAG_NO_HOLE), c.EINVAL),
        (write(1, 0, bytes(48 * MIB + 1)), c.EINVAL),
        (request(c.CMD_READ, 1, SIZE, 1), c.EINVAL),
        (request(c.CMD_READ, 1, 2**64 - 1, 2), c.EINVAL),
        (request(c.CMD_READ, 1, 0, 2**32 - 1), c.EINVAL),
        (request(c.CMD_READ, 1, 0, 1, flags=c.CMD_FLAG_DF), c.EINVAL),
        (request(c.CMD_TRIM, 1, SIZE, 1), c.EINVAL),
        (request(c.CMD_WRITE_ZEROES, 1, SIZE, 1), c.ENOSPC),
        (request(c.CMD_BLOCK_STATUS, 1, 0, 4096), c.EINVAL),
        (request(c.CMD_CACHE, 1, SIZE, 4096), c.EINVAL),
        (request(77, 1, 0, 4096), c.EINVAL),
        (request(c.CMD_FLUSH, 1, 1, 0), c.EINVAL),
    ],
)
def test_a_wrong_request_is_answered_and_the_next_one_served(run, wrong, error):
    async def scenario(bench):
        client = await bench.client()
        client.send(wrong, write(2, 0, b"next"))
        assert await client.replies(2) == {1: error, 2: 0}
        assert bench.disk.data[:4] == b"next"
        assert not any(bench.disk.data[4:8192])

    run(scenario)


def test_zero_length_requests_are_fine(run):
    async def scenario(bench):
        client = await bench.client()
        commands = (c.CMD_READ, c.CMD_WRITE, c.CMD_TRIM, c.CMD_WRITE_ZEROES, c.CMD_CACHE)
        client.send(*(request(command, command, SIZE) for command in commands))
        client.send(request(c.CMD_WRITE, 50, 0, flags=c.CMD_FLAG_FUA))
        assert await client.replies(6) == dict.fromkeys((*commands, 50), 0)

    run(scenario)


def test_read_only(run):
    async def scenario(bench):
        client = await bench.client()
        client.send(write(1, 0, b"x" * 4096), write(2, 0, b"x" * MIB), request(c.CMD_TRIM, 3, 0, 4096))
        client.send(request(c.CMD_FLUSH, 4))
        assert await client.replies(4) == {1: c.EPERM, 2: c.EPERM, 3: c.EPERM, 4: 0}
        assert bench.disk.batches == []

    run(scenario, read_only=True)


def test_slow_commands(run):
    async def scenario(bench):
        fua, no_hole = c.CMD_FLAG_FUA, c.CMD_FLAG_NO_HOLE
        client = await bench.client()
        bench.disk.failing = {5: errno.EROFS, 6: errno.EDQUOT}
        for n, sent in enumerate(
            [
                request(c.CMD_FLUSH, 0),
                write(1, 4096, b"durable", flags=fua),
                request(c.CMD_TRIM, 2, 0, 4096, flags=fua),
                request(c.CMD_WRITE_ZEROES, 3, 0, 4096),
                request(c.CMD_WRITE_ZEROES, 4, 0, 4096, flags=no_hole | fua),
                request(c.CMD_TRIM, 5, 5, 1),
                write(6, 6, b"durable", flags=fua),
            ]
        ):
            client.send(sent)
            assert await client.reply() == (n, {5: c.EPERM, 6: c.ENOSPC}.get(n, 0), b"")
        assert bench.disk.calls[1:] == [
            ("flush",),
            ("write_durable", 4096, 7),
            ("trim", 0, 4096),
            ("flush",),
            ("zero", 0, 4096, True),
            ("zero", 0, 4096, False),
            ("flush",),
            ("trim", 5, 1),
            ("write_durable", 6, 7),
        ]

    run(scenario)


def test_replies_overtake_a_slow_read(run):
    async def scenario(bench):
        bench.disk.cold = True
        bench.disk.gate.clear()
        client = await bench.client()
        client.send(request(c.CMD_READ, 1, 0, 4), write(2, 0, b"data"))
        assert await client.reply() == (2, 0, b"")
        bench.disk.gate.set()
        assert await client.reply(4) == (1, 0, b"data")

    run(scenario)


def test_slow_reads_that_fail(run):
    async def scenario(bench):
        client = await bench.client()
        bench.disk.cold = True
        bench.disk.gate.clear()
        client.send(request(c.CMD_READ, 1, 4096, 4))
        await bench.disk.until(lambda: ("read", 4096, 4) in bench.disk.calls)
        bench.disk.failing = {4096: errno.ENODEV}
        bench.disk.gate.set()
        assert await client.reply() == (1, c.EIO, b"")

    run(scenario)


def test_a_large_write_is_passed_on_in_aligned_pieces(run):
    async def scenario(bench):
        disk = bench.disk
        disk.hold = True
        payload = os.urandom(5 * MIB + 12345)
        client = await bench.client()
        client.send(write(1, 512, payload))
        await disk.until(lambda: disk.held_bytes == len(payload))
        pieces = [piece for batch in disk.batches for piece in batch]
        assert all((offset + length) % 4096 == 0 and length >= 64 * KIB - 4096 for offset, length in pieces[:-1])
        assert len(pieces) >= len(payload) // (512 * KIB)
        while disk.held:
            disk.release(len(disk.held) // 2)  # in no particular order
        assert await client.reply() == (1, 0, b"")
        assert disk.data[512 : 512 + len(payload)] == payload

    run(scenario)


def test_an_error_in_one_piece_fails_the_large_write_once(run):
    async def scenario(bench):
        bench.disk.failing = {0: c.ENOSPC}
        client = await bench.client()
        client.send(write(1, 0, bytes(4 * MIB)), write(2, 8 * MIB, b"next"))
        assert await client.replies(2) == {1: c.ENOSPC, 2: 0}

    run(scenario)


def test_a_large_durable_write_ends_with_a_flush(run):
    async def scenario(bench):
        client = await bench.client()
        client.send(write(1, 0, b"d" * MIB, flags=c.CMD_FLAG_FUA))
        assert await client.reply() == (1, 0, b"")
        assert bench.disk.calls[-1] == ("flush",)
        assert bench.disk.data[:MIB] == b"d" * MIB

    run(scenario)


def test_kept_views_are_never_overwritten(run):
    async def scenario(bench):
        disk = bench.disk
        disk.hold = True
        client = await bench.client()
        sizes = [1, 4096, 100, WHOLE_WRITE_BYTES, 777, WHOLE_WRITE_BYTES + 1, MIB, 3]
        payloads, offset = [], 0
        for n in range(160):
            data = os.urandom(sizes[n % len(sizes)])
            payloads.append((offset, data))
            client.send(write(n, offset, data))
            offset += len(data)
            if n % 7 == 0:
                await client.writer.drain()
        await disk.until(lambda: disk.held_bytes == offset)
        disk.release()
        assert await client.replies(160) == dict.fromkeys(range(160), 0)
        for offset, data in payloads:
            assert disk.data[offset : offset + len(data)] == data

    run(scenario, size_bytes=64 * MIB)


def test_input_waits_while_too_much_is_in_flight(run):
    async def scenario(bench):
        disk = bench.disk
        disk.hold = True
        client = await bench.client()
        total = 8 * MIB
        client.send(*(write(n, n * 4096, b"x" * 4096) for n in range(total // 4096)))
        answered = 0
        while answered < total // 4096:
            # What is counted is more than the data: a write costs more, and a slice keeps its whole buffer.
            rest = min(total - answered * 4096, MIB * 3 // 8)
            await disk.until(lambda rest=rest: disk.held_bytes >= rest)
            assert disk.held_bytes <= 2 * MIB
            count = disk.held_bytes // 4096
            disk.release()
            await client.replies(count)
            answered += count

    run(scenario, Limits(in_flight_bytes=MIB))


def test_slow_requests_are_limited(run):
    async def scenario(bench):
        disk = bench.disk
        disk.gate.clear()
        client = await bench.client()
        client.send(*(request(c.CMD_FLUSH, n) for n in range(50)))
        await disk.until(lambda: disk.calls.count(("flush",)) == 8)
        other = await bench.client()  # another connection is not held up
        other.send(write(1, 0, b"x"))
        assert await other.reply() == (1, 0, b"")
        assert disk.calls.count(("flush",)) == 8
        disk.gate.set()
        assert await client.replies(50) == dict.fromkeys(range(50), 0)

    run(scenario, Limits(slow_requests=8))


def test_a_client_that_reads_no_replies_does_not_make_the_server_execute_more(run):
    async def scenario(bench):
        disk = bench.disk
        client = await bench.client(limit=4096)
        client.writer.transport.pause_reading()
        client.send(*(request(c.CMD_READ, n, 0, MIB) for n in range(200)))
        other = await bench.client()
        other.send(write(1, 0, b"x"))
        assert await other.reply() == (1, 0, b"")
        assert sum(call[0] == "read_now" for call in disk.calls) < 20
        client.writer.transport.resume_reading()
        for _ in range(200):
            assert (await client.reply(MIB))[1] == 0

    run(scenario, Limits(unsent_reply_bytes=MIB))


def test_wrong_magic_closes_after_what_is_outstanding_and_logs_once(run, caplog):
    async def scenario(bench):
        client = await bench.client()
        client.send(write(1, 0, b"x"), request(c.CMD_READ, 2, 0, 1, magic=0xDEADBEEF), b"x" * 5000)
        assert await client.reply() == (1, 0, b"")
        with contextlib.suppress(ConnectionResetError):  # there was unread input
            assert await client.ended()
        await bench.disk.until(lambda: not bench.disk.clients)

    with caplog.at_level(logging.WARNING, "nbdserver"):
        run(scenario)
    assert len(caplog.records) == 1
    assert "something else than a request" in caplog.text


def test_disconnect_finishes_what_is_outstanding(run):
    async def scenario(bench):
        disk = bench.disk
        disk.hold = True
        client = await bench.client()
        client.send(write(1, 0, b"last"), request(c.CMD_FLUSH, 2), request(c.CMD_DISC, 3), write(4, 0, b"late"))
        assert await client.reply() == (2, 0, b"")
        disk.release()
        assert await client.reply() == (1, 0, b"")
        assert await client.ended()
        assert disk.data[:4] == b"last"

    run(scenario)


def test_half_closed_client_gets_its_replies(run):
    async def scenario(bench):
        bench.disk.hold = True
        client = await bench.client()
        client.send(write(1, 0, b"last"))
        client.writer.write_eof()
        await bench.disk.until(lambda: bool(bench.disk.held))
        bench.disk.release()
        assert await client.reply() == (1, 0, b"")
        assert await client.ended()

    run(scenario)


def test_export_is_closed_only_when_the_work_of_a_lost_client_is_done(run, caplog):
    async def scenario(bench):
        disk = bench.disk
        disk.hold = True
        disk.gate.clear()
        client = await bench.client()
        client.send(write(1, 0, b"kept"), request(c.CMD_FLUSH, 2), write(3, 4096, bytes(MIB))[: MIB // 2])
        await disk.until(lambda: ("flush",) in disk.calls and len(disk.held) >= 2)
        client.writer.transport.abort()
        (connection,) = bench.server.connections
        other = await bench.client()
        other.send(request(c.CMD_READ, 1, 0, 1))
        await other.reply(1)
        assert disk.clients[0] is connection
        disk.gate.set()
        disk.release()
        await connection.closed.wait()
        assert connection not in disk.clients
        assert disk.data[:4] == b"kept"

    with caplog.at_level(logging.WARNING, "nbdserver"):
        run(scenario)
    assert caplog.records == []


def test_drain_finishes_what_was_received_then_half_closes(run):
    async def scenario(bench):
        disk = bench.disk
        disk.hold = True
        client = await bench.client()
        partial_write = write(9, 8 * MIB, bytes(2 * MIB))[:MIB]
        client.send(write(1, 0, b"one"), write(2, 4096, b"two"), partial_write)
        await disk.until(lambda: any(offset >= 8 * MIB for batch in disk.batches for offset, _ in batch))
        drains = [asyncio.ensure_future(disk.clients[0].drain()) for _ in range(2)]
        await asyncio.wait(drains, timeout=0)
        assert not any(drain.done() for drain in drains)
        disk.release()
        await asyncio.gather(*drains)
        assert await client.replies(2) == {1: 0, 2: 0}
        assert await client.ended()
        batches = len(disk.batches)
        client.send(write(3, 0, b"not any more"))  # arrives while the server lingers: no reset
        client.writer.close()
        await disk.until(lambda: not disk.clients)
        assert len(disk.batches) == batches
        assert disk.data[:3] == b"one"

    run(scenario)


def test_drain_executes_what_the_limits_held_back(run):
    async def scenario(bench):
        disk = bench.disk
        disk.hold = True
        client = await bench.client()
        count = 300 * KIB // 4096
        client.send(*(write(n, n * 4096, b"d" * 4096) for n in range(count)))
        client.send(*(request(c.CMD_FLUSH, count + n) for n in range(40)))
        await disk.until(lambda: bool(disk.held))
        drain = asyncio.ensure_future(disk.clients[0].drain())
        while not drain.done():
            disk.release()
            await asyncio.wait([drain], timeout=0.01)
        answered = 0
        while not client.reader.at_eof():
            if await client.reader.read(16):
                answered += 1
        assert answered >= len(disk.batches)
        assert disk.calls.count(("flush",)) + sum(map(len, disk.batches)) == answered

    run(scenario, Limits(in_flight_bytes=64 * KIB, slow_requests=2))


def test_drain_ends_the_linger_by_itself(run):
    async def scenario(bench):
        client = await bench.client()
        await bench.disk.until(lambda: bool(bench.disk.clients))
        await bench.disk.clients[0].drain()
        await bench.disk.until(lambda: not bench.disk.clients)  # the client never closes
        assert await client.ended()

    run(scenario, Limits(linger_s=0.01))


def test_drain_drops_a_client_that_takes_no_replies(run):
    async def scenario(bench):
        client = await bench.client(limit=4096)
        client.writer.transport.pause_reading()
        client.send(*(request(c.CMD_READ, n, 0, MIB) for n in range(50)))
        await bench.disk.until(lambda: any(call[0] == "read_now" for call in bench.disk.calls))
        await bench.disk.clients[0].drain()
        await bench.disk.until(lambda: not bench.disk.clients)

    run(scenario, Limits(unsent_reply_bytes=64 * KIB, drain_timeout_s=0.05, linger_s=30))


def test_drain_gives_slow_storage_its_time(run):
    async def scenario(bench):
        disk = bench.disk
        disk.gate.clear()
        client = await bench.client()
        client.send(request(c.CMD_FLUSH, 1))
        await disk.until(lambda: ("flush",) in disk.calls)
        drain = asyncio.ensure_future(disk.clients[0].drain())
        await asyncio.wait([drain], timeout=0.05)  # several drain timeouts
        assert not drain.done()
        disk.gate.set()
        assert await client.reply() == (1, 0, b"")
        await drain
        client.writer.close()

    run(scenario, Limits(drain_timeout_s=0.01))


def test_stop_drains_everybody_and_refuses_newcomers(run):
    async def scenario(bench):
        bench.disk.hold = True
        clients = [await bench.client() for _ in range(3)]
        for n, client in enumerate(clients):
            client.send(write(n, n * 4096, b"x"))
        haggling, writer = await asyncio.open_unix_connection(bench.path)
        await haggling.readexactly(18)
        await bench.disk.until(lambda: len(bench.disk.held) == 3)
        stopping = asyncio.ensure_future(bench.server.stop())
        await asyncio.wait([stopping], timeout=0)
        with pytest.raises(OSError):
            await asyncio.open_unix_connection(bench.path)
        assert not os.path.exists(bench.path)
        writer.write(struct.pack(">IQII", 3, c.OPTION_MAGIC, c.OPT_LIST, 0))
        magic, option, kind, length = struct.unpack(">QIII", await haggling.readexactly(20))
        assert (magic, option, kind) == (c.OPTION_REPLY_MAGIC, c.OPT_LIST, c.REP_ERR_SHUTDOWN)
        await haggling.readexactly(length)
        bench.disk.release()
        for n, client in enumerate(clients):
            assert await client.reply() == (n, 0, b"")
            assert await client.ended()
            client.writer.close()
        await stopping
        assert await haggling.read(1) == b""
        writer.close()

    run(scenario)


def test_handshake_timeout(run, caplog):
    async def scenario(bench):
        reader, writer = await asyncio.open_unix_connection(bench.path)
        await reader.readexactly(18)
        writer.write(b"\0\0\0\3IHAVE")
        assert await reader.read(1) == b""
        writer.close()

    run(scenario, Limits(handshake_timeout_s=0.02))
    assert "did not finish the handshake in 0.02 s" in caplog.text


def test_connection_limit(run, caplog):
    async def scenario(bench):
        clients = [await bench.client(), await bench.client()]
        reader, writer = await asyncio.open_unix_connection(bench.path)
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        clients[0].send(request(c.CMD_DISC, 0))
        assert await clients[0].ended()
        await bench.disk.until(lambda: len(bench.disk.clients) == 1)
        await bench.client()

    run(scenario, Limits(max_connections=2))
    assert "there are 2 clients already" in caplog.text


@pytest.mark.parametrize("culprit", ["write_batch", "read_now", "flush"])
def test_an_export_that_breaks_its_contract_costs_only_the_connection(run, caplog, culprit):
    async def scenario(bench):
        def broken(*_arguments):
            raise ZeroDivisionError("a bug")

        client = await bench.client()
        setattr(bench.disk, culprit, broken)
        client.send(write(1, 0, b"x"), request(c.CMD_READ, 2, 0, 1), request(c.CMD_FLUSH, 3))
        try:
            while await client.reader.read(100):
                pass
        except ConnectionResetError:
            pass
        await bench.disk.until(lambda: not bench.disk.clients)
        delattr(bench.disk, culprit)
        other = await bench.client()
        other.send(write(1, 0, b"x"))
        assert await other.reply() == (1, 0, b"")

    run(scenario)
    assert "failed unexpectedly: ZeroDivisionError('a bug')" in caplog.text
    assert "Traceback" not in caplog.text


def test_an_unexpected_error_of_a_coroutine_is_answered(run, caplog):
    async def scenario(bench):
        async def broken():
            raise ZeroDivisionError("a bug")

        client = await bench.client()
        bench.disk.flush = broken
        client.send(request(c.CMD_FLUSH, 3), write(4, 0, b"x"))
        assert await client.replies(2) == {3: c.EIO, 4: 0}

    run(scenario)
    assert "Traceback" not in caplog.text


def test_several_exports_by_name(run):
    async def scenario(bench):
        second = MemoryDisk("second", size_bytes=MIB)
        bench.server.add_export(second)
        client = await Client.connect(bench.path, b"second")
        client.send(write(1, 0, b"x"), write(2, MIB, b"x"))
        assert await client.replies(2) == {1: 0, 2: c.ENOSPC}
        assert (second.data[0], bench.disk.data[0]) == (ord("x"), 0)
        bench.server.remove_export("second")
        assert bench.server.find("second") is None
        assert [export.name for export in bench.server.listing()] == ["disk"]
        client.send(write(3, 0, b"y"))  # who has it open keeps it
        assert await client.reply() == (3, 0, b"")
        bench.server.remove_export("disk")
        assert bench.server.find("") is None
        client.writer.close()
        await second.until(lambda: not second.clients)

    run(scenario)


def test_the_size_may_grow_while_clients_are_connected(run):
    async def scenario(bench):
        client = await bench.client()
        client.send(write(1, MIB, b"x"))
        assert await client.reply() == (1, c.ENOSPC, b"")
        bench.disk.data.extend(bytes(MIB))
        bench.disk.size_bytes = 2 * MIB
        client.send(write(2, MIB, b"x"))
        assert await client.reply() == (2, 0, b"")

    run(scenario, size_bytes=MIB)


def test_listening_errors_are_sentences(run, tmp_path):
    async def scenario(bench):
        other = Server(default=bench.disk)
        with pytest.raises(ListenError, match=r"nbd\.sock is in use by another server; stop that one"):
            await other.listen_unix(bench.path)
        occupied = tmp_path / "file"
        occupied.touch()
        with pytest.raises(ListenError, match="is not a socket; remove it"):
            await other.listen_unix(str(occupied))
        with pytest.raises(ListenError, match=r"cannot listen on .*No such file or directory"):
            await other.listen_unix(str(tmp_path / "gone" / "socket"))
        ((_, port),) = await bench.server.listen_tcp("127.0.0.1", 0)
        with pytest.raises(ListenError, match=f"127.0.0.1:{port}: the port is in use; stop the other server"):
            await other.listen_tcp("127.0.0.1", port)
        with pytest.raises(ListenError, match="this machine does not have that address"):
            await other.listen_tcp("192.0.2.1", 0)

    run(scenario)


def test_a_stale_socket_file_is_replaced(run, tmp_path):
    async def scenario(bench):
        path = str(tmp_path / "stale")
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(path)
        await bench.server.listen_unix(path)
        client = await Client.connect(path)
        client.send(write(1, 0, b"x"))
        assert await client.reply() == (1, 0, b"")

    run(scenario)
