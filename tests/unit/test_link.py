"""Two `PeerLink`s over a real connection, and one against raw bytes."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
import uvloop

from replica import auth, wire
from replica.errors import ReplicaError
from replica.link import LinkLost, LinkSettings, PeerLink

SECRET = b"0123456789abcdef"
PATIENCE_S = 20.0
IDENTITIES = {
    "node1": auth.Identity("web", "r0", "node1", "node2", "C", False),
    "node2": auth.Identity("web", "r0", "node2", "node1", "C", False),
}


class Owner:
    """Remembers what became of its link."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.closed = asyncio.Event()
        self.reason = ""
        self.closings = 0

    def link_opened(self, link: PeerLink) -> None:
        self.opened.set()

    def link_closed(self, link: PeerLink, reason: str) -> None:
        self.reason = reason
        self.closings += 1
        self.closed.set()


class End:
    """One end: a link on its socket."""

    def __init__(self, name: str, /, *, secret: bytes = SECRET, timeout_s: float = 30.0, **identity: object) -> None:
        settings = LinkSettings(replace(IDENTITIES[name], **identity), secret, timeout_s, 10.0)  # type: ignore[arg-type]
        self.owner = Owner()
        self.link = PeerLink(settings, self.owner, name.encode().ljust(32), dialer=name == "node1")

    async def on(self, connection: socket.socket) -> "End":
        connection.setblocking(False)
        await asyncio.get_running_loop().create_connection(lambda: self.link, sock=connection)
        return self


async def connected(one: End, two: End) -> tuple[End, End]:
    near, far = socket.socketpair()
    await asyncio.gather(one.on(near), two.on(far))
    return one, two


