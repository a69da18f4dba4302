"""Metadata on a disk that loses power: whatever is cut or torn, loading gives the state before or after an update.

The random tests print their seed; REPLICA_TEST_SEED=n replays one.
"""

import asyncio
import fcntl
import os
import random
import struct
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import xxhash

from replica.activity_log import DEFAULT_SLOTS
from replica.bitmap import SECTOR_BITS, Bitmap
from replica.generation import MAX_ID, Generations
from replica.metadata import Metadata, MetadataError, MetadataFile, create_metadata, dump_metadata
from replica.store import FileOfMetadata
from replica.superblock import PeerRecord, Superblock, encode

GIB = 1 << 30
SECTOR = 512
Image = dict[int, bytes]  # disk sector -> its bytes; a missing one is all zero
Op = tuple[str, int, bytes]


class FakeDisk(MetadataFile):
    """A file of 512-byte sectors that records what is done to it, and fails when told to."""

    def __init__(self, image: Image | None = None) -> None:
        self.image: Image = dict(image or {})
        self.ops: list[Op] = []
        self.fail_at: int | None = None
        self.gate: asyncio.Event | None = None
        self.reached = asyncio.Event()

    def _do(self, op: Op) -> None:
        if self.fail_at is not None and len(self.ops) == self.fail_at:
            self.fail_at = None
            raise OSError(5, "Input/output error")
        self.ops.append(op)
        for sector, data in sectors_of(op):
            self.image[sector] = data

    async def read(self, offset: int, length: int) -> bytes:
        assert offset % SECTOR == length % SECTOR == 0
        first = offset // SECTOR
        return b"".join(self.image.get(first + at, bytes(SECTOR)) for at in range(length // SECTOR))

    async def write(self, offset: int, data: bytes) -> None:
        self.reached.set()
        if self.gate is not None:
            await self.gate.wait()
        self._do(("write", offset, data))

    async def flush(self) -> None:
        self._do(("flush", 0, b""))

    async def punch(self, offset: int, length: int) -> None:
        self._do(("punch", offset, bytes(length)))

    async def next_data(self, offset: int, end: int) -> tuple[int, int]:
        found = [at for at, data in self.image.items() if offset // SECTOR <= at < end // SECTOR and any(data)]
        return (min(found) * SECTOR, min(found) * SECTOR + SECTOR) if found else (end, end)


def sectors_of(op: Op) -> Iterator[tuple[int, bytes]]:
    _, offset, data = op
    assert offset % SECTOR == len(data) % SECTOR == 0
    for at in range(0, len(data), SECTOR):
        yield (offset + at) // SECTOR, data[at : at + SECTOR]


def after_power_cuts(image: Image, ops: list[Op], rng: random.Random, tries: int = 6) -> Iterator[tuple[int, Image]]:
    """(operations begun, what the disk holds) for a power cut after each of them.

    Of the sectors written since the last flush, none, all, each prefix (in order) and random subsets survive.
    """
    durable, pending = dict(image), list[tuple[int, bytes]]()
    for begun in range(len(ops) + 1):
        survivors = [pending[:length] for length in range(min(len(pending), 40) + 1)] + [pending]
        survivors += [[one for one in pending if rng.random() < 0.5] for _ in range(tries if pending else 0)]
        for survivor in survivors:
            yield begun, {**durable, **dict(survivor)}
        if begun < len(ops):
            if ops[begun][0] == "flush":
                durable.update(pending)
                pending = []
            else:
                pending.extend(sectors_of(ops[begun]))


def seeded() -> random.Random:
    seed = int(os.environ.get("REPLICA_TEST_SEED", "0")) or random.randrange(1, 1 << 32)
    print(f"REPLICA_TEST_SEED={seed}")
    return random.Random(seed)


def new_superblock(**changes: Any) -> Superblock:
    fields: dict[str, Any] = {
        "cluster": "web",
        "resource": "r0",
        "volume": 0,
        "node": "node1",
        "device_id": 77,
        "size_bytes": GIB,
        "al_slots": 61,
        "backing_fingerprint": "inode:1",
        "peers": [PeerRecord("node2")],
        # Long enough that an update changes several disk sectors, and can be torn between them.
        "generations": Generations(MAX_ID, 0, tuple(range(MAX_ID - 32, MAX_ID))),
    }
    return Superblock(**{**fields, **changes})


async def formatted(**changes: Any) -> tuple[FakeDisk, Metadata]:
    disk = FakeDisk()
    metadata = await Metadata.format(disk, new_superblock(**changes))
    disk.ops.clear()
    return disk, metadata


async def loaded(image: Image) -> Metadata:
    return await Metadata.load(FakeDisk(image))


async def loaded_bitmap(metadata: Metadata) -> Bitmap:
    bitmap = Bitmap(metadata.superblock.blocks)
    await metadata.load_bitmap(bitmap)
    assert not bitmap.changed and not bitmap.replaced
    return bitmap


def dirty_blocks(bitmap: Bitmap) -> set[int]:
    found: set[int] = set()
    at = 0
    while (run := bitmap.next_run(at, bitmap.blocks)) is not None:
        found.update(range(run[0], sum(run)))
        at = sum(run)
    return found


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await work()

    asyncio.run(main())


# ---- superblock


def change(superblock: Superblock) -> None:
    superblock.generations = Generations(6, 5, tuple(range(MAX_ID - 40, MAX_ID - 8)))
    superblock.primary, superblock.just_created, superblock.inconsistent = True, False, False
    superblock.peers[0].outdated = True


def test_a_superblock_survives_the_trip() -> None:
    async def work() -> None:
        disk, metadata = await formatted()
        change(metadata.superblock)
        await metadata.save_superblock()
        again = await loaded(disk.image)
        assert again.superblock == metadata.superblock
        assert again.warnings == []

    run(work)


def test_a_superblock_update_is_old_or_new_wherever_the_power_is_cut() -> None:
    rng = seeded()

    async def work() -> None:
        disk, metadata = await formatted()
        before = dict(disk.image)
        old = (await loaded(before)).superblock
        change(metadata.superblock)
        await metadata.save_superblock()
        for begun, image in after_power_cuts(before, disk.ops, rng, tries=40):
            survivor = FakeDisk(image)
            found = await Metadata.load(survivor)
            assert found.superblock in (old, metadata.superblock)
            if begun >= 2:  # the first copy was flushed
                assert found.superblock == metadata.superblock
            for copy in (0, 8):  # loading has mended the other copy: now any one of them may rot
                rotten = {**survivor.image, copy: b"\xee" * SECTOR}
                assert (await loaded(rotten)).superblock == found.superblock

    run(work)


@pytest.mark.parametrize("fails_at", range(4))
def test_after_a_failed_update_the_good_copy_is_not_put_at_risk(fails_at: int) -> None:
    rng = seeded()

    async def work() -> None:
        disk, metadata = await formatted()
        states = [(await loaded(disk.image)).superblock]
        disk.fail_at = fails_at
        metadata.superblock.ahead = True
        with pytest.raises(OSError, match="Input/output"):
            await metadata.save_superblock()
        states.append(replace(metadata.superblock))
        failed_copy = (0, 8)[fails_at // 2]
        disk.image[failed_copy] = b"\xdd" * SECTOR  # what a failed write or flush leaves is anything
        before = dict(disk.image)
        disk.ops.clear()
        metadata.superblock.outdated = True
        await metadata.save_superblock()
        states.append(metadata.superblock)
        for _, image in after_power_cuts(before, disk.ops, rng):
            assert (await loaded(image)).superblock in states
        assert (await loaded(disk.image)).superblock == metadata.superblock

    run(work)


@pytest.mark.parametrize("copy", [0, 1])
def test_one_damaged_superblock_is_a_warning_and_is_rewritten(copy: int) -> None:
    async def work() -> None:
        disk, metadata = await formatted()
        disk.image[copy * 8] = bytes([1]) + disk.image[copy * 8][1:]
        again = await Metadata.load(disk)
        assert again.superblock == metadata.superblock
        (warning,) = again.warnings
        assert f"copy {'AB'[copy]}" in warning
        assert disk.image[0] == disk.image[8]
        assert (await Metadata.load(disk)).warnings == []

    run(work)


def test_two_damaged_superblocks_are_refused_and_left_alone() -> None:
    async def work() -> None:
        disk, _ = await formatted()
        disk.image[0] = disk.image[8] = b"x" + disk.image[0][1:]
        before = dict(disk.image)
        with pytest.raises(MetadataError, match=r"both copies .* damaged: .*create-md --force"):
            await Metadata.load(disk, where="/var/lib/replica/r0-0.md")
        assert disk.image == before
        with pytest.raises(MetadataError, match="no metadata"):
            await Metadata.load(FakeDisk())

    run(work)


def raw_superblock(version: int, body: bytes, sequence: int = 9) -> Image:
    header = struct.pack("<8sIIQ", b"RplcaMD\n", version, len(body), sequence)
    data = (header + xxhash.xxh3_128_digest(header + body) + body).ljust(4096, b"\0")
    return dict(sectors_of(("write", 0, data)))


def test_a_newer_format_is_refused() -> None:
    async def work() -> None:
        disk, _ = await formatted()
        for image in (raw_superblock(2, b"\x80"), {**disk.image, **raw_superblock(2, b"\x80")}):
            with pytest.raises(MetadataError, match=r"format version 2, .* knows 1 only"):
                await loaded(image)

    run(work)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("size_bytes",), 0),
        (("size_bytes",), "1G"),
        (("node",), None),
        (("node",), "n" * 256),
        (("peers",), []),
        (("peers",), [{"name": "n"}]),
        (("primary",), 1),
        (("parted_as_primary",), None),
        (("generations",), 5),
        (("generations", "history"), list(range(1, 34))),
        (("generations", "history"), [0]),
        (("generations", "current"), -1),
        (("al_copy_bytes",), 1 << 40),
    ],
)
def test_nonsense_with_a_good_checksum_is_refused(path: tuple[str, ...], value: object) -> None:
    data = encode(new_superblock(), 1)
    body = msgpack.unpackb(data[40 : 40 + struct.unpack_from("<8sII", data)[2]])
    target = body
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value

    async def work() -> None:
        for bad in (msgpack.packb(body), b"\xc1", b"", b"\x05"):
            with pytest.raises(MetadataError, match="can't be used"):
                await loaded(raw_superblock(1, bad))

    run(work)


@pytest.mark.parametrize("value", [None, False, True])
def test_older_metadata_do_not_say_who_parted_as_primary(value: bool | None) -> None:
    data = encode(new_superblock(parted_as_primary=True), 1)
    body = msgpack.unpackb(data[40 : 40 + struct.unpack_from("<8sII", data)[2]])
    if value is None:
        del body["parted_as_primary"]
    else:
        body["parted_as_primary"] = value

    async def work() -> None:
        metadata = await loaded(raw_superblock(1, msgpack.packb(body)))
        assert metadata.superblock == new_superblock(parted_as_primary=value is True)

    run(work)


def test_what_can_not_be_stored_is_refused_before_the_disk_is_touched() -> None:
    for bad in (
        new_superblock(size_bytes=0),
        new_superblock(device_id=1 << 64),
        new_superblock(node="n" * 300),
        new_superblock(peers=[PeerRecord("p" * 250, slot) for slot in range(20)]),
    ):
        with pytest.raises(MetadataError):
            encode(bad, 1)


def test_a_cancelled_save_is_not_overtaken_by_the_next() -> None:
    async def work() -> None:
        disk, metadata = await formatted()
        disk.gate = asyncio.Event()
        disk.reached.clear()
        metadata.superblock.ahead = True
        first = asyncio.create_task(metadata.save_superblock())
        await disk.reached.wait()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        metadata.superblock.outdated = True
        second = asyncio.create_task(metadata.save_superblock())
        disk.gate.set()
        await second
        assert [op[0] for op in disk.ops] == ["write", "flush"] * 4
        assert (await loaded(disk.image)).superblock == metadata.superblock

    run(work)


# ---- activity log


def test_the_log_of_new_metadata_is_empty() -> None:
    async def work() -> None:
        _, metadata = await formatted()
        assert await metadata.load_activity_log() == set()

    run(work)


def test_log_transactions_never_lose_an_extent_wherever_the_power_is_cut() -> None:
    rng = seeded()

    async def work() -> None:
        for _ in range(6):
            disk, metadata = await formatted(al_slots=rng.choice([10, 61, 2000]))
            durable: set[int] = set()
            for _ in range(8):  # each round: one transaction, cut somewhere, and go on with what is left
                before = dict(disk.image)
                wanted = set(rng.sample(range(250), rng.randrange(10)))
                disk.ops.clear()
                await metadata.save_activity_log(wanted)
                images = list(after_power_cuts(before, disk.ops, rng))
                for begun, image in images:
                    found = await (await loaded(image)).load_activity_log()
                    assert found >= wanted or (begun < 2 and found >= durable)
                whole = await (await loaded(disk.image)).load_activity_log()
                assert whole == wanted
                begun, image = rng.choice(images)
                disk = FakeDisk(image)
                metadata = await Metadata.load(disk)
                durable = await metadata.load_activity_log()

    run(work)


@pytest.mark.parametrize("copy", range(4))
def test_a_rotten_copy_of_the_log_costs_nothing_but_more_to_sync(copy: int) -> None:
    async def work() -> None:
        disk, metadata = await formatted()
        await metadata.save_activity_log({1, 2})
        await metadata.save_activity_log({2, 3})
        offset, size = metadata.superblock.al_offset, metadata.superblock.al_copy_bytes
        disk.image[(offset + copy * size) // SECTOR] = b"\x99" * SECTOR
        found = await loaded(disk.image)
        assert await found.load_activity_log() == {1, 2, 3}
        await found.save_activity_log({4})
        assert await found.load_activity_log() >= {4}

    run(work)


def test_without_any_log_everything_counts_as_written() -> None:
    async def work() -> None:
        disk, metadata = await formatted(size_bytes=GIB + 1)
        for sector in list(disk.image):
            if sector >= 16:
                disk.image[sector] = b"\x99" * SECTOR
        found = await loaded(disk.image)
        assert await found.load_activity_log() == set(range(257))
        assert "activity log" in found.warnings[0]
        await metadata.save_activity_log({4})
        assert await metadata.load_activity_log() == {4}

    run(work)


def test_a_log_that_failed_to_be_written_can_be_written_again() -> None:
    async def work() -> None:
        for fails_at in (0, 1):
            disk, metadata = await formatted()
            await metadata.save_activity_log({1})
            disk.fail_at = len(disk.ops) + fails_at
            with pytest.raises(OSError, match="Input/output"):
                await metadata.save_activity_log({1, 2})
            assert await metadata.load_activity_log() >= {1}
            await metadata.save_activity_log({1, 3})
            assert await (await loaded(disk.image)).load_activity_log() == {1, 3}
        with pytest.raises(ValueError, match="fit"):
            await metadata.save_activity_log(range(5000))

    run(work)


# ---- bitmap


def test_a_bitmap_survives_the_trip() -> None:
    async def work() -> None:
        disk, metadata = await formatted(size_bytes=GIB + 1)
        bitmap = await loaded_bitmap(metadata)
        assert (bitmap.blocks, bitmap.count) == (GIB // 4096 + 1, 0)
        for first, count in ((0, 1), (SECTOR_BITS - 1, 2), (30 * SECTOR_BITS, 3 * SECTOR_BITS), (GIB // 4096, 1)):
            bitmap.set_range(first, count)
        await metadata.save_bitmap(bitmap)
        writes = [op for op in disk.ops if op[0] == "write"]
        assert [len(op[2]) // SECTOR for op in writes] == [2, 3, 1]  # neighbours in one write
        assert dirty_blocks(await loaded_bitmap(await loaded(disk.image))) == dirty_blocks(bitmap)
        disk.ops.clear()
        await metadata.save_bitmap(bitmap)
        assert disk.ops == []
        bitmap.clear_range(0, bitmap.blocks)
        await metadata.save_bitmap(bitmap)
        assert (await loaded_bitmap(await loaded(disk.image))).count == 0

    run(work)


def test_a_long_bitmap_is_written_in_pieces() -> None:
    async def work() -> None:
        disk, metadata = await formatted(size_bytes=3000 * SECTOR_BITS * 4096)
        bitmap = await loaded_bitmap(metadata)
        bitmap.set_range(5, bitmap.blocks - 5)
        await metadata.save_bitmap(bitmap)
        assert [len(op[2]) // SECTOR for op in disk.ops if op[0] == "write"] == [512] * 5 + [440]

    run(work)


def test_a_bitmap_on_a_real_file_is_the_same_again(tmp_path: Path) -> None:
    async def work() -> None:
        rng = random.Random(5)
        path = tmp_path / "r0-0.md"
        create(path, size_bytes=40 << 40)
        file = FileOfMetadata.open(path)
        metadata = await Metadata.load(file)
        bitmap = await loaded_bitmap(metadata)
        bitmap.set_range(0, 1)
        bitmap.set_range(bitmap.blocks - 1, 1)
        bitmap.set_range(12 * SECTOR_BITS - 5, 900 * SECTOR_BITS)
        for _ in range(1500):
            bitmap.set_range(rng.randrange(bitmap.blocks), 1)
        await metadata.save_bitmap(bitmap)
        again = await loaded_bitmap(metadata)
        assert again.count == bitmap.count
        assert list(again.export_sectors()) == list(bitmap.export_sectors())
        file.close()

    run(work)


def test_a_rotten_bitmap_sector_is_all_dirty_and_only_it() -> None:
    async def work() -> None:
        disk, metadata = await formatted()
        bitmap = await loaded_bitmap(metadata)
        bitmap.set_range(3, 1)
        bitmap.set_range(SECTOR_BITS + 3, 1)
        await metadata.save_bitmap(bitmap)
        sector = metadata.superblock.bitmap_region()[0] // SECTOR
        disk.image[sector] = disk.image[sector][:-1] + b"\x00"
        found = await loaded_bitmap(await loaded(disk.image))
        assert dirty_blocks(found) == {*range(SECTOR_BITS), SECTOR_BITS + 3}

    run(work)


def test_setting_all_bits_is_one_superblock_update() -> None:
    rng = seeded()

    async def work() -> None:
        disk, metadata = await formatted(size_bytes=3 * SECTOR_BITS * 4096)
        bitmap = await loaded_bitmap(metadata)
        bitmap.set_range(7, SECTOR_BITS)
        await metadata.save_bitmap(bitmap)
        old, before = dirty_blocks(bitmap), dict(disk.image)
        disk.ops.clear()
        await metadata.set_all_bits(bitmap)
        assert len(disk.ops) == 4
        for begun, image in after_power_cuts(before, disk.ops, rng, tries=20):
            found = await loaded_bitmap(await loaded(image))
            assert found.count == found.blocks or (begun < 2 and dirty_blocks(found) == old)

    run(work)


@pytest.mark.parametrize("all_before", [False, True])
def test_clearing_all_bits_leaves_nothing_but_bits_that_were_there(all_before: bool) -> None:
    rng = seeded()

    async def work() -> None:
        disk, metadata = await formatted(size_bytes=3 * SECTOR_BITS * 4096)
        bitmap = await loaded_bitmap(metadata)
        if all_before:
            await metadata.set_all_bits(bitmap)
            bitmap.clear_range(0, SECTOR_BITS + 5)
        else:
            bitmap.set_range(0, SECTOR_BITS + 5)
        await metadata.save_bitmap(bitmap)
        old, before = dirty_blocks(bitmap), dict(disk.image)
        disk.ops.clear()
        await metadata.clear_all_bits(bitmap)
        for begun, image in after_power_cuts(before, disk.ops, rng):
            found = dirty_blocks(await loaded_bitmap(await loaded(image)))
            if begun >= 4:
                assert not found
            assert all_before or found <= old
        bitmap.set_range(9, 1)
        await metadata.save_bitmap(bitmap)
        assert dirty_blocks(await loaded_bitmap(await loaded(disk.image))) == {9}

    run(work)


def test_no_dirty_block_is_lost_in_a_long_random_life() -> None:
    """Random changes, saves and power cuts; what was saved dirty and not cleared since is dirty after every cut."""
    rng = seeded()
    blocks = 3 * SECTOR_BITS + 100

    async def life() -> None:
        disk, metadata = await formatted(size_bytes=blocks * 4096)
        bitmap = await loaded_bitmap(metadata)
        must: set[int] = set()  # saved as dirty, and not cleared since
        for _ in range(25):
            for _ in range(rng.randrange(5)):
                first = rng.randrange(blocks)
                count = min(rng.choice([1, 3, 900, SECTOR_BITS, blocks]), blocks - first)
                action = rng.random()
                if action < 0.5:
                    bitmap.set_range(first, count)
                elif action < 0.8:
                    bitmap.clear_range(first, count)
                    must -= set(range(first, first + count))
                elif action < 0.9:
                    bitmap.set_all()
                else:
                    bitmap.clear_all()
                    must.clear()
            before, memory = dict(disk.image), dirty_blocks(bitmap)
            disk.ops.clear()
            await metadata.save_bitmap(bitmap)
            for begun, image in after_power_cuts(before, disk.ops, rng, tries=2):
                if rng.random() < 0.2 or begun == len(disk.ops):
                    found = dirty_blocks(await loaded_bitmap(await loaded(image)))
                    assert found >= (memory if begun == len(disk.ops) else must & memory)
            assert dirty_blocks(await loaded_bitmap(await loaded(disk.image))) == memory
            must = memory
            if rng.random() < 0.3:  # power cut: go on with what is left of this save
                begun, image = rng.choice(list(after_power_cuts(before, disk.ops, rng)))
                disk = FakeDisk(image)
                metadata = await Metadata.load(disk)
                bitmap = await loaded_bitmap(metadata)
                must = dirty_blocks(bitmap)

    for _ in range(4):
        run(life)


@pytest.mark.parametrize("what", ["sectors", "set all", "clear all"])
def test_a_failed_bitmap_save_is_made_up_for_by_the_next(what: str) -> None:
    async def work() -> None:
        for fails_at in range(8):
            disk, metadata = await formatted(size_bytes=3 * SECTOR_BITS * 4096)
            bitmap = await loaded_bitmap(metadata)
            bitmap.set_range(5, SECTOR_BITS)
            await metadata.save_bitmap(bitmap)
            if what == "set all":
                bitmap.set_all()
            if what == "clear all":
                bitmap.clear_all()
            bitmap.set_range(2 * SECTOR_BITS, 3)
            bitmap.clear_range(7, 1)
            disk.ops.clear()
            disk.fail_at = fails_at
            try:
                await metadata.save_bitmap(bitmap)
            except OSError:
                await metadata.save_bitmap(bitmap)
            assert dirty_blocks(await loaded_bitmap(await loaded(disk.image))) == dirty_blocks(bitmap)

    run(work)


@pytest.mark.parametrize("ones", [False, True])
def test_a_bitmap_replaced_during_a_save_is_saved_replaced(ones: bool) -> None:
    async def work() -> None:
        disk, metadata = await formatted(size_bytes=5 * SECTOR_BITS * 4096)
        bitmap = await loaded_bitmap(metadata)
        for sector in (0, 2, 4):  # three writes
            bitmap.set_range(sector * SECTOR_BITS, 10)
        disk.gate = asyncio.Event()
        disk.reached.clear()
        saving = asyncio.create_task(metadata.save_bitmap(bitmap))
        await disk.reached.wait()
        if ones:
            bitmap.set_all()
        else:
            bitmap.clear_all()
        bitmap.set_range(77, 1)
        bitmap.clear_range(SECTOR_BITS, 1)
        disk.gate.set()
        await saving
        assert not bitmap.replaced
        assert dirty_blocks(await loaded_bitmap(await loaded(disk.image))) == dirty_blocks(bitmap)

    run(work)


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("stale", [False, True])
def test_growing_is_done_or_not_wherever_the_power_is_cut(clean: bool, ones: bool, stale: bool) -> None:
    """From one and a half sectors of the bitmap to four; `stale`: with bits of a time when the volume was larger."""
    rng, small, large = seeded(), SECTOR_BITS * 3 // 2, SECTOR_BITS * 4 - 7

    async def work() -> None:
        disk, metadata = await formatted(size_bytes=(large if stale else small) * 4096)
        bitmap = Bitmap(metadata.superblock.blocks)
        await (metadata.set_all_bits(bitmap) if ones else metadata.clear_all_bits(bitmap))
        if stale:
            for at in range(0, large - 200, 500):
                bitmap.set_range(at, 200)
            await metadata.save_bitmap(bitmap)
            metadata.superblock.size_bytes = small * 4096
            bitmap.shrink(small)
            await metadata.save_superblock()
        bitmap.set_range(SECTOR_BITS - 3, 9)
        bitmap.clear_range(5, 70)
        await metadata.save_bitmap(bitmap)
        before, image = dirty_blocks(bitmap), dict(disk.image)
        disk.ops.clear()
        await metadata.grow(bitmap, large * 4096, clean=clean)
        after = before if clean else before | set(range(small, large))
        assert dirty_blocks(bitmap) == after
        sizes = set()
        for begun, survivor in after_power_cuts(image, disk.ops, rng):
            again = await loaded(survivor)
            blocks = again.superblock.blocks
            sizes.add(blocks)
            assert blocks == large or begun < len(disk.ops)
            # A sector that was torn would read as all dirty; none is written in place but the last one.
            assert dirty_blocks(await loaded_bitmap(again)) == (after if blocks == large else before)
        assert sizes == {small, large}

    run(work)


def test_a_bitmap_of_another_size_is_refused() -> None:
    async def work() -> None:
        _, metadata = await formatted()
        with pytest.raises(ValueError, match="blocks"):
            await metadata.load_bitmap(Bitmap(7))

    run(work)


# ---- the command line's functions, on real files


def create(path: Path, *, force: bool = False, **changes: Any) -> None:
    values: dict[str, Any] = {"node": "node1", "peer": "node2", "size_bytes": GIB, "al_slots": DEFAULT_SLOTS}
    create_metadata(
        path, cluster="web", resource="r0", volume=0, backing_fingerprint="x", force=force, **{**values, **changes}
    )


def test_create_and_dump(tmp_path: Path) -> None:
    path = tmp_path / "node1" / "r0-0.md"
    create(path)
    content = dump_metadata(path)
    assert content["node"] == "node1"
    assert content["peers"] == [{"name": "node2", "bitmap_slot": 0, "outdated": False}]
    assert content["just_created"] and content["inconsistent"] and not content["primary"]
    assert content["generations"] == {"current": "0" * 16, "base": "0" * 16, "history": []}
    assert content["activity_log"] == {"sequence": 0, "extents": [], "damaged_copies": []}
    assert content["out_of_sync_bytes"] == 0
    assert int(content["device_id"], 16)
    status = path.stat()
    assert status.st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == ["r0-0.md"]


def test_a_file_for_a_huge_volume_is_small(tmp_path: Path) -> None:
    path = tmp_path / "r0-0.md"
    create(path, size_bytes=16 << 40)
    assert path.stat().st_size > 500_000_000
    assert path.stat().st_blocks * 512 < 200_000
    assert dump_metadata(path)["out_of_sync_bytes"] == 0


def test_existing_metadata_need_force(tmp_path: Path) -> None:
    path = tmp_path / "r0-0.md"
    create(path)
    before = path.read_bytes()
    with pytest.raises(MetadataError, match=r"exists already: .*--force\.$"):
        create(path)
    assert path.read_bytes() == before
    create(path, force=True, node="other")
    assert dump_metadata(path)["node"] == "other"


def test_metadata_in_use_are_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "r0-0.md"
    create(path)
    before = path.read_bytes()
    with path.open("rb") as daemon:
        fcntl.flock(daemon, fcntl.LOCK_EX)
        with pytest.raises(MetadataError, match="in use by a running replicad"):
            create(path, force=True)
        assert path.read_bytes() == before
        assert dump_metadata(path)["node"] == "node1"
    assert os.listdir(tmp_path) == ["r0-0.md"]


def test_create_reports_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(MetadataError, match="size_bytes"):
        create(tmp_path / "r0-0.md", size_bytes=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(MetadataError, match="can't be written"):
        create(tmp_path / "file" / "r0-0.md")
    assert os.listdir(tmp_path) == ["file"]


def test_dump_reports_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "r0-0.md"
    with pytest.raises(MetadataError, match="create-md"):
        dump_metadata(path)
    create(path)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert "copy A" in dump_metadata(path)["warnings"][0]
    data[4096 + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(MetadataError, match="both copies"):
        dump_metadata(path)
    assert path.read_bytes() == data


def test_dump_inside_a_running_loop(tmp_path: Path) -> None:
    path = tmp_path / "r0-0.md"
    create(path)

    async def work() -> None:
        assert dump_metadata(path)["volume"] == 0

    run(work)


class FlushesByHand(FakeDisk):
    """Its flushes end as and when the test says."""

    def __init__(self, image: Image) -> None:
        super().__init__(image)
        self.flushes: asyncio.Queue[asyncio.Future[None]] = asyncio.Queue()

    async def flush(self) -> None:
        ended = asyncio.get_running_loop().create_future()
        self.flushes.put_nowait(ended)
        await ended
        await super().flush()


def test_a_flush_that_fails_takes_others_writes_with_it() -> None:
    """The kernel throws away all pages that it could not write, and reports that once."""

    async def scenario() -> None:
        first, metadata = await formatted()
        bitmap = Bitmap(metadata.superblock.blocks)
        await metadata.save_bitmap(bitmap)
        disk = metadata._file = FlushesByHand(first.image)
        bitmap.set_bytes(0, 4096)
        of_bits = asyncio.create_task(metadata.save_bitmap(bitmap))
        flush_of_bits = await disk.flushes.get()
        of_superblock = asyncio.create_task(metadata.save_superblock())
        (await disk.flushes.get()).set_exception(OSError(5, "Input/output error"))
        with pytest.raises(OSError, match="Input/output error"):
            await of_superblock
        flush_of_bits.set_result(None)
        with pytest.raises(OSError, match="a flush failed meanwhile"):
            await of_bits
        # They are still to be written, and whatever is written from here on counts.
        disk.ops.clear()
        again = asyncio.create_task(metadata.save_bitmap(bitmap))
        (await disk.flushes.get()).set_result(None)
        await again
        assert [kind for kind, _, _ in disk.ops] == ["write", "flush"]

    asyncio.run(scenario())
