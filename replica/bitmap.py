"""Which 4 KiB blocks may differ from the peer: a sparse bitmap that stays fast on huge volumes.

Pure: no I/O.  Blocks are numbered from 0; 4032 of them share one *sector*, which is what one 512-byte disk
sector holds (504 bytes of bits and an 8-byte checksum).  A disk sector that was torn or has rotted is
recognised and read as "all dirty".
"""

import struct
import zlib
from collections.abc import Iterator

import xxhash

BLOCK_SHIFT = 12
BLOCK_SIZE = 1 << BLOCK_SHIFT
BITS_BYTES = 504
SECTOR_BITS = BITS_BYTES * 8
SECTOR_BYTES = 512
MAX_PACKED_BYTES = 1 << 20

_FULL = (1 << SECTOR_BITS) - 1
_NO_BITS = bytes(SECTOR_BYTES)
_GROUP_SHIFT = 12
_GROUP_MASK = (1 << _GROUP_SHIFT) - 1
_PACK_VERSION = 1
_PACK_ENTRY = struct.Struct("<BII")
_PARTIAL, _WHOLE = 0, 1
_SEED = struct.Struct("<QQ")


def blocks_of(offset: int, length: int) -> tuple[int, int]:
    """(first, count) of the blocks that `length` > 0 bytes from `offset` on touch: rounds outward."""
    first = offset >> BLOCK_SHIFT
    return first, ((offset + length - 1) >> BLOCK_SHIFT) - first + 1


def whole_blocks(first: int, end: int, start: int, stop: int) -> tuple[int, int]:
    """[start, stop), widened to whole blocks inside [first, end); (end, end) when it does not begin in there."""
    if not first <= start < end:
        return end, end
    start = max(first, start >> BLOCK_SHIFT << BLOCK_SHIFT)
    return start, min(end, (max(stop, start + 1) + BLOCK_SIZE - 1) >> BLOCK_SHIFT << BLOCK_SHIFT)


def add_run(runs: list[tuple[int, int]], first: int, count: int) -> None:
    """Append `count` blocks from `first` on; neighbours of the last run lengthen that one."""
    if runs and sum(runs[-1]) == first:
        runs[-1] = (runs[-1][0], runs[-1][1] + count)
    else:
        runs.append((first, count))


