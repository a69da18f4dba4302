"""STARTTLS over raw sockets, on both event loops; and the files of TLS."""

import asyncio
import contextlib
import os
import socket
import ssl
import struct
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from nbdserver import constants as c
from nbdserver.handshake import Ended, Handshake, StartTls, TlsMode
from nbdserver.limits import Limits
from nbdserver.tls import TlsFileError, TlsFiles, server_tls
from tests.certificates import Authority
from tests.unit.nbd_bench import MIB, Client, request, write

CLIENT_FLAGS = struct.pack(">I", 3)
HOST = "server.test"


def option(number: int, data: bytes = b"") -> bytes:
    return struct.pack(">QII", c.OPTION_MAGIC, number, len(data)) + data


def go(name: bytes = b"") -> bytes:
    return option(c.OPT_GO, struct.pack(">I", len(name)) + name + b"\0\0")


class TlsClient(Client):
    """A client that may switch to TLS."""

    @classmethod
    async def greet(cls, path, **options):
        reader, writer = await asyncio.open_unix_connection(path, **options)
        assert await reader.readexactly(18) == b"NBDMAGICIHAVEOPT\x00\x03"
        writer.write(CLIENT_FLAGS)
        return cls(reader, writer)

    async def option_replies(self, number):
        """The kinds (and data) of the replies to one option, up to the last."""
        found = []
        while True:
            magic, option_, kind, length = struct.unpack(">QIII", await self.reader.readexactly(20))
            assert (magic, option_) == (c.OPTION_REPLY_MAGIC, number)
            found.append((kind, await self.reader.readexactly(length)))
            if kind == c.REP_ACK or kind >> 31:
                return found

    async def ask(self, number, data=b""):
        self.send(option(number, data))
        return [kind for kind, _ in await self.option_replies(number)]

    async def start_tls(self, context):
        assert await self.ask(c.OPT_STARTTLS) == [c.REP_ACK]
        await self.writer.start_tls(context, server_hostname=HOST)

    async def open(self):
        self.send(go())
        replies = await self.option_replies(c.OPT_GO)
        assert [kind for kind, _ in replies] == [c.REP_INFO, c.REP_ACK]
        return self

    async def secure(self, context):
        await self.start_tls(context)
        return await self.open()


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def files(authority):
    return authority.files("server", HOST)


@pytest.fixture(scope="module")
def trusted(authority):
    """The context of a client that has a certificate of the server's CA."""
    return client_context(authority, authority.files("client", server=False))


def client_context(authority, own=None):
    context = ssl.create_default_context(cafile=str(authority.ca))
    if own is not None:
        context.load_cert_chain(own.cert, own.key)
    return context


@pytest.fixture
def run(run, files):
    """The same for a server with TLS."""

    def runner(scenario, mode=TlsMode.REQUIRE, server_files=files, **options):
        run(scenario, tls=None if mode is TlsMode.OFF else server_tls(mode, server_files), **options)

    return runner


class ByHand:
    """A client whose records the test sends and takes itself, in pieces of `most` bytes."""

    def __init__(self, reader, writer, context, most):
        self.reader, self.writer, self.most = reader, writer, most
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=HOST)

    @classmethod
    async def start(cls, path, context, most=64 * 1024):
        """Up to where TLS begins."""
        reader, writer = await asyncio.open_unix_connection(path)
        await reader.readexactly(18)
        writer.write(CLIENT_FLAGS + option(c.OPT_STARTTLS))
        await reader.readexactly(20)
        return cls(reader, writer, context, most)

    async def step(self, call, *arguments):
        while True:
            try:
                return call(*arguments)
            except ssl.SSLWantReadError:
                pass
            finally:
                while self.outgoing.pending:
                    self.writer.write(self.outgoing.read(self.most))
                    await asyncio.sleep(0)
            data = await self.reader.read(self.most)
            self.incoming.write(data) if data else self.incoming.write_eof()


APPLICATION_DATA, HANDSHAKE = 23, 22


