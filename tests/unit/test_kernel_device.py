"""The kernel device without a kernel: messages byte by byte, decisions as tables, a real server to be found."""

import asyncio
import contextlib
import errno
import os
import socket
import struct
import sys
import threading
from pathlib import Path

import pytest

from nbdserver.blockfile import BlockFile
from nbdserver.client_identity import ClientIdentity
from nbdserver.file_export import FileExport
from nbdserver.limits import Limits
from nbdserver.server import Server
from replica.config import load_config
from replica.kernel_device import finder, messages, netlink, places
from replica.kernel_device.finder import NobodyServes
from replica.kernel_device.messages import Cmd, Family, Message, Settings
from replica.kernel_device.netlink import DeviceError
from replica.kernel_device.places import Backend, Place, Trust, Watchdog, next_delay_s

little_endian = pytest.mark.skipif(sys.byteorder != "little", reason="the bytes are written down for little-endian")

# ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────


@little_endian
def test_the_question_for_the_family() -> None:
    assert messages.get_family(7).hex(" ", 4) == (
        # length 28, type 0x10 (GENL_ID_CTRL), flags REQUEST|ACK, sequence, port
        "1c000000 10000500 07000000 00000000 "
        "03020000 "  # CTRL_CMD_GETFAMILY, version 2
        "08000200 6e626400"  # CTRL_ATTR_FAMILY_NAME "nbd\0"
    )


@little_endian
def test_connect_with_everything() -> None:
    settings = Settings(
        sockets=[5, 6],
        size_bytes=0x100000,
        block_size_bytes=512,
        server_flags=0x16D,
        timeout_s=5,
        dead_conn_timeout_s=86400,
        backend="ab",
    )
    data = messages.device_command(Family(0x1F, 2), Cmd.CONNECT, 9, 3, settings)
    assert data.hex(" ", 4) == (
        "7c000000 1f000500 09000000 00000000 "
        "01010000 "  # NBD_CMD_CONNECT, version 1
        "08000100 03000000 "  # NBD_ATTR_INDEX
        "0c000200 00001000 00000000 "  # NBD_ATTR_SIZE_BYTES
        "0c000300 00020000 00000000 "  # NBD_ATTR_BLOCK_SIZE_BYTES
        "0c000400 05000000 00000000 "  # NBD_ATTR_TIMEOUT
        "0c000500 6d010000 00000000 "  # NBD_ATTR_SERVER_FLAGS
        "0c000800 80510100 00000000 "  # NBD_ATTR_DEAD_CONN_TIMEOUT
        "1c000780 "  # NBD_ATTR_SOCKETS, nested
        "0c000180 08000100 05000000 "  # NBD_SOCK_ITEM, nested: NBD_SOCK_FD
        "0c000180 08000100 06000000 "
        "07000a00 61620000"  # NBD_ATTR_BACKEND_IDENTIFIER "ab\0", padded
    )


@little_endian
def test_disconnect_names_only_the_device() -> None:
    data = messages.device_command(Family(0x1F, 2), Cmd.DISCONNECT, 1, 0, Settings())
    assert data.hex(" ", 4) == "1c000000 1f000500 01000000 00000000 02010000 08000100 00000000"


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def _netlink(kind: int, body: bytes) -> bytes:
    data = struct.pack("=IHHII", 16 + len(body), kind, 0, 1, 0) + body
    return data + bytes(-len(data) % 4)


def test_the_family_and_its_group() -> None:
    groups = [
        _attribute(1, _attribute(1, b"other\0") + _attribute(2, struct.pack("=I", 4))),
        _attribute(2, _attribute(2, struct.pack("=I", 9)) + _attribute(1, b"nbd_mc_group\0")),
    ]
    attributes = _attribute(2, b"nbd\0") + _attribute(1, struct.pack("=H", 33)) + _attribute(7, b"".join(groups))
    (message,) = messages.parse(_netlink(16, struct.pack("=BBH", 1, 2, 0) + attributes))
    assert messages.family_of(message) == Family(33, 9)
    assert messages.family_of(Message(16, 1)) is None


