"""The port that the peer dials is open to everybody on the network: what strangers and broken peers can do there."""

import contextlib
import hashlib
import random
import select
import socket
from typing import Any

import pytest

from replica import wire
from tests.cluster.cluster import PATIENCE_S, Cluster
from tests.cluster.peers import FakePeer, Proxy, dial, read_to_end

MEMORY_BYTES = 64 << 20  # far more than a few connections need, far less than what they offered


def still_in_step(pair: Cluster) -> None:
    """The one link has lasted, and takes writes."""
    pair.node1.write(0, b"s" * 4096)
    pair.quiesce().check_identical()
    assert pair.node1.wait_in_sync()["role"] == "Primary"
    for node in pair.nodes:
        assert node.log().count("connected to") == 2, node.log()
        assert "Traceback" not in node.log()


def garbage(rng: random.Random) -> dict[str, bytes]:
    """What strangers say first."""
    hello = wire.pack(wire.HELLO, wire.pack_map({"program": "replica"}))
    return {
        "random bytes": rng.randbytes(100_000),
        "zeroes": bytes(100_000),
        "a browser": b"GET / HTTP/1.1\r\nHost: 127.0.0.2\r\n\r\n",
        "NBD": b"NBDMAGICIHAVEOPT" + bytes(100),
        "a huge frame": wire.HEADER.pack(wire.HELLO, 0, 0, 0xFFFFFFFF, 0, 0, 0) + bytes(100_000),
        "the largest frame": wire.HEADER.pack(wire.HELLO, 0, 0, wire.MAX_PAYLOAD_BYTES, 0, 0, 0) + bytes(100_000),
        "an incomplete map": hello,
        "a write before the greeting": wire.pack(wire.WRITE, b"x" * 4096),
        "AUTH first": wire.pack(wire.AUTH, bytes(32)),
        "a HELLO that is no map": wire.pack(wire.HELLO, b"\xc1" * 50),
        "a nested HELLO": wire.pack(wire.HELLO, b"\x91" * 4000),
        "an ERROR that is no text": wire.pack(wire.ERROR, b"\xff\xfe" * 1000),
    }


def test_garbage_does_not_disturb_the_link(pair: Cluster, rng: random.Random) -> None:
    before = pair.node2.resident_bytes()
    for what, data in garbage(rng).items():
        with dial(pair) as stranger:
            # The node may hang up before it has read all of it.
            with contextlib.suppress(ConnectionError):
                stranger.sendall(data)
            received = read_to_end(stranger)
        assert received.startswith(bytes([wire.HELLO])), what
    still_in_step(pair)
    assert pair.node2.resident_bytes() - before < MEMORY_BYTES


def test_a_truncated_greeting_does_not_disturb_the_link(pair: Cluster) -> None:
    hello = wire.pack(wire.HELLO, wire.pack_map({"program": "replica"}))
    for length in (0, 1, wire.HEADER_BYTES - 1, wire.HEADER_BYTES, len(hello) - 1):
        with dial(pair) as stranger:
            stranger.sendall(hello[:length])
            stranger.shutdown(socket.SHUT_WR)
            read_to_end(stranger)
    still_in_step(pair)


def test_many_idle_connections_do_not_disturb_the_link(pair: Cluster) -> None:
    """They are few at a time, end by themselves, and cost next to nothing; the peer's own link stays."""
    before = pair.node2.resident_bytes()
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(dial(pair)) for _ in range(100)]
        # The oldest make room at once: 8 may take their time.
        ends = [stranger for stranger in strangers if _ended(stranger, 0.0) or _ended(stranger, 1.0)]
        assert len(ends) >= 90
        still_in_step(pair)
        assert pair.node2.resident_bytes() - before < MEMORY_BYTES
        # And those that say nothing, or too little too slowly, are dropped in the end.
        for stranger in strangers:
            with contextlib.suppress(ConnectionError):
                stranger.sendall(bytes([wire.HELLO]))
        for stranger in strangers:
            read_to_end(stranger)
    with dial(pair) as again:
        assert again.recv(1) == bytes([wire.HELLO])
    still_in_step(pair)


def _ended(connection: socket.socket, patience_s: float) -> bool:
    """Whether the other end has closed it, after its HELLO or without one."""
    try:
        while select.select([connection], [], [], patience_s)[0]:
            if connection.recv(4096) == b"":
                return True
    except ConnectionError:
        return True
    return False