class SendingKeys:
    """A client's half of TLS 1.3 after the handshake (RFC 8446, sections 5.2 and 7): it makes records by itself."""

    def __init__(self, secret, algorithm, key_bytes):
        self.secret, self.algorithm, self.key_bytes = secret, algorithm, key_bytes
        self._renew()

    @classmethod
    def of(cls, tls, key_log):
        (secret,) = (line.split()[2] for line in key_log.read_text().splitlines() if "CLIENT_TRAFFIC_SECRET_0" in line)
        algorithm, key_bytes = {
            "TLS_AES_128_GCM_SHA256": (hashes.SHA256(), 16),
            "TLS_AES_256_GCM_SHA384": (hashes.SHA384(), 32),
        }[tls.cipher()[0]]
        return cls(bytes.fromhex(secret), algorithm, key_bytes)

    def _expand(self, label, length):
        label = b"tls13 " + label
        info = struct.pack(">HB", length, len(label)) + label + b"\0"
        return HKDFExpand(self.algorithm, length, info).derive(self.secret)

    def _renew(self):
        self.aead = AESGCM(self._expand(b"key", self.key_bytes))
        self.iv, self.sent = int.from_bytes(self._expand(b"iv", 12), "big"), 0

    def seal(self, data, kind):
        head = struct.pack(">BHH", APPLICATION_DATA, 0x0303, len(data) + 1 + 16)
        nonce = (self.iv ^ self.sent).to_bytes(12, "big")
        self.sent += 1
        return head + self.aead.encrypt(nonce, data + bytes([kind]), head)

    def update(self):
        """A KeyUpdate that asks for one in return."""
        record = self.seal(b"\x18\x00\x00\x01\x01", HANDSHAKE)
        self.secret = self._expand(b"traffic upd", self.algorithm.digest_size)
        self._renew()
        return record


# ── the rules of STARTTLS ────────────────────────────────────────────────────────────────────────────────────────


def test_a_client_with_a_certificate_reads_and_writes(run, trusted):
    async def scenario(bench):
        client = await (await TlsClient.greet(bench.path)).secure(trusted)
        data = os.urandom(3 * MIB)
        client.send(write(1, 4096, data))
        assert await client.reply() == (1, 0, b"")
        client.send(*(request(c.CMD_READ, n, 4096 + n * MIB, MIB) for n in range(3)))
        for n in range(3):
            assert await client.reply(MIB) == (n, 0, data[n * MIB : (n + 1) * MIB])
        client.send(request(c.CMD_DISC, 9))
        assert await client.ended()
        client.writer.close()

    run(scenario)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=lambda v: v.name)
def test_versions(run, authority, version):
    context = client_context(authority, authority.files("client", server=False))
    context.minimum_version = context.maximum_version = version

    async def scenario(bench):
        client = await (await TlsClient.greet(bench.path)).secure(context)
        client.send(write(1, 0, b"x" * 4096), request(c.CMD_READ, 2, 0, 4096))
        assert [await client.reply(), await client.reply(4096)] == [(1, 0, b""), (2, 0, b"x" * 4096)]
        client.writer.close()

    run(scenario)


def test_off_knows_no_tls(run):
    async def scenario(bench):
        client = await TlsClient.greet(bench.path)
        assert await client.ask(c.OPT_STARTTLS) == [c.REP_ERR_UNSUP]
        await client.open()
        client.writer.close()

    run(scenario, TlsMode.OFF)


def test_allow_serves_both(run, trusted):
    async def scenario(bench):
        plain = await (await TlsClient.greet(bench.path)).open()
        secured = await (await TlsClient.greet(bench.path)).secure(trusted)
        plain.send(write(1, 0, b"p" * 4096))
        assert await plain.reply() == (1, 0, b"")
        secured.send(request(c.CMD_READ, 2, 0, 4096))
        assert await secured.reply(4096) == (2, 0, b"p" * 4096)
        for client in (plain, secured):
            client.writer.close()

    run(scenario, TlsMode.ALLOW)


