"""The connector against a host that does not answer: giving up and beginning again."""

import asyncio
import socket
from collections.abc import Iterator

import pytest
import uvloop

from replica import auth, wire
from replica.connector import MAX_GREETINGS, Connector, Endpoints
from replica.link import LinkSettings, PeerLink
from replica.runtime import HostRuntime

PATIENCE_S = 20.0
SETTINGS = LinkSettings(auth.Identity("web", "r0", "node1", "node2", "C", False), b"0123456789abcdef", 5.0, 5.0)


@pytest.fixture
def deaf_host() -> Iterator[tuple[socket.socket, list[socket.socket]]]:
    """A listener whose queue is full, so that further connections stay unanswered; and what fills it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = []
        for _ in range(3):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
            fillers.append(filler)
        yield listener, fillers
        for filler in fillers:
            filler.close()


def dialer_to(listener: socket.socket) -> Connector:
    port = listener.getsockname()[1]
    endpoints = Endpoints("127.0.0.1", "127.0.0.1", 1, port, dialer=True, connect_interval_s=0.05)
    return Connector(HostRuntime(), endpoints, SETTINGS, lambda link: None, lambda link, why: None, lambda why: None)


async def first_byte(listener: socket.socket) -> bytes:
    """What the first connection that says anything begins with."""
    loop = asyncio.get_running_loop()
    listener.setblocking(False)
    while True:
        connection, _ = await loop.sock_accept(listener)
        with connection:
            connection.setblocking(False)
            if data := await loop.sock_recv(connection, 1):
                return data


def test_it_can_be_stopped_in_the_middle_of_a_dial(deaf_host: tuple[socket.socket, list[socket.socket]]) -> None:
    async def test() -> None:
        connector = dialer_to(deaf_host[0])
        connector.connect()
        for _ in range(3):
            await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE_S):
            await connector.stop("the end.")

    uvloop.run(test())


def test_interrupted_dials_do_not_add_up(deaf_host: tuple[socket.socket, list[socket.socket]]) -> None:
    """More of them than there may be greetings at once, and then one that goes through."""

    async def test() -> None:
        listener, fillers = deaf_host
        connector = dialer_to(listener)
        for _ in range(2 * MAX_GREETINGS):
            connector.connect()
            for _ in range(3):
                await asyncio.sleep(0)
            connector.disconnect("not now.")
            await asyncio.sleep(0)
        for filler in fillers:
            filler.close()
        connector.connect()
        async with asyncio.timeout(PATIENCE_S):
            assert await first_byte(listener) == bytes([wire.HELLO])
            await connector.stop("the end.")

    uvloop.run(test())


def test_a_node_that_goes_stand_alone_as_its_link_is_replaced_takes_no_new_link() -> None:
    """The end of the old link can be what makes it StandAlone: then the newer connection is turned away as well."""

    async def test() -> None:
        opened: list[PeerLink] = []
        reasons: list[str] = []
        taken, turned_away = asyncio.Event(), asyncio.Event()

        def take(link: PeerLink) -> None:
            opened.append(link)
            taken.set()

        def closed(link: PeerLink, why: str) -> None:
            reasons.append(why)
            listening.disconnect("the two do not fit together.")

        def ended(link: PeerLink, why: str) -> None:
            reasons.append(why)
            turned_away.set()

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        node2 = LinkSettings(auth.Identity("web", "r0", "node2", "node1", "C", False), SETTINGS.secret, 5.0, 5.0)
        accepting = Endpoints("127.0.0.1", "127.0.0.1", port, port, dialer=False, connect_interval_s=0.05)
        dialing = Endpoints("127.0.0.1", "127.0.0.1", port, port, dialer=True, connect_interval_s=60.0)
        listening = Connector(HostRuntime(), accepting, node2, take, closed, lambda why: None)
        first, second = (
            Connector(HostRuntime(), dialing, SETTINGS, lambda link: up.set(), ended, lambda why: None)
            for _ in range(2)
        )
        up = asyncio.Event()
        async with asyncio.timeout(PATIENCE_S):
            await listening.start()
            listening.connect()
            first.connect()
            await asyncio.gather(up.wait(), taken.wait())
            second.connect()
            await turned_away.wait()
            for connector in (first, second, listening):
                await connector.stop("the end.")
        assert len(opened) == 1
        assert reasons[0] == "the peer made a newer connection."

    uvloop.run(test())