def sectors_for(blocks: int) -> int:
    """Number of 512-byte disk sectors that hold the bits of `blocks` blocks."""
    return -(-blocks // SECTOR_BITS)


class _SectorSet:
    """Set of sector numbers with a fast "next member" and "next non-member".

    A sorted list would be rebuilt for every sector that random writes bring in while a resync walks along;
    one big int would be copied for every change.  4096 members per int keep both costs at a few hundred
    bytes.
    """

    __slots__ = ("groups",)

    def __init__(self, size: int) -> None:
        self.groups = [0] * ((size >> _GROUP_SHIFT) + 1)

    def add(self, number: int) -> None:
        self.groups[number >> _GROUP_SHIFT] |= 1 << (number & _GROUP_MASK)

    def discard(self, number: int) -> None:
        self.groups[number >> _GROUP_SHIFT] &= ~(1 << (number & _GROUP_MASK))

    def next_member(self, number: int) -> int:
        """Smallest member >= number, or -1."""
        group, at = number >> _GROUP_SHIFT, number & _GROUP_MASK
        while group < len(self.groups):
            rest = self.groups[group] >> at
            if rest:
                return (group << _GROUP_SHIFT) + at + (rest & -rest).bit_length() - 1
            group, at = group + 1, 0
        return -1

    def next_absent(self, number: int) -> int:
        """Smallest non-member >= number (it may lie beyond the size)."""
        group, at = number >> _GROUP_SHIFT, number & _GROUP_MASK
        while group < len(self.groups):
            rest = ~(self.groups[group] >> at)
            at += (rest & -rest).bit_length() - 1
            if at <= _GROUP_MASK:
                return (group << _GROUP_SHIFT) + at
            group, at = group + 1, 0
        return group << _GROUP_SHIFT


class Bitmap:
    """Dirty bits of `blocks` blocks (a positive number; ValueError otherwise).

    count         number of dirty blocks
    changed       sectors changed since `take_changed`, i.e. what has to be written to disk
    replaced      `set_all` or `clear_all` was called: the durable bitmap must be replaced as a whole, not by
                  sectors (`Metadata.save_bitmap` does that and resets it)
    default_ones  what a sector that is not stored means: all dirty, or all clean

    All methods that take a range raise ValueError when it is not inside the bitmap.
    """

    def __init__(self, blocks: int) -> None:
        if blocks <= 0:
            raise ValueError(f"a bitmap needs at least one block, not {blocks}")
        self.blocks = blocks
        self.count = 0
        self.changed: set[int] = set()
        self.replaced = False
        self.default_ones = False
        self._sectors: dict[int, int] = {}
        self._size_changed()
        # With default 0: the sectors that have any bit.  With default_ones: the sectors that have none.
        self._marks = _SectorSet(self.sectors)

    @property
    def sectors(self) -> int:
        """Number of sectors, stored or not."""
        return self._last + 1

    def _size_changed(self) -> None:
        self._last = sectors_for(self.blocks) - 1
        self._last_full = (1 << (self.blocks - self._last * SECTOR_BITS)) - 1

    def _full(self, sector: int) -> int:
        # One shared object per bitmap: a fully dirty terabyte must not cost 560 bytes per sector.
        return self._last_full if sector == self._last else _FULL

    def _get(self, sector: int) -> int:
        bits = self._sectors.get(sector)
        if bits is None:
            return self._full(sector) if self.default_ones else 0
        return bits

    def _put(self, sector: int, old: int, new: int) -> None:
        self.count += new.bit_count() - old.bit_count()
        self.changed.add(sector)
        full = self._full(sector)
        if new == full:
            new = full
        if new == (full if self.default_ones else 0):
            self._sectors.pop(sector, None)
        else:
            self._sectors[sector] = new
        if (new == 0) == self.default_ones:
            self._marks.add(sector)
        else:
            self._marks.discard(sector)

    def _next_nonempty(self, sector: int) -> int:
        """The first sector >= `sector` that has a dirty block, or -1."""
        if not self.default_ones:
            return self._marks.next_member(sector)
        found = self._marks.next_absent(sector)
        return found if found <= self._last else -1

    def _check(self, first: int, count: int) -> None:
        if first < 0 or count < 0 or first + count > self.blocks:
            raise ValueError(f"blocks {first}+{count} are outside a bitmap of {self.blocks} blocks")

    # ---- bits

    def set_range(self, first: int, count: int) -> None:
        """Make `count` blocks from `first` on dirty."""
        if first < 0 or count < 1 or first + count > self.blocks:
            self._check(first, count)
            return
        sector, bit = divmod(first, SECTOR_BITS)
        end = bit + count
        if end < SECTOR_BITS:  # the hot path; a sector's last bit takes the slow one, which shares full sectors
            old = self._sectors.get(sector)
            if old:
                new = old | ((1 << count) - 1) << bit
                if new != old:
                    self.count += 1 if count == 1 else (new ^ old).bit_count()
                    self._sectors[sector] = new
                    self.changed.add(sector)
                return
        while count > 0:
            part = min(count, SECTOR_BITS - bit)
            old = self._get(sector)
            new = old | ((1 << part) - 1) << bit
            if new != old:
                self._put(sector, old, new)
            sector, bit, count = sector + 1, 0, count - part

    def clear_range(self, first: int, count: int) -> None:
        """Make `count` blocks from `first` on clean."""
        self._check(first, count)
        end = first + count
        sector = self._next_nonempty(first // SECTOR_BITS)
        while sector >= 0 and sector * SECTOR_BITS < end:
            start = sector * SECTOR_BITS
            low, high = max(first - start, 0), min(end - start, SECTOR_BITS)
            old = self._get(sector)
            new = 0 if high - low == SECTOR_BITS else old & ~(((1 << (high - low)) - 1) << low)
            if new != old:
                self._put(sector, old, new)
            sector = self._next_nonempty(sector + 1)

    def set_bytes(self, offset: int, length: int) -> None:
        """Make every block that the bytes touch dirty (rounds outward)."""
        if length > 0:
            self.set_range(*blocks_of(offset, length))

    def has(self, block: int) -> bool:
        """Is this block dirty?"""
        self._check(block, 1)
        sector, bit = divmod(block, SECTOR_BITS)
        return bool(self._get(sector) >> bit & 1)

    def any_in(self, first: int, count: int) -> bool:
        """Is any of these blocks dirty?"""
        self._check(first, count)
        run = self.next_run(first, 1)
        return run is not None and run[0] < first + count

    def next_run(self, start: int, limit: int) -> tuple[int, int] | None:
        """The first run (first, count <= limit) of dirty blocks at or after block `start`; None: no more."""
        if start >= self.blocks or limit <= 0:
            return None
        sector, bit = divmod(max(start, 0), SECTOR_BITS)
        bits = self._get(sector) >> bit
        if not bits:
            sector, bit = self._next_nonempty(sector + 1), 0
            if sector < 0:
                return None
            bits = self._get(sector)
        skip = (bits & -bits).bit_length() - 1
        bit += skip
        bits = ~(bits >> skip)
        count = (bits & -bits).bit_length() - 1
        first = sector * SECTOR_BITS + bit
        at_end = bit + count == SECTOR_BITS
        while at_end and count < limit and sector < self._last:
            sector += 1
            bits = self._get(sector)
            if bits is _FULL:
                count += SECTOR_BITS
                continue
            bits = ~bits
            ones = (bits & -bits).bit_length() - 1
            count += ones
            at_end = ones == SECTOR_BITS
        return first, min(count, limit)

    def set_all(self) -> None:
        """Make every block dirty.  To be made durable by replacing the bitmap (see `replaced`)."""
        self._replace(ones=True)

    def clear_all(self) -> None:
        """Make every block clean.  To be made durable by replacing the bitmap (see `replaced`)."""
        self._replace(ones=False)

    def _replace(self, ones: bool) -> None:
        self._sectors.clear()
        self.changed.clear()
        self._marks = _SectorSet(self.sectors)
        self.default_ones = ones
        self.count = self.blocks if ones else 0
        self.replaced = True

    def grow(self, blocks: int) -> None:
        """Extend to `blocks` blocks; the new ones start dirty.  ValueError when that would shrink it."""
        old = self.blocks
        if blocks < old:
            raise ValueError(f"a bitmap of {old} blocks can't shrink to {blocks}")
        if blocks == old:
            return
        bits = self._get(self._last)
        tail = self._last
        self._sectors[tail] = bits  # what "full" means for this sector changes: keep its bits explicitly
        self.blocks = blocks
        self._size_changed()
        self._marks.groups.extend([0] * ((self.sectors >> _GROUP_SHIFT) + 1 - len(self._marks.groups)))
        if self.default_ones:
            self.count += max(blocks - (tail + 1) * SECTOR_BITS, 0)
            # What is stored there may be of a time before it was cut off.
            self.changed.update(range(tail + 1, self.sectors))
            self._put(tail, bits, bits)
            self.set_range(old, min(blocks, (tail + 1) * SECTOR_BITS) - old)
        else:
            self._put(tail, bits, bits)
            self.set_range(old, blocks - old)

    def shrink(self, blocks: int) -> None:
        """Forget the blocks from `blocks` on.  ValueError when that would extend it, or leave nothing."""
        if not 0 < blocks <= self.blocks:
            raise ValueError(f"a bitmap of {self.blocks} blocks can't be cut to {blocks}")
        if blocks == self.blocks:
            return
        last = sectors_for(blocks) - 1
        bits = self._get(last)
        kept = {sector: value for sector, value in self._sectors.items() if sector < last}
        self.blocks = blocks
        self._size_changed()
        kept[last] = bits & self._last_full
        self.changed = {sector for sector in self.changed if sector <= last}
        self.count = blocks if self.default_ones else 0
        self._sectors = {}
        self._marks = _SectorSet(self.sectors)
        for sector, value in kept.items():
            self._put(sector, self._full(sector) if self.default_ones else 0, value)

    # ---- exchange with the peer

    def export_sectors(self) -> Iterator[tuple[int, bytes]]:
        """(sector, its 504 bytes of bits, lowest bit first) of every sector with a dirty block."""
        sector = self._next_nonempty(0)
        while sector >= 0:
            yield sector, self._get(sector).to_bytes(BITS_BYTES, "little")
            sector = self._next_nonempty(sector + 1)

    def merge_sector(self, index: int, bits: bytes | memoryview) -> None:
        """OR 504 bytes of bits into a sector; ValueError for a wrong index or length."""
        if not 0 <= index <= self._last or len(bits) != BITS_BYTES:
            raise ValueError(f"no sector {index} of {len(bits)} bytes in a bitmap of {self.sectors} sectors")
        old = self._get(index)
        new = old | int.from_bytes(bits, "little") & self._full(index)
        if new != old:
            self._put(index, old, new)

    def _runs(self) -> Iterator[tuple[int, int, int]]:
        """(first sector, sectors, bits of one sector) of the non-empty sectors; full ones are joined."""
        at, joined = 0, 0  # sectors [at - joined, at) are full and not yet reported
        for sector, bits in [*sorted(self._sectors.items()), (self.sectors, 0)]:
            if self.default_ones:
                joined += sector - at
            elif sector > at and joined:
                yield at - joined, joined, _FULL
                joined = 0
            at = sector + 1
            if sector < self.sectors and bits == self._full(sector):
                joined += 1
                continue
            if joined:
                yield sector - joined, joined, _FULL
                joined = 0
            if bits:
                yield sector, 1, bits

    def pack(self, max_bytes: int) -> Iterator[bytes]:
        """The dirty blocks of now, in self-contained messages of at most `max_bytes` (from 1 KiB to 1 MiB).

        Message: zlib stream of a version byte and entries (kind u8, first sector u32, sectors u32, little
        endian); kind 0 = one sector, its 504 bytes of bits follow; kind 1 = this many sectors are all dirty.
        A bitmap without dirty blocks gives no message.  ValueError for another `max_bytes`.
        """
        if not 1024 <= max_bytes <= MAX_PACKED_BYTES:
            raise ValueError(f"bitmap messages of {max_bytes} bytes are not within 1024 … {MAX_PACKED_BYTES}")
        return self._messages(list(self._runs()), max_bytes - 64 - max_bytes // 256)

    @staticmethod
    def _messages(runs: list[tuple[int, int, int]], raw_limit: int) -> Iterator[bytes]:
        # raw_limit leaves room for what deflate adds to data that it can't compress.
        raw = bytearray([_PACK_VERSION])
        for first, sectors, bits in runs:
            if len(raw) + _PACK_ENTRY.size + BITS_BYTES > raw_limit:
                yield zlib.compress(raw, 1)
                raw = bytearray([_PACK_VERSION])
            if bits is _FULL:
                raw += _PACK_ENTRY.pack(_WHOLE, first, sectors)
            else:
                raw += _PACK_ENTRY.pack(_PARTIAL, first, sectors) + bits.to_bytes(BITS_BYTES, "little")
        if len(raw) > 1:
            yield zlib.compress(raw, 1)

    def merge_packed(self, message: bytes | memoryview) -> None:
        """OR a message of `pack` in.  ValueError (and nothing changed) when it is not one for this size."""
        inflater = zlib.decompressobj()
        try:
            raw = inflater.decompress(message, MAX_PACKED_BYTES)
        except zlib.error as error:
            raise ValueError("a bitmap message is damaged") from error
        if not inflater.eof or inflater.unused_data:
            raise ValueError("a bitmap message is too long or cut short")
        for kind, first, sectors, bits in self._parse(raw):
            if kind == _PARTIAL:
                self.merge_sector(first, bits)
            elif sectors == self.sectors:
                if self.count < self.blocks:
                    self.set_all()
            else:
                start = first * SECTOR_BITS
                self.set_range(start, min(sectors * SECTOR_BITS, self.blocks - start))

    def _parse(self, raw: bytes) -> list[tuple[int, int, int, memoryview]]:
        if not raw or raw[0] != _PACK_VERSION:
            raise ValueError("a bitmap message has an unknown version")
        entries: list[tuple[int, int, int, memoryview]] = []
        view, at = memoryview(raw), 1
        while at < len(raw):
            if at + _PACK_ENTRY.size > len(raw):
                raise ValueError("a bitmap message ends inside an entry")
            kind, first, sectors = _PACK_ENTRY.unpack_from(raw, at)
            at += _PACK_ENTRY.size
            length = BITS_BYTES if kind == _PARTIAL else 0
            known = kind == _WHOLE or (kind == _PARTIAL and sectors == 1)
            if not known or at + length > len(raw):
                raise ValueError("a bitmap message has a damaged entry")
            if sectors < 1 or first + sectors > self.sectors:
                raise ValueError(f"a bitmap message names sector {first + sectors - 1} of {self.sectors}")
            entries.append((kind, first, sectors, view[at : at + length]))
            at += length
        return entries

    # ---- disk

    def take_changed(self) -> list[int]:
        """The changed sectors, ascending; from now on none counts as changed.  Put them back on failure."""
        taken = sorted(self.changed)
        self.changed.clear()
        return taken

    def encode_sector(self, index: int, epoch: int) -> bytes:
        """The 512 bytes to store: zeroes for the default, else bits and a checksum of bits, place, epoch."""
        bits = self._get(index)
        if bits == (self._full(index) if self.default_ones else 0):
            return _NO_BITS
        data = bits.to_bytes(BITS_BYTES, "little")
        return data + _checksum(index, epoch, data)

    def load_sector(self, index: int, epoch: int, data: bytes | memoryview) -> None:
        """Take a sector from disk (512 bytes; ValueError otherwise); it does not become `changed`.

        All zero = the default; a valid checksum = these bits; anything else (torn, rotten, of another epoch
        or place) = all dirty, the safe direction.
        """
        if len(data) != SECTOR_BYTES or not 0 <= index <= self._last:
            raise ValueError(f"no sector {index} of {len(data)} bytes in a bitmap of {self.sectors} sectors")
        full = self._full(index)
        if data == _NO_BITS:
            bits = full if self.default_ones else 0
        elif data[BITS_BYTES:] == _checksum(index, epoch, data[:BITS_BYTES]):
            bits = int.from_bytes(data[:BITS_BYTES], "little") & full
        else:
            bits = full
        was_changed = index in self.changed
        old = self._get(index)
        if bits != old:
            self._put(index, old, bits)
        if not was_changed:
            self.changed.discard(index)


def _checksum(index: int, epoch: int, bits: bytes | memoryview) -> bytes:
    seed = xxhash.xxh64_intdigest(_SEED.pack(index, epoch))
    # Never 0: an explicit "all clean" sector must not look like one that was never written.
    return (xxhash.xxh64_intdigest(bits, seed) or 1).to_bytes(8, "little")