def test_an_answer_an_error_and_an_acknowledgement() -> None:
    dead = struct.pack("=BBH", Cmd.LINK_DEAD, 1, 0) + _attribute(1, struct.pack("=I", 12))
    data = _netlink(33, dead) + _netlink(2, struct.pack("=i", -errno.EBUSY) + bytes(16)) + _netlink(2, bytes(20))
    link_dead, error, acknowledgement = messages.parse(data)
    assert (link_dead.command, messages.index_of(link_dead)) == (Cmd.LINK_DEAD, 12)
    assert error.error == errno.EBUSY
    assert acknowledgement.error == 0
    assert messages.index_of(error) is None


def test_what_is_cut_short_is_not_read_beyond_its_end() -> None:
    whole = _netlink(33, struct.pack("=BBH", 4, 1, 0) + _attribute(1, struct.pack("=I", 12)))
    for length in range(len(whole)):
        assert list(messages.parse(whole[:length])) == []
    for length in range(8):
        cut = Message(33, 1, command=4, attributes=_attribute(1, struct.pack("=I", 12))[:length])
        assert messages.index_of(cut) is None


@pytest.mark.parametrize("number", [errno.EPERM, errno.EBUSY, errno.ENOENT, errno.EINVAL, errno.ENOMEM])
def test_errors_of_the_kernel_are_one_sentence(number: int) -> None:
    text = messages.error_text(number, "/dev/nbd0")
    assert "/dev/nbd0" in text
    assert ": " in text


@pytest.mark.parametrize("path", ["", "nbd0", "/dev/nbd", "/dev/nbdx", "/dev/sda", "/dev/nbd0p1"])
def test_only_devices_of_the_driver_are_taken(path: str) -> None:
    with pytest.raises(DeviceError, match="is no network block device"):
        netlink.device_index(path)


def test_the_number_of_a_device() -> None:
    assert netlink.device_index(netlink.device_path(17)) == 17


def test_without_the_module_it_is_one_sentence() -> None:
    if Path("/sys/module/nbd").exists():
        pytest.skip("this kernel has nbd")
    with pytest.raises(DeviceError, match="modprobe nbd"):
        netlink.Driver()


# ── decisions ────────────────────────────────────────────────────────────────────────────────────────────────────

CONFIG = """
[cluster]
name = "web"
secret-file = "none"
[node.node1]
address = "192.0.2.1"
[node.node2]
address = "192.0.2.2"
[resource.r0]
port = 7789
backing = "/srv/r0"
[resource.r0.on.node1]
nbd = "{one}"
[resource.r0.on.node2]
nbd = "{two}"
"""


@pytest.mark.parametrize(
    ("node", "one", "two", "expected"),
    [
        ("node1", "0.0.0.0:1", "0.0.0.0:1", ["node1 (127.0.0.1:1)", "node2 (192.0.2.2:1)"]),
        ("node2", "0.0.0.0:1", "0.0.0.0:1", ["node2 (127.0.0.1:1)", "node1 (192.0.2.1:1)"]),
        (None, "0.0.0.0:1", "0.0.0.0:1", ["node1 (192.0.2.1:1)", "node2 (192.0.2.2:1)"]),
        ("node1", "[::]:1", "192.0.2.9:2", ["node1 ([::1]:1)", "node2 (192.0.2.9:2)"]),
        ("node2", "unix:/a", "unix:/b", ["node2 (/b)", "node1 (/a)"]),
        ("node2", "127.0.0.1:1", "127.0.0.1:1", ["node2 (127.0.0.1:1)"]),
    ],
)
def test_whom_to_ask(tmp_path: Path, node: str | None, one: str, two: str, expected: list[str]) -> None:
    file = tmp_path / "replica.toml"
    file.write_text(CONFIG.format(one=one, two=two))
    config = load_config(file, node, need_secret=False, may_be_client=True)
    assert config.is_member == (node is not None)
    assert list(map(str, places.places(config, config.resource()))) == expected


ONE, TWO = Place("node1", host="a", port=1), Place("node2", host="b", port=1)


@pytest.mark.parametrize(
    ("serving", "last", "left", "chosen"),
    [
        ([], None, [], None),
        ([], ONE, [], None),
        ([TWO], None, [], TWO),
        ([TWO], ONE, [], TWO),
        ([ONE, TWO], TWO, [], TWO),
        ([ONE, TWO], None, [], ONE),
        ([ONE], TWO, [ONE], None),
        ([ONE, TWO], TWO, [ONE], TWO),
    ],
)
def test_a_client_stays_with_the_past_that_it_knows(
    serving: list[Place], last: Place | None, left: list[Place], chosen: Place | None
) -> None:
    assert Trust(last, set(left)).choose(serving) == chosen


