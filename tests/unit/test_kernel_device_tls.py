"""The kernel device and TLS, without a kernel: who is believed, and what the relay makes of a connection's ends."""

import asyncio
import contextlib
import os
import random
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nbdserver import constants as c
from nbdserver.client_identity import ClientIdentity
from nbdserver.handshake import TlsMode
from nbdserver.server import Server
from nbdserver.tls import TlsFiles, server_tls
from replica.config import ConfigError, load_config
from replica.errors import ReplicaError
from replica.kernel_device import finder, relay
from replica.kernel_device.finder import Link, NobodyServes
from replica.kernel_device.places import Place, Trust, places
from replica.nbd_client_tls import ClientTls
from replica.nbd_handshake import NbdUnproven, Shaker
from tests.certificates import Authority
from tests.raw_nbd import DISC, READ, WRITE, RawClient, request
from tests.unit.nbd_bench import MIB, SIZE, MemoryDisk
from tests.unit.scripted_daemon import replicactl

_PATIENCE_S = 20
MakeConfig = Callable[..., Path]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def node1(authority: Authority) -> TlsFiles:
    return authority.files("node1", "node1")


@pytest.fixture(scope="module")
def laptop(authority: Authority) -> ClientTls:
    own = authority.files("laptop", server=False)
    return ClientTls(authority.ca, own.cert, own.key)


class Running:
    """A real server on a loop in a thread of its own: what is tested blocks."""

    def __init__(self, path: str, files: TlsFiles | None, mode: TlsMode = TlsMode.REQUIRE) -> None:
        self.path = path
        self.disk = MemoryDisk("r0")
        self._tls = None if files is None else server_tls(mode, files)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> "Running":
        self._thread.start()
        self.do(self._listen())
        return self

    async def _listen(self) -> None:
        self.server = Server(default=self.disk, tls=self._tls)
        await self.server.listen_unix(self.path)

    def do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_PATIENCE_S)

    async def kill(self) -> None:
        """Every connection breaks off."""
        connections = list(self.server.connections)
        self.server.abort()
        for connection in connections:
            await connection.closed.wait()

    def __exit__(self, *reason: object) -> None:
        self.do(self.kill())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE_S)
        self._loop.close()

    def place(self, tls: ClientTls | None, node: str = "node1") -> Place:
        return Place(node, unix_path=self.path, tls=tls)


@contextlib.contextmanager
def opened(server: Running, tls: ClientTls, generation: int = 1) -> Iterator[Link]:
    """One connection as the kernel would be given it."""
    (link,) = finder.open_links(server.place(tls), "r0", ClientIdentity(b"k" * 16, generation), 1)
    try:
        yield link
    finally:
        link.drop()


def raw(connection: socket.socket) -> RawClient:
    """Over a socket that is there."""
    return RawClient(lambda: connection)