def test_require_answers_nothing_else_before(run, trusted):
    async def scenario(bench):
        client = await TlsClient.greet(bench.path)
        for number in (c.OPT_LIST, c.OPT_INFO, c.OPT_GO, c.OPT_STRUCTURED_REPLY, c.OPT_SET_META_CONTEXT, 99):
            client.send(option(number))
            ((kind, text),) = await client.option_replies(number)
            assert (kind, text) == (c.REP_ERR_TLS_REQD, b"this server serves only clients that use TLS")
        await client.secure(trusted)
        client.writer.close()

        leaving = await TlsClient.greet(bench.path)
        assert await leaving.ask(c.OPT_ABORT) == [c.REP_ACK]
        assert await leaving.ended()
        leaving.writer.close()

        old = await TlsClient.greet(bench.path)
        old.send(option(c.OPT_EXPORT_NAME))
        assert await old.ended()
        old.writer.close()
        assert bench.disk.calls.count(("opened",)) == 1

    run(scenario)


def test_data_with_starttls_is_invalid(run, trusted):
    async def scenario(bench):
        client = await TlsClient.greet(bench.path)
        assert await client.ask(c.OPT_STARTTLS, b"x") == [c.REP_ERR_INVALID]
        await client.secure(trusted)
        client.writer.close()

    run(scenario)


def test_a_second_starttls_is_invalid(run, trusted):
    async def scenario(bench):
        client = await TlsClient.greet(bench.path)
        await client.start_tls(trusted)
        assert await client.ask(c.OPT_STARTTLS) == [c.REP_ERR_INVALID]
        await client.open()
        client.writer.close()

    run(scenario)


@pytest.mark.parametrize("mode", [TlsMode.ALLOW, TlsMode.REQUIRE])
@pytest.mark.parametrize("behind", [b"I", option(c.OPT_LIST), go() + request(c.CMD_READ, 1, 0, 512)])
def test_what_is_injected_behind_starttls_ends_the_connection(run, caplog, mode, behind):
    """CVE-2021-3716: it would otherwise be executed as if it had come through TLS."""

    async def scenario(bench):
        client = await TlsClient.greet(bench.path)
        client.send(option(c.OPT_STARTTLS) + behind)
        assert await client.ended()
        client.writer.close()
        assert bench.disk.calls == []

    caplog.set_level("INFO")
    run(scenario, mode)
    assert "it sent something behind STARTTLS before that was answered" in caplog.text


def test_plain_data_after_the_answer_is_no_tls(run, caplog):
    async def scenario(bench):
        client = await TlsClient.greet(bench.path)
        assert await client.ask(c.OPT_STARTTLS) == [c.REP_ACK]
        client.send(go())
        assert await client.ended()
        client.writer.close()
        assert bench.disk.calls == []

    run(scenario, TlsMode.ALLOW)
    assert "what it sent is not TLS" in caplog.text


class _Directory:
    shutting_down = False

    def find(self, name):
        return None

    def listing(self):
        return ()


def test_nothing_negotiated_before_is_left_inside():
    plain = Handshake(_Directory(), TlsMode.ALLOW)
    plain.feed(CLIENT_FLAGS + option(c.OPT_LIST) + option(c.OPT_STRUCTURED_REPLY))
    plain.feed(option(c.OPT_STARTTLS))
    assert isinstance(plain.outcome, StartTls)
    inside, fresh = plain.secured(), Handshake(_Directory(), TlsMode.ALLOW)
    fresh.feed(CLIENT_FLAGS)
    kept = {"_handlers", "_is_secured", "_options_seen", "_directory"}
    assert {k: v for k, v in vars(inside).items() if k not in kept} == {
        k: v for k, v in vars(fresh).items() if k not in kept
    }


def test_the_number_of_options_is_bounded_over_both():
    plain = Handshake(_Directory(), TlsMode.ALLOW)
    plain.feed(CLIENT_FLAGS + option(c.OPT_LIST) * (c.MAX_OPTIONS - 1))
    plain.feed(option(c.OPT_STARTTLS))
    inside = plain.secured()
    inside.feed(option(c.OPT_LIST))
    assert isinstance(inside.outcome, Ended)


# ── certificates of clients ──────────────────────────────────────────────────────────────────────────────────────


