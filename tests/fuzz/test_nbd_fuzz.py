"""The same bytes have the same effect, however the network cuts them up; and garbage does no harm."""

import asyncio
import itertools
import struct

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from nbdserver import constants as c
from nbdserver.connection import Connection
from nbdserver.export import NO_ERRORS, Export
from nbdserver.handshake import Handshake
from nbdserver.limits import Limits

SIZE = 1024 * 1024
# A failing example is printed with its @reproduce_failure line; --hypothesis-seed=N repeats a whole run.
FUZZ = settings(max_examples=150, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))


class MemoryDisk(Export):
    """Storage in memory. In the last quarter reads take their time; `keep` holds on to written views."""

    name: str
    description: str
    size_bytes: int
    read_only: bool

    def __init__(self, keep: bool = False) -> None:
        self.name, self.description, self.size_bytes, self.read_only = "disk", "memory", SIZE, False
        self.data = bytearray(SIZE)
        self.keep = keep
        self.kept = []

    def write_batch(self, writes, done):
        if self.keep:
            self.kept.append((writes, done))
            return True
        self._store(writes, done)
        return False

    def _store(self, writes, done):
        for offset, data in writes:
            self.data[offset : offset + len(data)] = data
        done(NO_ERRORS)

    def release(self) -> None:
        kept, self.kept = self.kept, []
        for writes, done in kept:
            self._store(writes, done)

    def read_now(self, offset, length):
        return None if offset >= SIZE * 3 // 4 else bytes(self.data[offset : offset + length])

    async def read(self, offset, length):
        return bytes(length)

    async def write_durable(self, offset, data):
        self.data[offset : offset + len(data)] = data

    async def flush(self):
        await asyncio.sleep(0)

    async def trim(self, offset, length):
        await asyncio.sleep(0)

    async def zero(self, offset, length, punch):
        await asyncio.sleep(0)


class Shelf:
    """A directory, and the owner of one connection."""

    shutting_down = False

    def __init__(self, disk: Export) -> None:
        self.disk = disk

    def find(self, name):
        return self.disk if name in ("", "disk") else None

    def listing(self):
        return [self.disk]

    def admit(self, connection):
        return True

    def finished(self, connection):
        pass


class Wire(asyncio.Transport):
    """What a transport promises, with the network's part played by the test."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = bytearray()
        self.closing = False
        self.reading = True

    def write(self, data):
        self.sent += data

    def set_write_buffer_limits(self, high=None, low=None):
        pass

    def is_closing(self):
        return self.closing

    def close(self):
        self.closing = True

    abort = close

    def pause_reading(self):
        self.reading = False

    def resume_reading(self):
        self.reading = True


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    """Split at the given places (taken modulo the length)."""
    places = sorted({place % (len(data) + 1) for place in cuts} | {0, len(data)})
    return [data[start:stop] for start, stop in itertools.pairwise(places)]


def serve(chunks: list[bytes], *, keep: bool = False) -> tuple[bytes, bytes, bool]:
    """What a connection sent for these receives, the disk's contents, and whether it was closed."""

    async def main():
        disk = MemoryDisk(keep)
        wire = Wire()
        connection = Connection(Shelf(disk), Limits(in_flight_bytes=200_000, slow_requests=4))
        connection.connection_made(wire)

        async def settle():
            while True:
                others = asyncio.all_tasks() - {asyncio.current_task()}
                if not others and not disk.kept:
                    return
                disk.release()
                if others:
                    await asyncio.wait(others)

        for chunk in chunks:
            while chunk and not wire.closing:
                if not wire.reading:
                    await settle()
                    if not wire.reading:
                        break  # after DISC
                room = connection.get_buffer(-1)
                assert len(room) > 0
                taken = min(len(room), len(chunk))
                room[:taken] = chunk[:taken]
                chunk = chunk[taken:]
                connection.buffer_updated(taken)
        await settle()
        connection.connection_lost(None)
        assert connection.closed.is_set()
        return bytes(wire.sent), bytes(disk.data), wire.closing

    return asyncio.run(main())


OPTION_DATA = st.one_of(
    st.binary(max_size=40),
    st.builds(
        lambda name, infos: struct.pack(f">I{len(name)}sH{len(infos)}H", len(name), name, len(infos), *infos),
        st.sampled_from([b"", b"disk", b"nope", b"\xff", b"a\0"]),
        st.lists(st.integers(0, 5), max_size=5),
    ),
)
OPTIONS = st.lists(st.tuples(st.integers(0, 11), OPTION_DATA), max_size=8).map(
    lambda options: b"".join(struct.pack(">QII", c.OPTION_MAGIC, number, len(data)) + data for number, data in options)
)
CUTS = st.lists(st.integers(0, 10**7), max_size=30)


def shake(chunks: list[bytes]) -> tuple[bytes, object, bytes]:
    disk = MemoryDisk()
    handshake = Handshake(Shelf(disk))
    sent = b""
    rest = b""
    for chunk in chunks:
        if handshake.outcome is None:
            sent += handshake.feed(chunk)
        else:
            rest += chunk
    return sent, type(handshake.outcome), handshake.rest + rest


