"""The peer link inside TLS: two `PeerLink`s through the runtime's own listen and dial; strangers with raw sockets."""

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from nbdserver.tls import TlsFiles
from replica import link_tls, wire
from replica.errors import ReplicaError
from replica.link import LinkSettings, PeerLink
from replica.link_tls import LinkTls
from replica.runtime import HostRuntime
from tests.certificates import Authority
from tests.unit.test_link import IDENTITIES, PATIENCE_S, SECRET, Owner

HOST = "127.0.0.1"
MIB = 1 << 20


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def tls(authority: Authority) -> dict[str, LinkTls]:
    peers = {"node1": "node2", "node2": "node1"}
    return {name: LinkTls(authority.files(name, name), name, peer) for name, peer in peers.items()}


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Awaitable[None]]], None]:
    """Run a scenario on a loop; nothing may reach the loop's exception handler."""

    def runner(scenario: Callable[[], Awaitable[None]]) -> None:
        problems: list[object] = []

        async def main() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _loop, context: problems.append(context))
            async with asyncio.timeout(PATIENCE_S):
                await scenario()

        with asyncio.Runner(loop_factory=request.param) as loop_runner:
            loop_runner.run(main())
        assert problems == []

    return runner


class End:
    """A link and who is told about it."""

    def __init__(self, name: str) -> None:
        self.owner = Owner()
        settings = LinkSettings(IDENTITIES[name], SECRET, 30.0, 10.0)
        self.link = PeerLink(settings, self.owner, name.encode().ljust(32), dialer=name == "node1")

    async def reason(self) -> str:
        """Why it ended."""
        await self.owner.closed.wait()
        return self.owner.reason


class Listening:
    """node2, listening with TLS; each connection that gets a link has its end in `ends`."""

    def __init__(self, tls: LinkTls | None) -> None:
        self._runtime = HostRuntime(tls)
        self.ends: list[End] = []
        self.arrived = asyncio.Event()

    async def __aenter__(self) -> "Listening":
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port: int = probe.getsockname()[1]
        self.listener = await self._runtime.listen(HOST, self.port, self._accepted)
        return self

    async def __aexit__(self, *ignored: object) -> None:
        self.listener.close()
        for end in self.ends:
            end.link.close("the test is over.")

    def _accepted(self) -> asyncio.BaseProtocol:
        end = End("node2")
        self.ends.append(end)
        self.arrived.set()
        return end.link

    async def end(self) -> End:
        await self.arrived.wait()
        return self.ends[0]


async def dialed(tls: LinkTls | None, port: int) -> End:
    end = End("node1")
    await HostRuntime(tls).dial(HOST, port, HOST, lambda: end.link)
    return end


def test_frames_of_every_size_in_both_directions(run: Callable[..., None], tls: dict[str, LinkTls]) -> None:
    async def scenario() -> None:
        async with Listening(tls["node2"]) as listening:
            near = await dialed(tls["node1"], listening.port)
            far = await listening.end()
            await asyncio.gather(near.owner.opened.wait(), far.owner.opened.wait())
            assert near.link.session == far.link.session != 0
            pieces = [os.urandom(size) for size in (1, 4096, 16384, 16385, 65536, wire.MAX_PAYLOAD_BYTES) * 4]
            for sender, receiver in ((near, far), (far, near)):
                received: list[bytes] = []
                complete = asyncio.Event()

                def on_writes(
                    writes: list[tuple[int, memoryview]], last: int, received=received, complete=complete
                ) -> None:
                    received.extend(bytes(data) for _, data in writes)
                    if last == len(pieces):
                        complete.set()

                receiver.link.on_writes = on_writes
                for number, piece in enumerate(pieces, 1):
                    header = wire.HEADER.pack(wire.WRITE, 0, 0, len(piece), number, 0, 0)
                    sender.link.send_buffers([header, memoryview(piece)])
                await complete.wait()
                assert received == pieces
                await sender.link.drained()
                assert not sender.link.congested

    run(scenario)


def test_a_congested_link_says_so_and_is_drained(run: Callable[..., None], tls: dict[str, LinkTls]) -> None:
    async def scenario() -> None:
        async with Listening(tls["node2"]) as listening:
            near = await dialed(tls["node1"], listening.port)
            far = await listening.end()
            await asyncio.gather(near.owner.opened.wait(), far.owner.opened.wait())
            count = 32
            complete = asyncio.Event()
            far.link.on_writes = lambda writes, last: complete.set() if last == count else None
            far.link._transport.pause_reading()
            data = bytes(MIB)
            for number in range(1, count + 1):
                near.link.send_buffers([wire.HEADER.pack(wire.WRITE, 0, 0, MIB, number, 0, 0), data])
            assert near.link.congested
            far.link._transport.resume_reading()
            await near.link.drained()
            assert not near.link.congested
            await complete.wait()

    run(scenario)