def test_idle_strangers_do_not_keep_the_peer_out(pair: Cluster) -> None:
    """They take every place there is for those who have not proven themselves; the peer comes back all the same."""
    with contextlib.ExitStack() as stack:
        pair.node1.kill9()
        pair.node2.wait_alone()
        for _ in range(40):
            stack.enter_context(dial(pair))
        pair.node1.start()
        pair.wait_in_sync()
    pair.node1.ctl("promote")
    pair.node1.write(0, b"p" * 4096)
    pair.quiesce().check_identical()


def test_a_recorded_handshake_does_not_open_a_link(pair: Cluster) -> None:
    """What the real peer once sent, HELLO, proof and frames, sent again: node2's nonce is another one now."""
    recorded = bytearray()

    def record(data: bytes) -> bytes:
        recorded.extend(data)
        return data

    with Proxy(("127.0.0.2", pair.port)) as proxy:
        proxy.spoil = record
        pair.node1.stop()
        pair.write_config(pair.node1, port=str(proxy.port))
        pair.node1.start()
        pair.wait_in_sync()
        pair.node1.ctl("promote")
        pair.node1.write(0, b"r" * 4096)
        before = pair.node2.log().count("connected to")
        for _ in range(3):
            with dial(pair) as stranger:
                with contextlib.suppress(ConnectionError):
                    stranger.sendall(recorded)
                received = read_to_end(stranger)
            assert received.startswith(bytes([wire.HELLO]))
            assert b"different cluster secrets" in received
        assert pair.node2.log().count("connected to") == before
        assert pair.node1.wait_in_sync()["role"] == "Primary"
        pair.quiesce().check_identical()


def test_what_a_stranger_says_is_one_harmless_line(pair: Cluster) -> None:
    """In the log, and in the status of a node whose peer is away, which an operator reads on a terminal."""
    pair.node1.kill9()
    pair.node2.wait_alone()
    words = b"all is well\r\nr0: promoted\x1b[2J\x07" + b"x" * 100_000
    with dial(pair) as stranger:
        stranger.sendall(wire.pack(wire.ERROR, words[:4000]))
        read_to_end(stranger)
    said = pair.node2.wait_for(lambda status: "all is well" in status["last_error"])["last_error"]
    assert said.isprintable()
    assert len(said) < 600
    assert "\x1b" not in pair.node2.log()
    assert "\nr0: promoted" not in pair.node2.log()


def test_a_crowd_of_strangers_fills_neither_log_nor_memory(pair: Cluster) -> None:
    before = len(pair.node2.log())
    before_bytes = pair.node2.resident_bytes()
    for number in range(300):
        with dial(pair) as stranger:
            stranger.sendall(wire.pack(wire.ERROR, f"stranger {number}".encode()))
            read_to_end(stranger)
    assert pair.node2.resident_bytes() - before_bytes < MEMORY_BYTES
    assert len(pair.node2.log()) - before < 10_000
    still_in_step(pair)


def test_a_stranger_without_the_secret_does_not_take_the_place_of_the_peer(pair: Cluster) -> None:
    impostor = FakePeer(pair, secret=b"f" * 64)
    with pytest.raises(AssertionError, match="different cluster secrets"):
        impostor.receive(wire.STATE)
    still_in_step(pair)


# ── a peer that has proven itself and then misbehaves ────────────────────────────────────────────────────────────


def with_fake_peer(pair: Cluster) -> FakePeer:
    """node1 is stopped cleanly, and the fake is in its place, in step with node2."""
    pair.node1.stop()
    pair.node2.wait_alone()
    fake = FakePeer(pair)
    fake.be_in_step()
    pair.node2.wait_replication("Established")
    return fake


def test_a_peer_that_vanishes_in_the_middle_of_a_frame(pair: Cluster) -> None:
    pair.node1.write(0, b"o" * 65536)
    fake = with_fake_peer(pair)
    whole = wire.pack(wire.WRITE, b"n" * 4096, sequence=1, offset=0)
    fake.send(whole + wire.pack(wire.WRITE, b"n" * 8192, sequence=2, offset=8192)[:5000])
    fake.receive(wire.APPLIED)
    fake.close()
    pair.node2.wait_alone()
    # The whole write is there, of the half one nothing.
    assert pair.node2.image.read_bytes()[:65536] == b"n" * 4096 + b"o" * 61440
    pair.node1.start()
    for node in pair.nodes:
        node.wait_connection("Connected")