@FUZZ
@given(st.integers(0, 4), OPTIONS, st.binary(max_size=50), CUTS)
def test_handshake_does_not_depend_on_the_cuts(flags, options, tail, cuts):
    data = struct.pack(">I", flags) + options + tail
    whole = shake([data])
    event(str(whole[1]))
    assert shake(cut(data, cuts)) == whole
    assert shake([data[n : n + 1] for n in range(len(data))]) == whole


@FUZZ
@given(st.binary(max_size=2000), CUTS)
def test_garbage_does_not_upset_the_handshake(data, cuts):
    assert shake(cut(data, cuts)) == shake([data])


@st.composite
def requests(draw):
    """[(command, length of the reply's data, bytes)]; slow commands get places of their own."""
    found = []
    for cookie in range(draw(st.integers(1, 12))):
        command = draw(st.sampled_from([0, 0, 1, 1, 1, 1, 3, 4, 5, 6, 9]))
        flags = draw(st.sampled_from([0, 0, 0, 0, 1, 2, 4]))
        offset = draw(st.integers(0, SIZE // 2) | st.sampled_from([SIZE - 1, SIZE, 2**64 - 1]))
        length = draw(st.sampled_from([0, 1, 511, 4096, 70_000, 131_072, 131_073, 300_000, 700_000]))
        if command == c.CMD_FLUSH:
            offset = length = 0
        if command == c.CMD_WRITE and flags == c.CMD_FLAG_FUA:
            offset, length = SIZE * 3 // 4 + cookie * 4096, min(length, 4096)
        elif offset < SIZE * 3 // 4:
            length = min(length, SIZE * 3 // 4 - offset)  # plain requests stay clear of the slow ones' places
        payload = bytes([cookie + 1]) * length if command == c.CMD_WRITE else b""
        header = struct.pack(">IHHQQI", c.REQUEST_MAGIC, flags, command, cookie, offset, length)
        found.append((length if command == c.CMD_READ else 0, header + payload))
    return found


def split_replies(sent: bytes, lengths: list[int]) -> dict[int, tuple[int, bytes]]:
    """{cookie: (error, data)}; fails when the bytes are not exactly one reply per request."""
    found = {}
    while sent:
        magic, error, cookie = struct.unpack_from(">IIQ", sent)
        assert magic == c.SIMPLE_REPLY_MAGIC
        assert cookie not in found
        stop = 16 + (0 if error else lengths[cookie])
        assert len(sent) >= stop
        found[cookie] = (error, sent[16:stop])
        sent = sent[stop:]
    assert len(found) == len(lengths)
    return found


OPENING = struct.pack(">IQII", 3, c.OPTION_MAGIC, c.OPT_EXPORT_NAME, 0)
PREAMBLE_BYTES = 18 + 10


@FUZZ
@given(requests(), CUTS, CUTS)
def test_transmission_does_not_depend_on_the_cuts(batch, some_cuts, other_cuts):
    lengths = [length for length, _ in batch]
    data = OPENING + b"".join(sent for _, sent in batch)
    runs = []
    for chunks in ([data], cut(data, some_cuts), cut(data, other_cuts)):
        sent, contents, closed = serve(chunks)
        assert not closed
        runs.append((split_replies(sent[PREAMBLE_BYTES:], lengths), contents))
    same = runs[0] == runs[1] == runs[2]
    assert same


@FUZZ
@given(requests().map(lambda batch: [one for one in batch if not one[0]]), CUTS)
def test_an_export_that_keeps_the_views_gets_the_same_data(batch, cuts):
    data = OPENING + b"".join(sent for _, sent in batch)
    same = serve(cut(data, cuts), keep=True)[1] == serve([data])[1]
    assert same  # not the comparison itself: pytest would spend minutes on showing two megabytes


@FUZZ
@given(requests(), st.binary(min_size=28, max_size=3000), CUTS)
def test_garbage_behind_requests_closes_and_loses_no_reply(batch, garbage, cuts):
    lengths = [length for length, _ in batch]
    data = OPENING + b"".join(sent for _, sent in batch) + b"\xff" + garbage
    sent, _, closed = serve(cut(data, cuts))
    assert closed
    split_replies(sent[PREAMBLE_BYTES:], lengths)


@pytest.mark.parametrize("step", [1, 27, 28, 29, 4095])
def test_steady_drips(step):
    batch = [
        struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, c.CMD_WRITE, n, n * 5000, 5000) + bytes([n]) * 5000 for n in range(4)
    ]
    data = OPENING + b"".join(batch) + struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, c.CMD_DISC, 9, 0, 0)
    sent, contents, closed = serve([data[n : n + step] for n in range(0, len(data), step)])
    assert closed
    assert len(split_replies(sent[PREAMBLE_BYTES:], [0] * 4)) == 4
    assert contents[:20000] == b"".join(bytes([n]) * 5000 for n in range(4))
