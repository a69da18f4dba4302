"""Whatever arrives at a peer link, in whatever pieces: it goes on, or closes with one sentence; never anything else."""

import asyncio
import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from replica import auth, wire
from replica.link import LinkSettings, PeerLink
from tests.fuzz.peer_target import GREETING, HELLO, ME, NONCE, SECRET, Wire

KINDS = sorted(wire.KIND_NAMES)


class Owner:
    def __init__(self) -> None:
        self.opened = 0
        self.reasons: list[str] = []

    def link_opened(self, link: PeerLink) -> None:
        self.opened += 1
        link.on_writes = lambda writes, last: _look(writes)
        link.expect(wire.STATE, wire.BITMAP, wire.SYNC_START)
        link.handlers[wire.UPDATE] = lambda flags, sequence, offset, payload: wire.unpack_map(payload)
        link.handlers[wire.ZERO] = lambda flags, sequence, offset, payload: wire.unpack_length(payload)

    def link_closed(self, link: PeerLink, reason: str) -> None:
        self.reasons.append(reason)


def _look(writes: Any) -> None:
    for offset, data in writes:
        assert 0 <= len(data) <= wire.MAX_PAYLOAD_BYTES
        assert offset >= 0


def feed(stream: bytes, cuts: list[int], *, integrity: bool = False) -> Owner:
    """Give the bytes to a new link, in pieces; what came of it."""

    async def run() -> Owner:
        owner = Owner()
        link = PeerLink(LinkSettings(ME, SECRET, 30.0, 10.0), owner, NONCE, dialer=True)
        link.integrity = integrity
        transport = Wire()
        link.connection_made(transport)
        edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
        for start, stop in itertools.pairwise(edges):
            _receive(link, transport, stream[start:stop])
        if not link.closed:
            link.close("the test is over.")
        return owner

    return asyncio.run(run())


def _receive(link: PeerLink, transport: Wire, data: bytes) -> None:
    """As a socket would: as much as the link has room for, until it has closed the connection."""
    while data and not transport.closed:
        room = link.get_buffer(-1)
        assert len(room) > 0, "the link has no room for the rest of a frame"
        count = min(len(room), len(data))
        room[:count] = data[:count]
        link.buffer_updated(count)
        data = data[count:]


def check(owner: Owner) -> None:
    """The link ended once, with one sentence."""
    assert len(owner.reasons) == 1
    assert owner.reasons[0]
    assert "\n" not in owner.reasons[0] or "the peer says" in owner.reasons[0]


CUTS = st.lists(st.integers(0, 1 << 16), max_size=8)
FRAME = st.builds(
    wire.pack,
    st.sampled_from(KINDS) | st.integers(0, 255),
    st.binary(max_size=200) | st.just(b"z" * 70_000),
    flags=st.integers(0, 255),
    volume=st.just(0) | st.integers(0, 65535),
    sequence=st.integers(0, (1 << 64) - 1),
    offset=st.integers(0, (1 << 64) - 1),
    integrity=st.booleans(),
)
FRAMES = st.lists(FRAME, max_size=6).map(b"".join)


@st.composite
def mutated(draw: st.DrawFn, streams: st.SearchStrategy[bytes]) -> bytes:
    """A stream with a few bytes changed, taken out or put in."""
    stream = bytearray(draw(streams))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(stream)))
        action = draw(st.sampled_from(("change", "cut", "insert")))
        if action == "change" and at < len(stream):
            stream[at] = draw(st.integers(0, 255))
        elif action == "cut":
            del stream[at : at + draw(st.integers(1, 40))]
        else:
            stream[at:at] = draw(st.binary(max_size=40))
    return bytes(stream)


@given(st.binary(max_size=5000), CUTS)
@settings(deadline=None)
def test_arbitrary_bytes_instead_of_a_greeting(stream: bytes, cuts: list[int]) -> None:
    owner = feed(stream, cuts)
    check(owner)
    assert owner.opened == 0


@given(mutated(st.just(GREETING)), CUTS)
@settings(deadline=None)
def test_a_mutated_greeting(stream: bytes, cuts: list[int]) -> None:
    owner = feed(stream, cuts)
    check(owner)
    assert owner.opened == 0 or stream[: len(GREETING)].count(HELLO) == 1


@given(st.binary(max_size=5000), CUTS, st.booleans())
@settings(deadline=None)
def test_arbitrary_bytes_after_the_greeting(stream: bytes, cuts: list[int], integrity: bool) -> None:
    owner = feed(GREETING + stream, cuts, integrity=integrity)
    check(owner)
    assert owner.opened == 1


@given(mutated(FRAMES), CUTS, st.booleans())
@settings(deadline=None)
def test_mutated_frames_after_the_greeting(stream: bytes, cuts: list[int], integrity: bool) -> None:
    owner = feed(GREETING + stream, cuts, integrity=integrity)
    check(owner)
    assert owner.opened == 1


@given(st.binary(max_size=3000))
@settings(deadline=None)
def test_arbitrary_maps(payload: bytes) -> None:
    for read in (wire.unpack_map, wire.unpack_length, lambda data: auth.check_hello(ME, data)):
        try:
            read(payload)
        except wire.ProtocolError as error:
            assert "\n" not in str(error)


def test_the_largest_frames_fit_however_they_are_cut() -> None:
    frames = b"".join(wire.pack(wire.WRITE, bytes(wire.MAX_PAYLOAD_BYTES), sequence=number) for number in range(3))
    for cuts in ([], [1], [len(frames) // 2], list(range(0, len(frames), 4099))):
        owner = feed(GREETING + frames, cuts)
        assert owner.reasons == ["the test is over."]