def test_a_node_that_was_left_is_used_again_only_after_it_was_seen_not_to_serve() -> None:
    trust = Trust()
    trust.moved(ONE)
    trust.moved(ONE)
    assert trust.choose([ONE]) == ONE
    before = trust.copy()
    trust.moved(TWO)
    assert trust.choose([ONE]) is None
    assert before.choose([ONE]) == ONE
    trust.seen_idle(ONE)
    assert trust.choose([ONE]) == ONE
    trust.moved(ONE)
    assert trust.choose([TWO]) is None


@pytest.mark.parametrize(
    ("error", "silent"),
    [
        (TimeoutError(), True),
        (OSError(errno.EHOSTUNREACH, ""), True),  # the machine is off, or its cable is cut
        (OSError(errno.ENETUNREACH, ""), True),
        (OSError(errno.ECONNREFUSED, ""), False),  # the machine is up, and its server is not
        (OSError(errno.ECONNRESET, ""), False),
        (OSError(errno.ENOENT, ""), False),  # a unix socket
    ],
)
def test_what_the_network_says_is_no_answer_of_the_server(error: OSError, silent: bool) -> None:
    assert finder.is_silence(error) == silent


@pytest.mark.parametrize(("size_bytes", "refused"), [(4096, True), (8191, True), (8192, False), (1 << 40, False)])
def test_a_device_does_not_shrink(size_bytes: int, refused: bool) -> None:
    sentence = places.too_small(ONE, size_bytes, "/dev/nbd0", 8192)
    assert (sentence is not None) == refused
    assert sentence is None or f"node1 (a:1) serves {size_bytes} bytes, but /dev/nbd0 has 8192" in sentence


def test_delays_grow_up_to_a_limit() -> None:
    delays, delay_s = [], 0.0
    for _ in range(7):
        delay_s = next_delay_s(delay_s)
        delays.append(delay_s)
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]


def test_the_watchdog_wants_two_silent_probes_in_a_row() -> None:
    watchdog = Watchdog()
    answers = [False, True, False, False]
    assert [watchdog.probed(answered=answer) for answer in answers] == [False, False, False, True]


def test_what_the_kernel_keeps_says_whose_the_device_is() -> None:
    backend = Backend("web-1", "r.0", bytes(range(16)), 4)
    assert str(backend) == "replica:web-1:r.0:000102030405060708090a0b0c0d0e0f:4"
    assert Backend.parse(str(backend)) == backend
    assert str(backend).startswith(places.backend_prefix("web-1", "r.0"))
    with pytest.raises(ValueError, match="other"):
        Backend.parse("other:a:b:00:1")


# ── the finder and real servers ──────────────────────────────────────────────────────────────────────────────────


class Refusing(FileExport):
    """A Secondary's."""

    def refusal(self) -> str | None:
        return "r0 is Secondary on node1."