async def refused(bench, context):
    """The client gets as far as TLS, and is sent away with an alert that says why."""
    client = await TlsClient.greet(bench.path)
    assert await client.ask(c.OPT_STARTTLS) == [c.REP_ACK]
    with pytest.raises(ssl.SSLError) as caught:
        await client.writer.start_tls(context, server_hostname=HOST)
        client.send(go())  # with TLS 1.3, the client learns what becomes of its certificate afterwards
        while await client.reader.read(1000):
            pass
        raise AssertionError("it was closed without a word")
    client.writer.close()
    assert bench.disk.calls == []
    return caught.value.reason


def test_a_client_without_a_certificate_is_refused(run, authority, caplog):
    async def scenario(bench):
        assert "CERTIFICATE_REQUIRED" in await refused(bench, client_context(authority))

    run(scenario)
    assert "it showed no certificate" in caplog.text


def test_a_client_of_another_ca_is_refused(run, authority, tmp_path, caplog):
    stranger = Authority(tmp_path / "other").files("client", server=False)

    async def scenario(bench):
        assert "UNKNOWN_CA" in await refused(bench, client_context(authority, stranger))

    run(scenario)
    assert "its certificate is refused (unable to get local issuer certificate)" in caplog.text


def test_an_expired_client_is_refused(run, authority, caplog):
    old = authority.files("old", server=False, expired=True)

    async def scenario(bench):
        assert "EXPIRED" in await refused(bench, client_context(authority, old))

    run(scenario)
    assert "its certificate is refused (certificate has expired)" in caplog.text


def test_without_a_ca_any_client_is_welcome(run, authority, files):
    async def scenario(bench):
        client = await (await TlsClient.greet(bench.path)).secure(client_context(authority))
        client.writer.close()

    run(scenario, server_files=TlsFiles(files.cert, files.key))


def test_a_client_that_does_not_trust_the_server_says_so(run, tmp_path, caplog):
    async def scenario(bench):
        client = await TlsClient.greet(bench.path)
        assert await client.ask(c.OPT_STARTTLS) == [c.REP_ACK]
        with pytest.raises(ssl.SSLCertVerificationError):
            await client.writer.start_tls(client_context(Authority(tmp_path / "other")), server_hostname=HOST)
        client.writer.close()
        while bench.server.connections:
            await next(iter(bench.server.connections)).closed.wait()

    run(scenario)
    assert "closing the connection of unix client" in caplog.text


# ── the connection's life under TLS ──────────────────────────────────────────────────────────────────────────────


