"""The dirty bitmap, against a plain set of block numbers as its model."""

import zlib
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from replica.bitmap import BLOCK_SIZE, SECTOR_BITS, Bitmap

SIZES = st.sampled_from([1, 5, SECTOR_BITS - 1, SECTOR_BITS, SECTOR_BITS + 1, 3 * SECTOR_BITS + 77])


def dirty_blocks(bitmap: Bitmap, limit: int = 1 << 40) -> set[int]:
    found: set[int] = set()
    at = 0
    while (run := bitmap.next_run(at, limit)) is not None:
        first, count = run
        assert first >= at and 1 <= count <= limit
        found.update(range(first, first + count))
        at = first + count
    return found


def filled(blocks: int, dirty: set[int], ones: bool) -> Bitmap:
    """A bitmap with exactly these dirty blocks, reached from the all-clean or from the all-dirty state."""
    bitmap = Bitmap(blocks)
    if ones:
        bitmap.set_all()
        for block in set(range(blocks)) - dirty:
            bitmap.clear_range(block, 1)
    else:
        for block in dirty:
            bitmap.set_range(block, 1)
    return bitmap


class BitmapMachine(RuleBasedStateMachine):
    """Random operations on the bitmap and on a set; both must always tell the same."""

    @initialize(blocks=SIZES)
    def start(self, blocks: int) -> None:
        self.bitmap = Bitmap(blocks)
        self.model: set[int] = set()
        self.stored: dict[int, bytes] = {}

    def draw_range(self, data: st.DataObject) -> tuple[int, int]:
        blocks = self.bitmap.blocks
        edge = st.sampled_from([min(at, blocks - 1) for at in (0, SECTOR_BITS - 1, SECTOR_BITS, blocks)])
        first = data.draw(st.one_of(st.integers(0, blocks - 1), edge))
        count = data.draw(st.one_of(st.integers(0, min(3, blocks - first)), st.integers(0, blocks - first)))
        return first, count

    @rule(data=st.data())
    def set_range(self, data: st.DataObject) -> None:
        first, count = self.draw_range(data)
        self.bitmap.set_range(first, count)
        self.model.update(range(first, first + count))

    @rule(data=st.data())
    def clear_range(self, data: st.DataObject) -> None:
        first, count = self.draw_range(data)
        self.bitmap.clear_range(first, count)
        self.model.difference_update(range(first, first + count))

    @rule(data=st.data())
    def set_bytes(self, data: st.DataObject) -> None:
        offset = data.draw(st.integers(0, self.bitmap.blocks * BLOCK_SIZE - 1))
        length = data.draw(st.integers(0, min(100_000, self.bitmap.blocks * BLOCK_SIZE - offset)))
        self.bitmap.set_bytes(offset, length)
        if length:
            self.model.update(range(offset // BLOCK_SIZE, (offset + length - 1) // BLOCK_SIZE + 1))

    @rule()
    def set_all(self) -> None:
        self.bitmap.set_all()
        self.model = set(range(self.bitmap.blocks))
        self.stored.clear()

    @rule()
    def clear_all(self) -> None:
        self.bitmap.clear_all()
        self.model.clear()
        self.stored.clear()

    @rule(more=st.integers(0, SECTOR_BITS + 3))
    @precondition(lambda self: self.bitmap.blocks < 6 * SECTOR_BITS)
    def grow(self, more: int) -> None:
        old = self.bitmap.blocks
        self.bitmap.grow(old + more)
        self.model.update(range(old, old + more))

    @rule(data=st.data())
    def shrink(self, data: st.DataObject) -> None:
        blocks = data.draw(st.integers(1, self.bitmap.blocks))
        self.bitmap.shrink(blocks)
        self.model = {block for block in self.model if block < blocks}

    @rule()
    def store_and_load(self) -> None:
        for sector in self.bitmap.take_changed():
            self.stored[sector] = self.bitmap.encode_sector(sector, 7)
        loaded = Bitmap(self.bitmap.blocks)
        if self.bitmap.default_ones:
            loaded.set_all()
        for sector, data in self.stored.items():
            if sector < loaded.sectors:  # others stay where they are when it is cut
                loaded.load_sector(sector, 7, data)
        assert dirty_blocks(loaded) == self.model
        assert loaded.count == len(self.model)
        assert not loaded.changed

    @rule(data=st.data(), limit=st.integers(1, 9000))
    def look_up(self, data: st.DataObject, limit: int) -> None:
        first, count = self.draw_range(data)
        assert self.bitmap.has(first) == (first in self.model)
        expected_any = any(block in self.model for block in range(first, first + count))
        assert self.bitmap.any_in(first, count) == expected_any
        expected = min((block for block in self.model if block >= first), default=None)
        run = self.bitmap.next_run(first, limit)
        assert (run and run[0]) == expected
        if run is not None:
            assert run[1] <= limit
            assert all(block in self.model for block in range(run[0], sum(run)))
            assert run[1] == limit or sum(run) not in self.model

    @invariant()
    def same(self) -> None:
        if hasattr(self, "bitmap"):
            assert self.bitmap.count == len(self.model)
            assert dirty_blocks(self.bitmap) == self.model


TestAgainstModel = BitmapMachine.TestCase
TestAgainstModel.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def sparse_sets(blocks: int) -> st.SearchStrategy[set[int]]:
    return st.sets(st.integers(0, blocks - 1), max_size=40)


@settings(deadline=None, max_examples=60)
@given(blocks=SIZES, data=st.data(), ones=st.booleans(), inverse=st.booleans(), mine_ones=st.booleans())
def test_merging_a_packed_bitmap_is_a_union(
    blocks: int, data: st.DataObject, ones: bool, inverse: bool, mine_ones: bool
) -> None:
    theirs, mine = data.draw(sparse_sets(blocks)), data.draw(sparse_sets(blocks))
    if inverse:
        theirs = set(range(blocks)) - theirs
    sender, receiver = filled(blocks, theirs, ones), filled(blocks, mine, mine_ones)
    for message in sender.pack(1024):
        assert len(message) <= 1024
        receiver.merge_packed(message)
    assert dirty_blocks(receiver) == mine | theirs
    assert receiver.count == len(mine | theirs)
    assert dirty_blocks(sender) == theirs


@settings(deadline=None, max_examples=40)
@given(blocks=SIZES, data=st.data(), ones=st.booleans())
def test_exported_sectors_merge_into_a_union(blocks: int, data: st.DataObject, ones: bool) -> None:
    theirs, mine = data.draw(sparse_sets(blocks)), data.draw(sparse_sets(blocks))
    sender, receiver = filled(blocks, theirs, ones), filled(blocks, mine, False)
    exported = list(sender.export_sectors())
    assert all(any(bits) for _, bits in exported)
    assert all(one[0] < other[0] for one, other in pairwise(exported))
    for index, bits in exported:
        receiver.merge_sector(index, bits)
    assert dirty_blocks(receiver) == mine | theirs


def test_packing_is_a_snapshot() -> None:
    sender = filled(40 * SECTOR_BITS, set(range(0, 40 * SECTOR_BITS, 5)), False)
    before = dirty_blocks(sender)
    messages = sender.pack(1024)
    sender.clear_all()
    receiver = Bitmap(sender.blocks)
    for message in messages:
        receiver.merge_packed(message)
    assert dirty_blocks(receiver) == before


def test_an_all_dirty_terabyte_is_one_tiny_message() -> None:
    sender = Bitmap((1 << 40) // BLOCK_SIZE)
    sender.set_all()
    (message,) = sender.pack(4096)
    assert len(message) < 64
    receiver = Bitmap(sender.blocks)
    receiver.merge_packed(message)
    assert receiver.count == receiver.blocks
    assert receiver.default_ones and receiver.replaced
    assert receiver.next_run(0, 1 << 40) == (0, receiver.blocks)


def test_a_half_synced_terabyte_packs_small_and_is_walked_fast() -> None:
    sender = Bitmap((1 << 40) // BLOCK_SIZE)
    sender.set_all()
    half = sender.blocks // 2
    sender.clear_range(0, half)
    messages = list(sender.pack(4096))
    assert sum(map(len, messages)) < 200
    assert sender.next_run(0, 256) == (half, 256)
    receiver = Bitmap(sender.blocks)
    for message in messages:
        receiver.merge_packed(message)
    assert receiver.count == sender.count
    assert receiver.next_run(0, 1 << 40) == (half, sender.blocks - half)


def test_an_empty_bitmap_packs_to_nothing() -> None:
    assert list(Bitmap(100).pack(1024)) == []


def entry(kind: int, first: int, sectors: int, bits: bytes = b"") -> bytes:
    raw = bytes([1, kind]) + first.to_bytes(4, "little") + sectors.to_bytes(4, "little") + bits
    return zlib.compress(raw)


GARBAGE = {
    "not compressed": b"hello",
    "empty": b"",
    "no version": zlib.compress(b""),
    "unknown version": zlib.compress(b"\x09"),
    "half an entry": zlib.compress(b"\x01\x01\x00"),
    "unknown kind": entry(7, 0, 1),
    "bits missing": entry(0, 0, 1, bytes(9)),
    "bits of two sectors": entry(0, 0, 2, bytes(1008)),
    "sector out of range": entry(1, 3, 1),
    "run out of range": entry(1, 0, 2**32 - 1),
    "empty run": entry(1, 0, 0),
    "a bomb": zlib.compress(bytes(50_000_000)),
    "cut short": zlib.compress(b"\x01" + bytes(5000))[:-3],
    "trailing bytes": zlib.compress(b"\x01") + b"x",
}


@pytest.mark.parametrize("message", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_refused_and_changes_nothing(message: bytes) -> None:
    bitmap = filled(3 * SECTOR_BITS, {5}, False)
    with pytest.raises(ValueError, match="bitmap message"):
        bitmap.merge_packed(message)
    assert dirty_blocks(bitmap) == {5}


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_never_do_anything_but_a_value_error(body: bytes) -> None:
    for message in (body, zlib.compress(b"\x01" + body)):
        bitmap = Bitmap(2 * SECTOR_BITS)
        try:
            bitmap.merge_packed(message)
        except ValueError:
            assert bitmap.count == 0


@pytest.mark.parametrize("ones", [False, True])
def test_a_damaged_sector_is_all_dirty(ones: bool) -> None:
    source = filled(2 * SECTOR_BITS, {1, SECTOR_BITS + 3}, ones)
    good = source.encode_sector(1, 5)
    assert len(good) == 512
    first_bit, last_bit = bytes([good[0] ^ 1]) + good[1:], good[:-1] + bytes([good[-1] ^ 128])
    for data in (first_bit, last_bit, good[:100] + bytes(412), b"x" * 512):
        bitmap = Bitmap(source.blocks)
        bitmap.load_sector(1, 5, data)
        assert dirty_blocks(bitmap) == set(range(SECTOR_BITS, 2 * SECTOR_BITS))


def test_a_sector_of_another_epoch_or_place_is_all_dirty() -> None:
    source = filled(2 * SECTOR_BITS, {1}, False)
    data = source.encode_sector(0, 5)
    for index, epoch in ((0, 6), (1, 5)):
        bitmap = Bitmap(source.blocks)
        bitmap.load_sector(index, epoch, data)
        assert bitmap.count == SECTOR_BITS


def test_an_explicitly_clean_sector_differs_from_a_hole() -> None:
    bitmap = Bitmap(2 * SECTOR_BITS)
    bitmap.set_all()
    assert bitmap.encode_sector(0, 1) == bytes(512)
    bitmap.clear_range(0, SECTOR_BITS)
    data = bitmap.encode_sector(0, 1)
    assert data != bytes(512)
    loaded = Bitmap(2 * SECTOR_BITS)
    loaded.set_all()
    loaded.load_sector(0, 1, data)
    assert dirty_blocks(loaded) == set(range(SECTOR_BITS, 2 * SECTOR_BITS))


def test_blocks_beyond_the_end_never_count() -> None:
    bitmap = Bitmap(10)
    bitmap.merge_sector(0, b"\xff" * 504)
    assert bitmap.count == 10
    wide = filled(100, set(range(100)), False)
    narrow = Bitmap(10)
    narrow.load_sector(0, 3, wide.encode_sector(0, 3))
    assert narrow.count == 10
    for message in wide.pack(1024):
        narrow.merge_packed(message)
    assert narrow.count == 10


def test_ranges_outside_are_refused() -> None:
    bitmap = Bitmap(10)
    for first, count in ((-1, 1), (10, 1), (9, 2), (0, -1)):
        for method in (bitmap.set_range, bitmap.clear_range, bitmap.any_in):
            with pytest.raises(ValueError, match="outside"):
                method(first, count)
    with pytest.raises(ValueError, match="outside"):
        bitmap.has(10)
    for blocks in (0, -4):
        with pytest.raises(ValueError, match="at least one"):
            Bitmap(blocks)
    with pytest.raises(ValueError, match="shrink"):
        bitmap.grow(9)
    for blocks in (0, 11):
        with pytest.raises(ValueError, match="cut"):
            bitmap.shrink(blocks)
    with pytest.raises(ValueError, match="sector"):
        bitmap.merge_sector(0, b"")
    with pytest.raises(ValueError, match="sector"):
        bitmap.load_sector(1, 0, bytes(512))
    with pytest.raises(ValueError, match="1023"):
        bitmap.pack(1023)


def test_only_what_changes_is_reported_changed() -> None:
    bitmap = Bitmap(4 * SECTOR_BITS)
    bitmap.set_range(SECTOR_BITS - 1, 2)
    assert bitmap.take_changed() == [0, 1]
    assert bitmap.take_changed() == []
    bitmap.set_range(SECTOR_BITS - 1, 2)
    bitmap.clear_range(2 * SECTOR_BITS, 5)
    assert bitmap.take_changed() == []
    bitmap.clear_range(0, bitmap.blocks)
    assert bitmap.take_changed() == [0, 1]
    assert not bitmap.replaced