def test_the_primary_is_found_and_opened(short_dir: Path) -> None:
    async def scenario() -> None:
        export = short_dir / "volume"
        export.touch()
        os.truncate(export, 1 << 20)
        here, there = Place("node1", unix_path=str(short_dir / "1")), Place("node2", unix_path=str(short_dir / "2"))
        gone, silent = Place("node1", unix_path=str(short_dir / "3")), Place("node1", unix_path=str(short_dir / "4"))
        file = BlockFile.open(export)
        secondary = Server(default=Refusing(file, name="r0"))
        primary = Server(default=FileExport(file, name="r0"))
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(silent.unix_path))
        listener.listen()
        await secondary.listen_unix(str(here.unix_path))
        await primary.listen_unix(str(there.unix_path))
        try:
            # One that is silent holds nobody up who does not need it.
            trust = Trust(last=silent)
            assert await asyncio.to_thread(finder.find, [silent, here, there], "r0", trust) == there
            assert trust == Trust(there, {silent})
            # One that answers, and does not serve, may be used again when it does.
            assert await asyncio.to_thread(finder.find, [here, there], "r0", moved := Trust(last=here)) == there
            assert moved == Trust(there, set())
            with pytest.raises(NobodyServes, match="a past that this client has left"):
                await asyncio.to_thread(finder.find, [here, there], "r0", Trust(here, {there}))
            with pytest.raises(NobodyServes, match=r"node1 .*is Secondary on node1; node1 .*No such file"):
                await asyncio.to_thread(finder.find, [here, gone], "r0", Trust(last=there))
            with pytest.raises(TimeoutError):
                await asyncio.to_thread(finder.ask, silent, "r0")
            for place, is_idle, answers in (
                (here, True, True),
                (there, False, True),
                (gone, True, True),
                (silent, False, False),
            ):
                assert await asyncio.to_thread(finder.is_idle, place, "r0") is is_idle
                assert await asyncio.to_thread(finder.answers, place, "r0") is answers
            first = await asyncio.to_thread(finder.open_links, there, "r0", ClientIdentity(b"c" * 16, 1), 2)
            assert [link.info.size_bytes for link in first] == [1 << 20] * 2
            assert not any(link.is_taken() for link in first)
            second = await asyncio.to_thread(finder.open_links, there, "r0", ClientIdentity(b"c" * 16, 2), 1)
            assert [link.socket.recv(1) for link in first] == [b"", b""]
            with pytest.raises(NobodyServes, match="newer connections"):
                await asyncio.to_thread(finder.open_links, there, "r0", ClientIdentity(b"c" * 16, 1), 1)
            assert second[0].place == there
            for link in (*first, *second):
                link.drop()
        finally:
            listener.close()
            primary.abort()
            secondary.abort()
            file.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))


def _not_known(place: Place, words: str) -> None:
    """It answers, and whether it serves is not known: a node that was left is not trusted for that."""
    trust = Trust(left={place})
    with pytest.raises(NobodyServes, match=words) as found:
        finder.find([place], "r0", trust)
    assert trust.left == {place}
    assert not finder.is_idle(place, "r0")
    assert finder.answers(place, "r0")
    assert "TLS" not in str(found.value)


def test_a_server_that_is_full_was_not_seen_not_to_serve(short_dir: Path) -> None:
    async def scenario() -> None:
        export = short_dir / "volume"
        export.touch()
        os.truncate(export, 1 << 20)
        file = BlockFile.open(export)
        server = Server(default=FileExport(file, name="r0"), limits=Limits(max_connections=1))
        place = Place("node1", unix_path=str(short_dir / "1"))
        await server.listen_unix(str(place.unix_path))
        try:
            links = await asyncio.to_thread(finder.open_links, place, "r0", ClientIdentity(b"c" * 16, 1), 1)
            await asyncio.to_thread(_not_known, place, "the server closed the connection during the handshake")
            links[0].drop()
        finally:
            server.abort()
            file.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))


@pytest.mark.parametrize(
    ("greeting", "reset"),
    [
        (b"", False),
        (b"NBDMAGICIHAVEOPT\x00\x03", False),
        (b"NBDMAGICIHAVEOPT\x00\x03", True),
        (b"HTTP/1.1 400 Bad Request\r\n", False),
    ],
)
def test_a_handshake_that_is_cut_off_says_nothing_of_the_node(short_dir: Path, greeting: bytes, reset: bool) -> None:
    place = Place("node1", unix_path=str(short_dir / "1"))
    words = {b"": "closed the connection|reset by peer", b"N": "closed the connection|reset by peer|Broken pipe"}

    def serve() -> None:
        with contextlib.suppress(OSError):  # the listener is shut down, or nobody takes the greeting
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(greeting)
                    if greeting[:1] == b"N":
                        # What was received and not read when a socket is closed makes a reset of that.
                        connection.recv(1 if reset else 1 << 16)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place.unix_path))
        listener.listen()
        server = threading.Thread(target=serve)
        server.start()
        try:
            _not_known(place, words.get(greeting[:1], "no NBD server"))
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            server.join()


def test_a_server_that_takes_no_more_connections_was_not_seen_not_to_serve(short_dir: Path) -> None:
    place = Place("node1", unix_path=str(short_dir / "1"))
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(place.unix_path))
        listener.listen(0)
        first.connect(str(place.unix_path))
        _not_known(place, "Resource temporarily unavailable")