def test_the_handshake_timeout_spans_tls(run, caplog):
    async def scenario(bench):
        client = await TlsClient.greet(bench.path)
        assert await client.ask(c.OPT_STARTTLS) == [c.REP_ACK]
        client.send(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a ClientHello
        assert await client.ended()
        client.writer.close()

    run(scenario, limits=Limits(handshake_timeout_s=0.2))
    assert "did not finish the handshake in 0.2 s" in caplog.text


def test_one_byte_at_a_time(run, trusted):
    """Records, and the handshake's messages, arrive in whatever pieces."""

    async def scenario(bench):
        client = await ByHand.start(bench.path, trusted, most=1)
        step, tls, writer = client.step, client.tls, client.writer
        await step(tls.do_handshake)
        await step(tls.write, option(c.OPT_ABORT))
        assert await step(tls.read, 20) == struct.pack(">QIII", c.OPTION_REPLY_MAGIC, c.OPT_ABORT, c.REP_ACK, 0)
        assert await step(tls.read, 1) == b""  # close_notify: an orderly end
        writer.close()

    run(scenario)


def test_drain_answers_everything_and_says_goodbye(run, trusted):
    async def scenario(bench):
        disk = bench.disk
        disk.hold = True
        client = await (await TlsClient.greet(bench.path)).secure(trusted)
        client.send(write(1, 0, b"x" * 4096), write(2, 4096, b"y" * 4096))
        await disk.until(lambda: sum(len(writes) for writes, _ in disk.held) == 2)
        drain = asyncio.ensure_future(disk.clients[0].drain())
        await asyncio.wait([drain], timeout=0)
        assert not drain.done()
        disk.release()
        assert await client.replies(2) == {1: 0, 2: 0}
        assert await client.ended()
        await drain
        client.writer.close()
        await disk.until(lambda: not disk.clients)

    run(scenario)


def test_drain_delivers_what_a_slow_client_has_not_read_yet(run, trusted):
    async def scenario(bench):
        client = await (await TlsClient.greet(bench.path, limit=4096)).secure(trusted)
        client.writer.transport.pause_reading()
        count = 8
        client.send(*(request(c.CMD_READ, n, 0, MIB) for n in range(count)))
        await bench.disk.until(lambda: [call[0] for call in bench.disk.calls].count("read_now") == count)
        await bench.disk.clients[0].drain()
        client.writer.transport.resume_reading()
        assert [(await client.reply(MIB))[:2] for _ in range(count)] == [(n, 0) for n in range(count)]
        assert await client.ended()
        client.writer.close()

    run(scenario, limits=Limits(unsent_reply_bytes=32 * MIB, linger_s=20))


def test_drain_drops_a_client_that_takes_no_replies(run, trusted):
    async def scenario(bench):
        client = await (await TlsClient.greet(bench.path, limit=4096)).secure(trusted)
        client.writer.transport.pause_reading()
        client.send(*(request(c.CMD_READ, n, 0, MIB) for n in range(50)))
        await bench.disk.until(lambda: any(call[0] == "read_now" for call in bench.disk.calls))
        await bench.disk.clients[0].drain()
        await bench.disk.until(lambda: not bench.disk.clients)
        client.writer.close()

    run(scenario, limits=Limits(unsent_reply_bytes=64 * 1024, drain_timeout_s=0.05, linger_s=30))


def test_input_waits_while_too_much_is_in_flight(run, trusted):
    async def scenario(bench):
        disk = bench.disk
        disk.hold = True
        client = await (await TlsClient.greet(bench.path)).secure(trusted)
        data = [os.urandom(64 * 1024) for _ in range(64)]
        client.send(*(write(n, n * 64 * 1024, piece) for n, piece in enumerate(data)))
        await disk.until(lambda: disk.held_bytes > MIB // 2)
        held = disk.held_bytes
        assert held < 3 * MIB
        disk.hold = False
        disk.release()
        assert await client.replies(64) == dict.fromkeys(range(64), 0)
        assert bytes(disk.data[: 4 * MIB]) == b"".join(data)
        client.writer.close()

    run(scenario, limits=Limits(in_flight_bytes=MIB))


@pytest.mark.parametrize("unsent_bytes", [0, 64 * 1024, 2 * MIB])
def test_no_more_is_executed_than_the_client_takes(run, trusted, unsent_bytes):
    """What waits to be encrypted counts like what waits for the socket; when it is sent, the rest is executed."""

    async def scenario(bench):
        bench.disk.data[:] = data = os.urandom(len(bench.disk.data))
        client = await (await TlsClient.greet(bench.path, limit=4096)).secure(trusted)
        client.writer.transport.pause_reading()
        count, length = 30, MIB // 2
        client.send(*(request(c.CMD_READ, n, n * length, length) for n in range(count)))
        reads = [("read_now", n * length, length) for n in range(count)]
        await bench.disk.until(lambda: reads[0] in bench.disk.calls)
        other = await (await TlsClient.greet(bench.path)).secure(trusted)
        other.send(request(c.CMD_READ, 1, 0, 4096))
        assert await other.reply(4096) == (1, 0, data[:4096])
        assert len([call for call in bench.disk.calls if call in reads]) < count // 2
        client.writer.transport.resume_reading()
        for n in range(count):
            assert await client.reply(length) == (n, 0, data[n * length : (n + 1) * length])
        for one in (client, other):
            one.writer.close()

    run(scenario, limits=Limits(unsent_reply_bytes=unsent_bytes))


def test_a_client_that_ends_its_direction_gets_its_replies(run, trusted):
    """close_notify, which is a half close: asyncio's own TLS could not do that."""

    async def scenario(bench):
        bench.disk.hold = True
        client = await ByHand.start(bench.path, trusted)
        step, tls, writer, outgoing = client.step, client.tls, client.writer, client.outgoing
        await step(tls.do_handshake)
        await step(tls.write, option(c.OPT_EXPORT_NAME))
        assert len(await step(tls.read, 10)) == 10
        tls.write(write(7, 0, b"x" * 4096))
        with pytest.raises(ssl.SSLWantReadError):
            tls.unwrap()
        writer.write(outgoing.read())  # in one piece: who has seen the write has seen the end
        writer.write_eof()
        await bench.disk.until(lambda: bool(bench.disk.held))
        bench.disk.release()
        assert await step(tls.read, 16) == struct.pack(">IIQ", c.SIMPLE_REPLY_MAGIC, 0, 7)
        with pytest.raises(ssl.SSLZeroReturnError):  # close_notify: an orderly end
            await step(tls.read, 1)
        writer.close()

    run(scenario)


def test_a_client_that_says_goodbye_at_once_gets_what_it_asked_for(run, trusted):
    """The server closes, and the client's end arrives, while most of the reply still waits to be encrypted."""

    async def scenario(bench):
        bench.disk.data[:] = data = os.urandom(len(bench.disk.data))
        client = await ByHand.start(bench.path, trusted)
        step, tls, writer, outgoing = client.step, client.tls, client.writer, client.outgoing
        await step(tls.do_handshake)
        await step(tls.write, option(c.OPT_EXPORT_NAME))
        assert len(await step(tls.read, 10)) == 10
        tls.write(request(c.CMD_READ, 1, 0, 8 * MIB) + request(c.CMD_DISC, 2))
        with pytest.raises(ssl.SSLWantReadError):
            tls.unwrap()
        writer.write(outgoing.read())
        writer.write_eof()
        await bench.disk.until(lambda: any(call[0] == "read_now" for call in bench.disk.calls))
        answer = bytearray()
        while len(answer) < 16 + 8 * MIB:
            answer += await step(tls.read, MIB)
        assert answer[16:] == data[: 8 * MIB]
        with pytest.raises(ssl.SSLZeroReturnError):  # close_notify: an orderly end
            await step(tls.read, 1)
        writer.close()

    run(scenario)


def test_a_client_that_cuts_its_direction_and_takes_nothing_is_dropped(run, trusted):
    """An end without close_notify is none that TLS knows of; nobody waits for such a client to take its replies."""

    async def scenario(bench):
        client = await (await TlsClient.greet(bench.path, limit=4096)).secure(trusted)
        client.writer.transport.pause_reading()
        client.send(*(request(c.CMD_READ, n, 0, MIB) for n in range(8)))
        await bench.disk.until(lambda: any(call[0] == "read_now" for call in bench.disk.calls))
        with socket.socket(fileno=os.dup(client.writer.transport.get_extra_info("socket").fileno())) as same:
            same.shutdown(socket.SHUT_WR)
        await bench.disk.until(lambda: ("closed",) in bench.disk.calls)
        client.writer.close()

    run(scenario, limits=Limits(unsent_reply_bytes=32 * MIB))


def test_a_client_that_asks_for_new_keys_and_takes_no_answer_is_dropped(run, authority, tmp_path, caplog):
    """Each request for new keys (RFC 8446, section 4.6.3) is answered, by TLS itself."""

    async def scenario(bench):
        context = client_context(authority, authority.files("client", server=False))
        context.keylog_filename = tmp_path / "keys"
        client = await ByHand.start(bench.path, context)
        await client.step(client.tls.do_handshake)
        assert client.tls.version() == "TLSv1.3"
        keys = SendingKeys.of(client.tls, tmp_path / "keys")
        client.writer.write(keys.seal(option(c.OPT_EXPORT_NAME), APPLICATION_DATA))
        assert len(await client.step(client.tls.read, 10)) == 10
        client.writer.transport.pause_reading()
        with contextlib.suppress(ConnectionError):
            for _ in range(300):
                client.writer.write(b"".join([keys.update() for _ in range(100)]))
                await client.writer.drain()
        await bench.disk.until(lambda: ("closed",) in bench.disk.calls)
        client.writer.close()

    run(scenario, limits=Limits(unsent_reply_bytes=64 * 1024))
    assert "it asks for new keys without end" in caplog.text


def test_a_broken_record_ends_the_connection(run, trusted, caplog):
    """And the client is told why, by an alert, before it is hung up on."""

    async def scenario(bench):
        client = await ByHand.start(bench.path, trusted)
        await client.step(client.tls.do_handshake)
        await client.step(client.tls.write, option(c.OPT_EXPORT_NAME))
        assert len(await client.step(client.tls.read, 10)) == 10
        client.writer.write(b"\x17\x03\x03\x00\x20" + bytes(32))
        with pytest.raises(ssl.SSLError, match="BAD_RECORD_MAC"):
            await client.step(client.tls.read, 1)
        await bench.disk.until(lambda: ("closed",) in bench.disk.calls)
        client.writer.close()

    run(scenario)
    assert "dropping unix client" in caplog.text
    assert ": TLS failed (" in caplog.text


def test_stop_sends_those_away_who_shake_hands(run):
    async def scenario(bench):
        client = await TlsClient.greet(bench.path)
        assert await client.ask(c.OPT_STARTTLS) == [c.REP_ACK]
        await bench.server.stop()
        assert await client.ended()
        client.writer.close()

    run(scenario)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_good_files(files):
    certified = files.check()
    assert (certified.names, certified.by_ca) == ({HOST}, True)
    assert certified.not_after.tzinfo is not None


def test_a_certificate_of_another_ca(tmp_path, files):
    assert TlsFiles(files.cert, files.key, Authority(tmp_path / "other").ca).check().by_ca is False


def damaged(tmp_path: Path, files: TlsFiles, authority: Authority, what: str) -> tuple[TlsFiles, str, str]:
    """Files of which one is of no use; which, and what is said of it."""
    other = Authority(tmp_path / "other")
    text = tmp_path / "text"
    text.write_text("nothing\n")
    text.chmod(0o600)
    gone = tmp_path / "gone"
    readable = tmp_path / "readable.key"
    readable.write_bytes(files.key.read_bytes())
    readable.chmod(0o640)
    match what:
        case "no cert":
            return TlsFiles(gone, files.key), "cert", f"{gone} does not exist"
        case "no key":
            return TlsFiles(files.cert, gone), "key", f"{gone} does not exist"
        case "no ca":
            return TlsFiles(files.cert, files.key, gone), "ca", f"{gone} does not exist"
        case "not a certificate":
            return TlsFiles(text, files.key), "cert", f"{text} is not a certificate in PEM"
        case "not a ca":
            return TlsFiles(files.cert, files.key, text), "ca", f"{text} is not a certificate in PEM"
        case "not a key":
            return TlsFiles(files.cert, text), "key", f"{text} is not a private key without a password, in PEM"
        case "a folder":
            return TlsFiles(files.cert, tmp_path), "key", f"{tmp_path} is not a regular file"
        case "another key":
            key = other.files("server").key
            return TlsFiles(files.cert, key), "key", f"{key} is not the key of {files.cert}"
        case "open key":
            return (
                TlsFiles(files.cert, readable),
                "key",
                (f"{readable} has mode 0640 and others may use it: run `chmod 600 {readable}`"),
            )
        case _:
            old = authority.files("expired", expired=True)
            return old, "cert", f"{old.cert} has expired, on "


@pytest.mark.parametrize(
    "what",
    [
        "no cert", "no key", "no ca", "not a certificate", "not a ca", "not a key", "a folder", "another key",
        "open key", "expired",
    ],
)  # fmt: skip
def test_files_that_are_of_no_use(tmp_path, files, authority, what):
    bad, which, sentence = damaged(tmp_path, files, authority, what)
    with pytest.raises(TlsFileError) as caught:
        bad.check()
    assert caught.value.which == which
    assert str(caught.value).startswith(sentence)


def test_a_key_with_a_password_is_refused_without_asking(tmp_path, files):
    from cryptography.hazmat.primitives import serialization as s

    key = s.load_pem_private_key(files.key.read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"secret")))
    locked.chmod(0o600)
    with pytest.raises(TlsFileError, match="is not a private key without a password"):
        TlsFiles(files.cert, locked).check()
