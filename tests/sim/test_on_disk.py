"""The simulator's own reader of metadata agrees with the node's, whatever is torn or rotten."""

import struct
from dataclasses import asdict

import msgpack
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from replica import superblock as superblocks
from replica.activity_log import ActivityLog, recover
from replica.bitmap import SECTOR_BITS, SECTOR_BYTES, Bitmap
from replica.generation import Generations
from replica.superblock import MetadataError, PeerRecord, Superblock
from tests.sim.on_disk import Reader, Unreadable

IDS = st.integers(1, (1 << 64) - 1)
LOG_AT, LOG_COPY_BYTES = 8192, 4096
BITMAP_AT = LOG_AT + 4 * LOG_COPY_BYTES
FIRST_BLOCKS = st.integers(1, 3 * SECTOR_BITS + 100)


class Image(bytes):
    """A metadata file; too long to be printed."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes, XXH3 {xxhash.xxh3_64_hexdigest(self)}>"


@st.composite
def superblock_of(draw: st.DrawFn, blocks: int) -> Superblock:
    flags = {
        name: draw(st.booleans())
        for name in ("just_created", "inconsistent", "outdated", "primary", "ahead", "promoted_alone")
    }
    return Superblock(
        cluster="c",
        resource="r",
        volume=0,
        node="n",
        device_id=draw(IDS),
        size_bytes=blocks * 4096 - draw(st.sampled_from((0, 512, 4095))),
        al_slots=draw(st.integers(1, 1000)),
        backing_fingerprint="inode:1",
        peers=[PeerRecord("p", 0, draw(st.booleans()))],
        generations=Generations(draw(IDS), draw(IDS), tuple(draw(st.lists(IDS, max_size=3)))),
        bitmap_epoch=draw(st.integers(0, 3)),
        bitmap_default_ones=draw(st.booleans()),
        **flags,
    )


@st.composite
def damaged(draw: st.DrawFn, new: bytes, old: bytes) -> bytes:
    """What a write of `new` over `old` may have left: all, nothing, some sectors; or bytes that have rotted."""
    what = draw(st.sampled_from(("whole", "whole", "whole", "old", "torn", "rotten", "zeroes")))
    if what == "whole":
        return new
    if what == "old":
        return old
    if what == "zeroes":
        return bytes(len(new))
    if what == "torn":
        pick = [draw(st.booleans()) for _ in range(len(new) // SECTOR_BYTES)]
        return b"".join(
            (new if is_new else old)[at * SECTOR_BYTES : (at + 1) * SECTOR_BYTES] for at, is_new in enumerate(pick)
        )
    rotten = bytearray(new)
    # Mostly where something is.
    for at in draw(st.lists(st.one_of(st.integers(0, 60), st.integers(0, len(new) - 1)), min_size=1, max_size=3)):
        rotten[at] ^= draw(st.integers(1, 255))
    return bytes(rotten)


@st.composite
def log_copies(draw: st.DrawFn) -> list[bytes]:
    snapshots = [b"".ljust(LOG_COPY_BYTES, b"\0")]
    for _ in range(2):
        extents = draw(st.sets(st.integers(0, 20), max_size=6))
        snapshots.append(ActivityLog.encode(extents, draw(st.integers(0, 5)), LOG_COPY_BYTES))
    pairs = draw(st.permutations(snapshots))
    return [draw(damaged(pairs[copy // 2], draw(st.sampled_from(snapshots)))) for copy in range(4)]


@st.composite
def stored_bitmap(draw: st.DrawFn, blocks: int) -> bytes:
    bitmap = Bitmap(blocks)
    bitmap.default_ones = draw(st.booleans())
    for _ in range(draw(st.integers(0, 4))):
        first = draw(st.integers(0, blocks - 1))
        bitmap.set_range(first, draw(st.integers(1, blocks - first)))
    sectors = []
    for number in range(bitmap.sectors):
        place = draw(st.sampled_from((number, number, number, 0)))
        data = bitmap.encode_sector(place, draw(st.integers(0, 3)))
        sectors.append(draw(damaged(data, bytes(SECTOR_BYTES))))
    return b"".join(sectors)


@st.composite
def images(draw: st.DrawFn) -> Image:
    blocks = draw(FIRST_BLOCKS)
    first = superblocks.encode(draw(superblock_of(blocks)), draw(st.integers(0, 3)))
    second = superblocks.encode(draw(superblock_of(blocks)), draw(st.integers(0, 3)))
    copies = [draw(damaged(first, second)), draw(damaged(second, first))]
    return Image(b"".join((*copies, *draw(log_copies()), draw(stored_bitmap(blocks)))))


def _by_the_node(image: bytes) -> tuple[Superblock, bytes, frozenset[int] | None, int]:
    chosen = superblocks.choose([image[:4096], image[4096:8192]], "the image")
    logs = [image[LOG_AT + LOG_COPY_BYTES * copy :][:LOG_COPY_BYTES] for copy in range(4)]
    superblock = chosen.superblock
    bitmap = Bitmap(superblock.blocks)
    if superblock.bitmap_default_ones:
        bitmap.set_all()
    for number in range(bitmap.sectors):
        bitmap.load_sector(number, superblock.bitmap_epoch, image[BITMAP_AT + number * SECTOR_BYTES :][:SECTOR_BYTES])
    bits = 0
    cursor = 0
    while (run := bitmap.next_run(cursor, superblock.blocks)) is not None:
        bits |= ((1 << run[1]) - 1) << run[0]
        cursor = sum(run)
    return superblock, chosen.data, recover(logs).extents, bits


def _agree(reader: Reader, image: bytes) -> None:
    try:
        superblock, data, extents, bits = _by_the_node(image)
    except MetadataError:
        with pytest.raises(Unreadable):
            reader.read()
        assert reader.superblock is None
        return
    reader.read()
    found = reader.superblock
    assert found is not None
    fields = asdict(superblock)
    (peer,) = fields.pop("peers")
    generations = fields.pop("generations")
    for name, value in fields.items():
        assert getattr(found, name) == value, name
    assert vars(found.peers[0]) == peer
    assert {**vars(found.generations), "history": tuple(found.generations.history)} == generations
    assert found.blocks == superblock.blocks
    assert reader.raw == data
    assert reader.extents == extents
    assert reader.bits == bits


@settings(deadline=None)
@given(images())
def test_both_readers_agree(image: Image) -> None:
    _agree(Reader(image), image)


@settings(deadline=None, max_examples=40)
@given(st.lists(images(), min_size=2, max_size=4))
def test_a_reader_that_goes_on_sees_each_change(states: list[Image]) -> None:
    image = bytearray(max(map(len, states)))
    reader = Reader(image)
    for state in states:
        image[: len(state)] = state
        _agree(reader, bytes(image))


def test_the_example_of_the_document() -> None:
    """Made by hand after docs/on-disk.md, with a field that no version knows yet and without those that came late."""
    body = msgpack.packb(
        {
            "size_bytes": 5000,
            "al_offset": LOG_AT,
            "al_copy_bytes": LOG_COPY_BYTES,
            "bitmap_offset": BITMAP_AT,
            "bitmap_epoch": 7,
            "generations": {"current": 5, "base": 0, "history": [3]},
            "peers": [{"name": "other"}],
            "from_the_future": 42,
        }
    )
    head = struct.pack("<8sIIQ", b"RplcaMD\n", 1, len(body), 9)
    copy = (head + xxhash.xxh3_128(head + body).digest() + body).ljust(4096, b"\0")
    log_head = struct.pack("<8sIIQ", b"RplcaAL\n", 1, 2, 4)
    extents = struct.pack("<2I", 0, 6)
    log = (log_head + xxhash.xxh3_128(log_head + extents).digest() + extents).ljust(LOG_COPY_BYTES, b"\0")
    bits = (0b10).to_bytes(504, "little")
    seed = xxhash.xxh64(struct.pack("<QQ", 0, 7)).intdigest()
    sector = bits + struct.pack("<Q", xxhash.xxh64(bits, seed).intdigest())
    reader = Reader(copy + bytes(4096) + log + log + bytes(2 * LOG_COPY_BYTES) + sector)
    reader.read()
    assert reader.superblock is not None
    assert reader.superblock.from_the_future == 42
    assert reader.superblock.promoted_alone is False
    assert reader.superblock.peers[0].outdated is False
    assert reader.superblock.blocks == 2
    assert reader.extents == {0, 6}
    assert reader.bits == 0b10


def test_a_newer_format_is_not_read() -> None:
    body = msgpack.packb({})
    head = struct.pack("<8sIIQ", b"RplcaMD\n", 2, len(body), 1)
    copy = (head + xxhash.xxh3_128(head + body).digest() + body).ljust(4096, b"\0")
    with pytest.raises(Unreadable, match="format version 2"):
        Reader(copy + copy).read()