async def opened(**settings: object) -> tuple[End, End]:
    """Two ends that have accepted each other."""
    one, two = await connected(End("node1", **settings), End("node2", **settings))  # type: ignore[arg-type]
    await asyncio.gather(one.owner.opened.wait(), two.owner.opened.wait())
    return one, two


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test on the loop that the daemon uses."""

    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await test()

    uvloop.run(bounded())


def test_both_open_with_the_same_session() -> None:
    async def test() -> None:
        one, two = await opened()
        assert one.link.session == two.link.session != 0
        assert one.link.open
        assert not one.link.closed

    run(test)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"secret": b"fedcba9876543210"}, "different cluster secrets"),
        ({"cluster": "other"}, "cluster"),
        ({"resource": "r1"}, "resource"),
        ({"node": "node3"}, "node"),
        ({"protocol": "A"}, "protocol"),
        ({"integrity": True}, "data_integrity"),
    ],
)
def test_ends_that_do_not_fit_both_say_why(settings: dict[str, object], words: str) -> None:
    async def test() -> None:
        one, two = await connected(End("node1"), End("node2", **settings))  # type: ignore[arg-type]
        await asyncio.gather(one.owner.closed.wait(), two.owner.closed.wait())
        for end in (one, two):
            assert words in end.owner.reason
            assert not end.owner.opened.is_set()
            assert end.owner.closings == 1

    run(test)


def test_writes_of_one_receive_come_as_one_batch_in_order() -> None:
    async def test() -> None:
        one, two = await opened()
        batches: list[tuple[list[tuple[int, bytes]], int]] = []
        done = asyncio.Event()

        def on_writes(writes: object, last: int) -> None:
            batches.append(([(offset, bytes(data)) for offset, data in writes], last))  # type: ignore[attr-defined]
            if last == 100:
                done.set()

        two.link.on_writes = on_writes
        frames = [
            wire.pack(wire.WRITE, bytes([number]) * 512, sequence=number, offset=number * 512)
            for number in range(1, 101)
        ]
        one.link.send_buffers(frames)
        await done.wait()
        assert [write for batch, _ in batches for write in batch] == [
            (number * 512, bytes([number]) * 512) for number in range(1, 101)
        ]
        assert len(batches) < 100
        assert batches[-1][1] == 100

    run(test)


@pytest.mark.parametrize("integrity", [False, True])
def test_large_frames_arrive_whole(integrity: bool) -> None:
    async def test() -> None:
        one, two = await opened(integrity=integrity)
        two.link.expect(wire.SYNC_DATA)
        payloads = [bytes([number]) * (wire.MAX_PAYLOAD_BYTES - number) for number in range(5)]
        for number, payload in enumerate(payloads):
            one.link.send(wire.SYNC_DATA, payload, sequence=number, offset=number)
        for number, payload in enumerate(payloads):
            assert await two.link.receive(wire.SYNC_DATA) == (0, number, number, payload)
        await one.link.drained()
        assert not one.link.congested

    run(test)


def test_requests_get_their_own_answers() -> None:
    async def test() -> None:
        one, two = await opened()
        asked: list[int] = []

        def answer(flags: int, sequence: int, offset: int, payload: memoryview) -> None:
            asked.append(sequence)
            if len(asked) == 2:  # in the other order
                two.link.send(wire.REPLY, wire.pack_map({"error": "r0 is busy."}), sequence=asked[1])
                two.link.send(wire.REPLY, wire.pack_map({"ok": True}), sequence=asked[0])

        two.link.handlers[wire.REQUEST] = answer
        first, second = await asyncio.gather(
            one.link.request({"op": "a"}, PATIENCE_S), one.link.request({"op": "b"}, PATIENCE_S), return_exceptions=True
        )
        assert first == {"ok": True}
        assert isinstance(second, ReplicaError)
        assert str(second) == "r0 is busy."
        with pytest.raises(TimeoutError):
            await one.link.request({"op": "c"}, 0.01)

    run(test)


def test_everything_that_waits_learns_of_the_end() -> None:
    async def test() -> None:
        one, two = await opened()
        one.link.expect(wire.STATE)
        two.link.handlers[wire.REQUEST] = lambda *frame: None
        waiting = [
            asyncio.create_task(one.link.receive(wire.STATE)),
            asyncio.create_task(one.link.request({"op": "a"}, PATIENCE_S)),
        ]
        await asyncio.sleep(0)
        two.link.refuse("node2 has had enough.")
        for end in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(end, LinkLost)
            assert "node2 has had enough" in str(end)
        assert "the peer says: node2 has had enough" in one.owner.reason
        with pytest.raises(LinkLost):
            await one.link.receive(wire.STATE)
        with pytest.raises(LinkLost):
            await one.link.request({"op": "a"}, PATIENCE_S)
        one.link.send(wire.PING)
        await one.link.drained()

    run(test)


def test_nothing_is_delivered_after_the_close() -> None:
    """The past stays past: frames that were already received are dropped with the link."""

    async def test() -> None:
        one, two = await opened()
        seen: list[int] = []
        two.link.handlers[wire.UPDATE] = lambda flags, sequence, offset, payload: (
            seen.append(sequence),
            two.link.close("enough."),
        )
        two.link.on_writes = lambda writes, last: seen.append(last)
        one.link.send_buffers(
            [
                wire.pack(wire.WRITE, b"x", sequence=1),
                wire.pack(wire.UPDATE, sequence=2),
                wire.pack(wire.WRITE, b"x", sequence=3),
                wire.pack(wire.UPDATE, sequence=4),
            ]
        )
        await one.owner.closed.wait()
        assert seen == [1, 2]
        assert two.owner.closings == 1

    run(test)


def test_a_peer_that_says_nothing_is_given_up() -> None:
    async def test() -> None:
        near, far = socket.socketpair()
        far.setblocking(False)
        end = await End("node1", timeout_s=0.2).on(near)
        far.sendall(greeting_of_node2(end))
        await end.owner.opened.wait()
        await end.owner.closed.wait()
        assert "nothing was heard from the peer for 0.2 s" in end.owner.reason
        far.close()

    run(test)


def test_two_that_only_ping_each_other_stay_together() -> None:
    async def test() -> None:
        one, two = await opened(timeout_s=0.2)
        pings = asyncio.Event()
        count = 0

        def pong(*frame: object) -> None:
            nonlocal count
            count += 1
            if count == 10:  # as many as fit into two and a half timeouts
                pings.set()

        one.link.handlers[wire.PONG] = pong
        await pings.wait()
        assert one.link.open
        assert two.link.open

    run(test)


def greeting_of_node2(end: End) -> bytes:
    """HELLO and AUTH as node2 sends them to this link of node1."""
    hello = auth.hello(IDENTITIES["node2"], b"2" * 32)
    theirs = auth.hello(IDENTITIES["node1"], b"node1".ljust(32))
    mac = auth.proof(SECRET, dialer=False, own_hello=hello, peer_hello=theirs)
    return wire.pack(wire.HELLO, hello) + wire.pack(wire.AUTH, mac)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (wire.pack(wire.WRITE, b"x"), "where none is due"),
        (wire.pack(wire.SYNC_DATA, b"x"), "where none is due"),
        (wire.pack(0x7E), "0x7e"),
        (wire.pack(wire.PING, volume=1), "out of bounds"),
        (wire.HEADER.pack(wire.PING, 0, 0, wire.MAX_PAYLOAD_BYTES + 1, 0, 0, 0), "out of bounds"),
        (wire.pack(wire.HELLO, b"x"), "where none is due"),
        (wire.pack(wire.ERROR, b"\xffbye"), "the peer says: \ufffdbye"),
    ],
)
def test_frames_that_are_not_due_end_the_link(frame: bytes, words: str) -> None:
    async def test() -> None:
        near, far = socket.socketpair()
        end = await End("node1").on(near)
        # In the same segment as the greeting: what follows it is taken at once.
        far.sendall(greeting_of_node2(end) + frame)
        await end.owner.closed.wait()
        assert end.owner.opened.is_set()
        assert words in end.owner.reason
        far.close()

    run(test)


def test_a_reply_that_nobody_asked_for_is_ignored() -> None:
    async def test() -> None:
        one, two = await opened()
        two.link.send(wire.REPLY, b"\xc1", sequence=99)
        two.link.handlers[wire.REQUEST] = lambda flags, sequence, offset, payload: two.link.send(
            wire.REPLY, wire.pack_map({"ok": 1}), sequence=sequence
        )
        assert await one.link.request({"op": "a"}, PATIENCE_S) == {"ok": 1}

    run(test)


def test_a_wrong_checksum_ends_the_link() -> None:
    async def test() -> None:
        one, two = await opened(integrity=True)
        two.link.on_writes = lambda writes, last: None
        frame = bytearray(wire.pack(wire.WRITE, b"data" * 100, integrity=True))
        frame[-1] ^= 1
        one.link.send_buffers([bytes(frame)])
        await two.owner.closed.wait()
        assert "wrong checksum" in two.owner.reason
        await one.owner.closed.wait()

    run(test)