def test_the_reason_of_a_refusal_arrives(run: Callable[..., None], tls: dict[str, LinkTls]) -> None:
    async def scenario() -> None:
        async with Listening(tls["node2"]) as listening:
            near = await dialed(tls["node1"], listening.port)
            far = await listening.end()
            await asyncio.gather(near.owner.opened.wait(), far.owner.opened.wait())
            far.link.refuse("r0 is StandAlone.")
            assert await near.reason() == "the peer says: r0 is StandAlone."

    run(scenario)


def test_a_listener_that_says_nothing(
    run: Callable[..., None], tls: dict[str, LinkTls], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_tls, "HANDSHAKE_TIMEOUT_S", 0.1)

    async def scenario() -> None:
        sentence = r"^TLS with node2 failed: no handshake within 0\.1 s\.$"
        with socket.create_server((HOST, 0)) as silent, pytest.raises(ReplicaError, match=sentence):
            await dialed(tls["node1"], silent.getsockname()[1])

    run(scenario)


def test_a_dial_that_is_given_up(run: Callable[..., None], tls: dict[str, LinkTls]) -> None:
    async def scenario() -> None:
        with socket.create_server((HOST, 0)) as silent:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await dialed(tls["node1"], silent.getsockname()[1])
            connection, _ = silent.accept()
            with connection:
                connection.setblocking(False)
                loop = asyncio.get_running_loop()
                with contextlib.suppress(ConnectionResetError):
                    while await loop.sock_recv(connection, 4096):
                        pass

    run(scenario)


def test_a_dialer_that_says_nothing(
    run: Callable[..., None], tls: dict[str, LinkTls], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_tls, "HANDSHAKE_TIMEOUT_S", 0.1)

    async def scenario() -> None:
        async with Listening(tls["node2"]) as listening:
            reader, writer = await asyncio.open_connection(HOST, listening.port)
            writer.write(b"\x16\x03\x01")
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
            assert await (await listening.end()).reason() == "TLS with node1 failed: no handshake within 0.1 s."
            writer.close()

    run(scenario)


def test_many_handshakes_at_once_are_bounded(
    run: Callable[..., None], tls: dict[str, LinkTls], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_tls, "HANDSHAKE_TIMEOUT_S", 1000.0)  # nobody leaves by that

    async def scenario() -> None:
        async with Listening(tls["node2"]) as listening:
            strangers = [await asyncio.open_connection(HOST, listening.port) for _ in range(link_tls.MAX_HANDSHAKES)]
            reader, writer = await asyncio.open_connection(HOST, listening.port)
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()
            # One leaves, and the peer gets in.
            strangers[0][1].close()
            await (await listening.end()).reason()
            listening.arrived.clear()
            near = await dialed(tls["node1"], listening.port)
            await near.owner.opened.wait()
            near.link.close("done.")
            # Those that are left go with the listener.
            listening.listener.close()
            for reader, writer in strangers[1:]:
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""
                writer.close()

    run(scenario)


def test_an_older_version_of_tls_is_refused(
    run: Callable[..., None], tls: dict[str, LinkTls], authority: Authority
) -> None:
    async def scenario() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        authority.files("node1", "node1").load_into(context)
        async with Listening(tls["node2"]) as listening:
            with pytest.raises(ssl.SSLError, match=r"ALERT_PROTOCOL_VERSION|alert protocol version"):
                await asyncio.open_connection(HOST, listening.port, ssl=context)
            assert await (await listening.end()).reason() == "TLS with node1 failed: TLS failed (unsupported protocol)."

    run(scenario)


@pytest.mark.parametrize("plain", ["node1", "node2"])
def test_one_end_without_tls(run: Callable[..., None], tls: dict[str, LinkTls], plain: str) -> None:
    ends = {name: None if name == plain else one for name, one in tls.items()}
    other = "node2" if plain == "node1" else "node1"
    sentence = f"{other} uses TLS on the peer link and {plain} does not: give both the same `tls`."

    async def scenario() -> None:
        async with Listening(ends["node2"]) as listening:
            if plain == "node1":
                near = await dialed(None, listening.port)
                assert await near.reason() == f"the peer says: {sentence}"
            else:
                with pytest.raises(ReplicaError) as caught:
                    await dialed(tls["node1"], listening.port)
                assert str(caught.value) == sentence
            assert await (await listening.end()).reason() == sentence

    run(scenario)


def test_a_refused_dialer_learns_why(
    run: Callable[..., None], tls: dict[str, LinkTls], authority: Authority, tmp_path: Path
) -> None:
    """With TLS 1.3, the dialer has finished its handshake, and has a link, by then."""
    stranger = Authority(tmp_path / "other", "another").files("node1", "node1")
    mixed = LinkTls(TlsFiles(stranger.cert, stranger.key, authority.ca), "node1", "node2")

    async def scenario() -> None:
        async with Listening(tls["node2"]) as listening:
            near = await dialed(mixed, listening.port)
            assert await near.reason() == "TLS with node2 failed: it refused this side's certificate (unknown ca)."
            reason = await (await listening.end()).reason()
            refused = "its certificate is refused (unable to get local issuer certificate)"
            assert reason == f"TLS with node1 failed: {refused}."

    run(scenario)