def has_ended(connection: socket.socket) -> bool:
    """Waits until it has."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(_PATIENCE_S * 1000))


def no_relay_is_left() -> bool:
    """Waits until all have ended."""
    for thread in threading.enumerate():
        if thread.name.startswith("relay to "):
            thread.join(_PATIENCE_S)
    return not any(thread.name.startswith("relay to ") for thread in threading.enumerate())


# ── the relay ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_written_through_it_is_there_and_comes_back(
    short_dir: Path, node1: TlsFiles, laptop: ClientTls, rng: random.Random
) -> None:
    pieces, at = [], 0
    while at < SIZE // 2:
        length = min(rng.randint(1, 300_000), SIZE // 2 - at)
        pieces.append((at, rng.randbytes(length)))
        at += length
    with Running(f"{short_dir}/1", node1) as server, opened(server, laptop) as link:
        assert link.info.size_bytes == SIZE
        assert not isinstance(link.socket, ssl.SSLSocket)

        def exchange(requests: list[bytes], lengths: dict[int, int]) -> dict[int, bytes]:
            """All of them at once, while the replies are taken."""
            sender = threading.Thread(target=link.socket.sendall, args=(b"".join(requests),))
            sender.start()
            found = {}
            for _ in requests:
                magic, error, cookie = struct.unpack(">IIQ", raw(link.socket).receive(16))
                assert (magic, error) == (c.SIMPLE_REPLY_MAGIC, 0)
                found[cookie] = raw(link.socket).receive(lengths.get(cookie, 0))
            sender.join(_PATIENCE_S)
            return found

        exchange([request(WRITE, at, at, data=data) for at, data in pieces], {})
        assert all(server.disk.data[at : at + len(data)] == data for at, data in pieces)
        # Both directions at once: the first half is read while the second is written.
        half = SIZE // 2
        both = [
            one
            for at, data in pieces
            for one in (request(READ, at, at, len(data)), request(WRITE, half + at, half + at, data=data))
        ]
        found = exchange(both, {at: len(data) for at, data in pieces})
        assert all(found[at] == data for at, data in pieces)
        assert server.disk.data[:half] == server.disk.data[half:]
    assert no_relay_is_left()


def test_a_server_that_drains_has_its_replies_delivered(short_dir: Path, node1: TlsFiles, laptop: ClientTls) -> None:
    with Running(f"{short_dir}/1", node1) as server, opened(server, laptop) as link:
        server.disk.hold = True
        link.socket.sendall(b"".join(request(WRITE, n, n * 4096, data=b"x" * 4096) for n in range(8)))

        async def drain() -> None:
            await server.disk.until(lambda: server.disk.held_bytes == 8 * 4096)
            draining = asyncio.ensure_future(server.server.drain())
            server.disk.hold = False
            server.disk.release()
            await draining

        server.do(drain())
        assert {raw(link.socket).reply()[:2] for _ in range(8)} == {(n, 0) for n in range(8)}
        assert link.socket.recv(1) == b""
    assert no_relay_is_left()


def test_the_kernels_end_hangs_up_when_the_server_is_gone(short_dir: Path, node1: TlsFiles, laptop: ClientTls) -> None:
    with Running(f"{short_dir}/1", node1) as server, opened(server, laptop) as link:
        server.do(server.kill())
        assert has_ended(link.socket)
    assert no_relay_is_left()


def test_what_the_kernel_sent_before_it_hung_up_arrives(short_dir: Path, node1: TlsFiles, laptop: ClientTls) -> None:
    with Running(f"{short_dir}/1", node1) as server:
        with opened(server, laptop) as link:
            link.socket.sendall(request(WRITE, 1, 0, data=b"last" * (MIB // 4)) + request(DISC, 2))
        server.do(server.disk.until(lambda: not server.disk.clients))
        assert server.disk.data[:MIB] == b"last" * (MIB // 4)
    assert no_relay_is_left()


def test_a_frozen_server_holds_no_relay_and_executes_nothing_that_was_replaced(
    short_dir: Path, node1: TlsFiles, laptop: ClientTls
) -> None:
    file = short_dir / "volume"
    file.touch()
    os.truncate(file, MIB)
    assert node1.ca is not None
    command = [sys.executable, "-m", "nbdserver", file, "--unix", short_dir / "1", "--export", "r0", "--tls", "require"]
    command += ["--tls-cert", node1.cert, "--tls-key", node1.key, "--tls-ca", node1.ca]
    place = Place("node1", unix_path=f"{short_dir}/1", tls=laptop)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            server.stdout.readline()
            (old,) = finder.open_links(place, "r0", ClientIdentity(b"k" * 16, 1), 1)
            server.send_signal(signal.SIGSTOP)
            stale = request(WRITE, 1, 0, data=b"old!" * 1024)
            assert raw(old.socket).push(stale, times=1024) < 1024  # until nobody takes any more
            old.drop()
            assert no_relay_is_left()
            server.send_signal(signal.SIGCONT)
            (new,) = finder.open_links(place, "r0", ClientIdentity(b"k" * 16, 2), 1)
            new.socket.sendall(request(WRITE, 1, 0, data=b"new!" * 1024))
            assert raw(new.socket).reply() == (1, 0, b"")
            new.socket.sendall(request(READ, 2, 0, 4096))
            assert raw(new.socket).reply(4096) == (2, 0, b"new!" * 1024)
            new.drop()
        finally:
            server.kill()
    assert file.read_bytes()[:4096] == b"new!" * 1024


def shaken(node1: TlsFiles, laptop: ClientTls) -> tuple[ssl.SSLSocket, ssl.SSLSocket]:
    """The client's and the server's end of a connection."""
    theirs, ours = socket.socketpair()
    context = server_tls(TlsMode.REQUIRE, node1).context
    found: list[ssl.SSLSocket] = []
    server = threading.Thread(target=lambda: found.append(context.wrap_socket(theirs, server_side=True)))
    server.start()
    client = laptop.context().wrap_socket(ours)
    server.join(_PATIENCE_S)
    return client, found[0]


@contextlib.contextmanager
def relayed(node1: TlsFiles, laptop: ClientTls) -> Iterator[tuple[socket.socket, ssl.SSLSocket]]:
    """The kernel's end of a relay, and the server's of the connection behind it."""
    client, server = shaken(node1, laptop)
    with relay.start(client, "node1") as kernel, server:
        yield kernel, server
    assert no_relay_is_left()


def test_broken_records_end_the_connection(
    node1: TlsFiles, laptop: ClientTls, caplog: pytest.LogCaptureFixture
) -> None:
    with relayed(node1, laptop) as (kernel, server):
        server.sendall(b"good")
        assert raw(kernel).receive(4) == b"good"
        socket.socket.send(server, b"\x17\x03\x03\x00\x20" + bytes(32))
        assert kernel.recv(1) == b""
    assert "TLS with node1 was broken: " in caplog.text


def test_replies_of_a_server_that_takes_nothing_more_arrive(node1: TlsFiles, laptop: ClientTls) -> None:
    with relayed(node1, laptop) as (kernel, server):
        socket.socket.shutdown(server, socket.SHUT_RD)
        # More than the kernel's end holds, so that the relay still has some of it when it finds nobody to send to.
        replies = bytes(8) * (1 << 16)
        sender = threading.Thread(target=lambda: (server.sendall(replies), server.close()))
        sender.start()
        poll = select.poll()
        poll.register(kernel, select.POLLIN)
        assert poll.poll(_PATIENCE_S * 1000)
        kernel.sendall(b"request")
        assert raw(kernel).receive(len(replies)) == replies
        assert has_ended(kernel)
        sender.join(_PATIENCE_S)


def test_one_direction_that_is_full_does_not_hold_the_other(
    node1: TlsFiles, laptop: ClientTls, rng: random.Random
) -> None:
    requests, replies = rng.randbytes(8 * MIB), rng.randbytes(8 * MIB)  # more than is held on the way
    with ThreadPoolExecutor() as pool, relayed(node1, laptop) as (kernel, server):
        server.settimeout(_PATIENCE_S)
        # The server takes nothing, and all of its replies arrive.
        sending = pool.submit(kernel.sendall, requests)
        receiving = pool.submit(raw(kernel).receive, len(replies))
        server.sendall(replies)
        assert receiving.result(_PATIENCE_S) == replies
        assert not sending.done()
        assert raw(server).receive(len(requests)) == requests
        # The kernel takes nothing, and all of its requests arrive.
        sending = pool.submit(kernel.sendall, requests)
        server.setblocking(False)
        received, sent = bytearray(), 0
        poll = select.poll()
        poll.register(server, select.POLLIN)
        while len(received) < len(requests):
            with contextlib.suppress(ssl.SSLWantWriteError):
                while sent < len(replies):
                    sent += server.send(replies[sent : sent + (64 << 10)])
            with contextlib.suppress(ssl.SSLWantReadError):
                while data := server.recv(1 << 20):
                    received += data
            assert len(received) == len(requests) or poll.poll(_PATIENCE_S * 1000)
        assert received == requests
        assert 0 < sent < len(replies)
        sending.result(_PATIENCE_S)


# ── who is believed ──────────────────────────────────────────────────────────────────────────────────────────────


def refused(place: Place) -> str:
    """Why; and nothing was sent in plain, and the node does not pass for one that was seen not to serve."""
    trust = Trust(left={place})
    with pytest.raises(NobodyServes) as found:
        finder.find([place], "r0", trust)
    with pytest.raises(NobodyServes) as opening:
        finder.open_links(place, "r0", ClientIdentity(b"k" * 16, 1), 1)
    assert str(found.value) == str(opening.value)
    assert trust.left == {place}
    assert not finder.is_idle(place, "r0")
    assert finder.answers(place, "r0")
    sentence = str(found.value)
    assert sentence.isprintable()
    assert "promote a node, or mend TLS between it and this machine" in sentence
    return sentence


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("authority", "its certificate is refused (self-signed certificate in certificate chain)"),
        ("expired", "its certificate is refused (certificate has expired)"),
        ("name", "the server did not show node1's certificate: it is for node2, www.test"),
        ("client", "the server did not show node1's certificate: it is for nobody"),
        ("plain", "the server does not offer TLS, and without it nothing is sent"),
    ],
)
def test_a_server_that_does_not_prove_to_be_the_node(
    short_dir: Path, authority: Authority, laptop: ClientTls, wrong: str, words: str
) -> None:
    files = {
        "authority": lambda: Authority(short_dir / "other").files("node1", "node1"),
        "expired": lambda: authority.files("node1-expired", "node1", expired=True),
        "name": lambda: authority.files("node2", "node2", "www.test"),
        "client": lambda: authority.files("nobody", server=True),
        "plain": lambda: None,
    }[wrong]()
    with Running(f"{short_dir}/1", files) as server:
        assert words in refused(server.place(laptop))
        assert server.disk.calls == []


@pytest.mark.parametrize(
    ("who", "words"),
    [
        ("nobody", "it refused this side's certificate (certificate required)"),
        ("stranger", "it refused this side's certificate (unknown ca)"),
        ("expired", "it refused this side's certificate (certificate expired)"),
        ("plain", "this server serves only clients that use TLS"),
    ],
)
def test_a_client_that_the_server_refuses(
    short_dir: Path, authority: Authority, node1: TlsFiles, who: str, words: str
) -> None:
    def client() -> ClientTls | None:
        if who == "plain":
            return None
        if who == "nobody":
            return ClientTls(authority.ca)
        other = authority if who == "expired" else Authority(short_dir / "other")
        own = other.files(f"{who}-client", server=False, expired=who == "expired")
        return ClientTls(authority.ca, own.cert, own.key)

    with Running(f"{short_dir}/1", node1) as server:
        assert words in refused(server.place(client()))


@pytest.mark.parametrize(
    ("says", "words"),
    [
        (b"", "the server closed the connection during the TLS handshake"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "TLS failed (wrong version number)"),
        (b"\x15\x03\x03\x00\x02\x02\x28", "it refused the connection (handshake failure)"),
    ],
)
@pytest.mark.parametrize("reset", [False, True])
def test_a_server_that_ends_in_the_tls_handshake(
    short_dir: Path, laptop: ClientTls, says: bytes, words: str, reset: bool
) -> None:
    path = f"{short_dir}/1"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            for _ in range(4):
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(b"NBDMAGICIHAVEOPT\x00\x03")
                    raw(connection).receive(4 + 16)
                    connection.sendall(struct.pack(">QIII", c.OPTION_REPLY_MAGIC, c.OPT_STARTTLS, c.REP_ACK, 0))
                    if not reset:  # what is unread when it is closed makes a reset of it
                        connection.recv(1 << 16)
                    else:
                        connection.recv(1)
                    connection.sendall(says)

        server = threading.Thread(target=serve)
        server.start()
        sentence = refused(Place("node1", unix_path=path, tls=laptop))
        server.join(_PATIENCE_S)
        assert words in sentence


@pytest.mark.parametrize("when", ["before TLS", "in TLS"])
@pytest.mark.parametrize("reset", [False, True])
def test_an_end_of_the_connection_says_nothing_of_the_node(
    short_dir: Path, node1: TlsFiles, laptop: ClientTls, when: str, reset: bool
) -> None:
    path = f"{short_dir}/1"
    context = server_tls(TlsMode.REQUIRE, node1).context

    def serve() -> None:
        for _ in range(4):
            connection, _ = listener.accept()
            connection.sendall(b"NBDMAGICIHAVEOPT\x00\x03")
            raw(connection).receive(4)
            if when == "in TLS":
                raw(connection).receive(16)
                connection.sendall(struct.pack(">QIII", c.OPTION_REPLY_MAGIC, c.OPT_STARTTLS, c.REP_ACK, 0))
                connection = context.wrap_socket(connection, server_side=True)
            # What was received and not read when a socket is closed makes a reset of that.
            if reset:
                select.select([connection], [], [], _PATIENCE_S)
            else:
                connection.recv(1 << 16)
            connection.close()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        server = threading.Thread(target=serve)
        server.start()
        sentence = refused(Place("node1", unix_path=path, tls=laptop))
        # OpenSSL takes some resets for ends.
        assert "the server closed the connection during the handshake" in sentence or (
            reset and "Connection reset by peer" in sentence
        )
        server.join(_PATIENCE_S)


def test_a_server_that_takes_nothing_more_in_tls(node1: TlsFiles, laptop: ClientTls) -> None:
    client, server = shaken(node1, laptop)
    with server, Shaker(client, _PATIENCE_S) as shaker:
        socket.socket.shutdown(server, socket.SHUT_RD)
        with pytest.raises(NbdUnproven, match=r"^the server closed the connection during the handshake$"):
            shaker.info("r0")


def test_a_client_without_a_certificate_where_none_is_asked_for(
    short_dir: Path, authority: Authority, node1: TlsFiles
) -> None:
    open_to_all = TlsFiles(node1.cert, node1.key)
    with (
        Running(f"{short_dir}/1", open_to_all, TlsMode.ALLOW) as server,
        opened(server, ClientTls(authority.ca)) as link,
    ):
        link.socket.sendall(request(READ, 1, 0, 512))
        assert raw(link.socket).reply(512) == (1, 0, bytes(512))
        assert any(thread.name == f"relay to node1 ({server.path}, TLS)" for thread in threading.enumerate())
    assert no_relay_is_left()


def test_renewed_certificates_are_taken_at_the_next_connection(
    short_dir: Path, authority: Authority, node1: TlsFiles
) -> None:
    own = authority.files("renewed", server=False, expired=True)
    tls = ClientTls(authority.ca, own.cert, own.key)
    with Running(f"{short_dir}/1", node1) as server:
        assert "certificate expired" in refused(server.place(tls))
        own.cert.rename(short_dir / "gone")
        with pytest.raises(NbdUnproven, match=r"renewed\.crt or .*renewed\.key cannot be read"):
            finder.ask(server.place(tls), "r0")
        authority.files("renewed", server=False)
        with opened(server, tls):
            pass
    assert no_relay_is_left()


# ── which files ──────────────────────────────────────────────────────────────────────────────────────────────────

NBD_TLS = 'nbd-tls = { mode = "allow", cert = "%n.crt", key = "%n.key", ca = "ca.crt" }\n'
WITHOUT_CA = 'nbd-tls = { mode = "require", cert = "%n.crt", key = "%n.key" }\n'
CLIENT_TLS = 'client-tls = { ca = "c/ca.crt", cert = "c/%n.crt", key = "c/%n.key" }\n'
GIVEN = ClientTls(Path("/given"))


@pytest.mark.parametrize(
    ("node", "nbd_tls", "cluster", "given", "expected"),
    [
        ("node2", "", "", None, None),
        ("node2", "", CLIENT_TLS, None, None),
        ("node2", "", "", GIVEN, GIVEN),
        ("node2", NBD_TLS, CLIENT_TLS, None, ("ca.crt", "node2.crt", "node2.key")),
        ("node2", NBD_TLS, CLIENT_TLS, GIVEN, GIVEN),
        ("node2", WITHOUT_CA, CLIENT_TLS, None, ("c/ca.crt", "c/node2.crt", "c/node2.key")),
        (None, NBD_TLS, CLIENT_TLS, None, ("c/ca.crt", "c/laptop.crt", "c/laptop.key")),
        (None, NBD_TLS, 'client-tls = { ca = "ca.crt" }\n', None, ("ca.crt", None, None)),
        (None, NBD_TLS, "", GIVEN, GIVEN),
    ],
)
def test_which_files_are_used(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    node: str | None,
    nbd_tls: str,
    cluster: str,
    given: ClientTls | None,
    expected: tuple[str | None, ...] | ClientTls | None,
) -> None:
    monkeypatch.setenv("REPLICA_NODE", "laptop")
    file = with_lines(make_config(), nbd_tls, cluster)
    config = load_config(file, node, need_secret=False, may_be_client=True)
    if isinstance(expected, tuple):
        expected = ClientTls(*(name and file.parent / name for name in expected))
    assert [place.tls for place in places(config, config.resource(), given)] == [expected] * 2


def with_lines(file: Path, nbd_tls: str, cluster: str) -> Path:
    text = file.read_text().replace("[cluster]\n", "[cluster]\n" + cluster)
    file.write_text(text.replace("[resource.r0]\n", "[resource.r0]\n" + nbd_tls))
    return file


@pytest.mark.parametrize(("node", "nbd_tls"), [(None, NBD_TLS), ("node1", WITHOUT_CA)])
def test_without_an_authority_nothing_is_sent_in_plain(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, node: str | None, nbd_tls: str
) -> None:
    monkeypatch.setenv("REPLICA_NODE", "laptop")
    config = load_config(with_lines(make_config(), nbd_tls, ""), node, need_secret=False, may_be_client=True)
    with pytest.raises(ReplicaError, match=r"by which authority: name its file with --tls-ca, or in `client-tls`"):
        places(config, config.resource())


def test_an_address_that_moves_with_the_primary_is_of_both_nodes(make_config: MakeConfig) -> None:
    file = with_lines(make_config(), NBD_TLS, "")
    file.write_text(file.read_text().replace('nbd = "unix:r0-2.nbd"', 'nbd = "unix:r0.nbd"'))
    config = load_config(file, "node1", need_secret=False)
    assert [place.node for place in places(config, config.resource())] == ["node1", "node2"]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ('"ca.crt"', "must be a table such as"),
        ('{ cert = "a", key = "b" }', "needs ca: by it clients know the nodes"),
        ('{ ca = "a", key = "b" }', "needs cert and key, or neither"),
        ('{ ca = "a", mode = "allow" }', "has no key 'mode'"),
        ("{ ca = 1 }", "ca must be the path of a file"),
    ],
)
def test_wrong_tables_are_one_sentence(make_config: MakeConfig, table: str, words: str) -> None:
    file = with_lines(make_config(), "", f"client-tls = {table}\n")
    with pytest.raises(ConfigError, match=r"replica\.toml:2: cluster.client-tls: ") as caught:
        load_config(file, "node1", need_secret=False)
    assert words in str(caught.value)


@pytest.mark.root
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tls-ca", "none.crt"], "none.crt cannot be read (No such file or directory)"),
        (["--tls-cert", "a", "--tls-ca", "b"], "--tls-cert and --tls-key belong together"),
        (["--tls-cert", "a", "--tls-key", "b"], "--tls-cert needs --tls-ca, too"),
        (["--tls-ca", "CA", "--tls-cert", "EXPIRED.crt", "--tls-key", "EXPIRED.key"], "has expired, on "),
        ([], "name its file with --tls-ca"),
    ],
)
def test_wrong_files_are_one_sentence(
    make_config: MakeConfig, authority: Authority, options: list[str], words: str
) -> None:
    if os.geteuid() != 0:
        pytest.skip("takes root")
    expired = authority.files("expired", server=False, expired=True)
    paths = {"CA": str(authority.ca), "EXPIRED.crt": str(expired.cert), "EXPIRED.key": str(expired.key)}
    file = with_lines(make_config(), WITHOUT_CA, "")
    done = replicactl("map", "r0", *(paths.get(each, each) for each in options), "--config", file)
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