def bad_frames(size_bytes: int) -> dict[str, bytes]:
    """What no peer may send while the copies are in step."""
    side = wire.pack_map({"role": "King", "disk": "UpToDate", "paused": False})
    return {
        "beyond the end": wire.pack(wire.WRITE, b"x" * 4096, sequence=1, offset=size_bytes),
        "far beyond the end": wire.pack(wire.WRITE, b"x" * 4096, sequence=1, offset=(1 << 64) - 1),
        "durable beyond the end": wire.pack(wire.WRITE_DURABLE, b"x" * 4096, sequence=1, offset=size_bytes - 512),
        "zeroes beyond the end": wire.pack(wire.ZERO, wire.pack_length(4096), sequence=1, offset=size_bytes),
        "a ZERO without length": wire.pack(wire.ZERO, b"123", sequence=1),
        "resync data": wire.pack(wire.SYNC_DATA, b"x" * 4096, sequence=1),
        "an unknown kind": wire.pack(0x7F),
        "another volume": wire.pack(wire.WRITE, b"x" * 512, volume=3),
        "an oversized frame": wire.HEADER.pack(wire.WRITE, 0, 0, wire.MAX_PAYLOAD_BYTES + 1, 1, 0, 0),
        "an UPDATE of nonsense": wire.pack(wire.UPDATE, side),
        "an UPDATE that is no map": wire.pack(wire.UPDATE, b"\xc1"),
        "a REQUEST without an operation": wire.pack(wire.REQUEST, wire.pack_map({})),
        "HELLO once more": wire.pack(wire.HELLO, wire.pack_map({"program": "replica"})),
    }


def test_frames_that_make_no_sense_end_the_link_and_nothing_else(pair: Cluster) -> None:
    before = hashlib.sha256(pair.node2.image.read_bytes()).hexdigest()
    pair.node1.stop()
    pair.node2.wait_alone()
    for what, frame in bad_frames(pair.size_bytes).items():
        fake = FakePeer(pair)
        fake.be_in_step()
        pair.node2.wait_replication("Established")
        fake.send(frame)
        with pytest.raises((AssertionError, ConnectionError)):
            fake.receive(wire.DONE)
        fake.close()
        status = pair.node2.wait_alone()
        assert status["volumes"][0]["disk"] in ("Consistent", "UpToDate"), what
    assert "Traceback" not in pair.node2.log()
    assert hashlib.sha256(pair.node2.image.read_bytes()).hexdigest() == before
    pair.node1.start()
    pair.wait_in_sync()


def test_an_unanswered_handshake_does_not_keep_the_operator_waiting(pair: Cluster) -> None:
    """A peer that greets and then says nothing: it is dropped when it misses its pings, and verbs work meanwhile."""
    pair.node1.stop()
    pair.node2.wait_alone()
    fake = FakePeer(pair)
    fake.receive(wire.STATE)
    pair.node2.wait_alone()
    pair.node2.ctl("promote")
    fake.close()
    pair.node2.write(0, b"p" * 4096)


def test_a_peer_that_dials_anew_while_the_two_part(pair: Cluster) -> None:
    """A split brain was found, the peer died before it said so, too, and is back: node2 stays StandAlone."""
    pair.node1.stop()
    pair.node2.wait_alone()
    fake = FakePeer(pair)
    side = {**wire.unpack_map(fake.receive(wire.STATE))["side"], "current": 77, "base": 0, "history": []}
    state = {"role": "Secondary", "disk": "UpToDate", "paused": False, "ran_on": False, "served": 0, "side": side}
    fake.send(wire.pack(wire.STATE, wire.pack_map(state)))
    assert wire.unpack_map(fake.receive(wire.STATE)) == {"refused": True}
    with pytest.raises(AssertionError, match="r0 is StandAlone on node2"):
        FakePeer(pair).receive(wire.STATE)
    assert "nothing in common" in pair.node2.wait_connection("StandAlone")["last_error"]
    assert "Traceback" not in pair.node2.log()
    pair.node2.ctl("connect")
    pair.node1.start()
    pair.wait_in_sync()


@pytest.fixture(autouse=True)
def _patience() -> Any:
    """Sockets of these tests never wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE_S)
    yield
    socket.setdefaulttimeout(before)
