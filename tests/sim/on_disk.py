"""A second reader of the metadata file, written from docs/on-disk.md alone: the oracle must not trust the node's own.

Nothing here is taken from the node but the layout that the document gives. What is stored is taken by its name, so
that a field which a later version adds is there as well.
"""

import struct
from types import SimpleNamespace
from typing import Any

import msgpack
import xxhash

SUPERBLOCK_BYTES = 4096
AL_COPIES = 4
SECTOR_BYTES = 512
BITS_BYTES = 504
BLOCK_BYTES = 4096
REGION_STRIDE = 64 << 30

_HOLE = bytes(SECTOR_BYTES)
_HEAD = struct.Struct("<8sIIQ16s")
_DIGEST_AT = 24
#: What a field means that the metadata do not have: they are older than it.
_DEFAULTS: dict[str, Any] = {
    "peers": [],
    "generations": {},
    "just_created": False,
    "inconsistent": False,
    "outdated": False,
    "primary": False,
    "ahead": False,
    "promoted_alone": False,
    "bitmap_default_ones": False,
}


_REQUIRED = ("size_bytes", "al_offset", "al_copy_bytes", "bitmap_offset", "bitmap_epoch")


class Unreadable(ValueError):
    """No superblock can be used; the text says why."""


def _checked(data: bytes, magic: bytes, unit: int) -> tuple[int, int, int, bytes] | None:
    """(version, the header's count, sequence, body of `count` units) of what begins with the common header."""
    found, version, count, sequence, digest = _HEAD.unpack_from(data)
    end = _HEAD.size + count * unit
    if found != magic or end > len(data):
        return None
    body = data[_HEAD.size : end]
    if digest != xxhash.xxh3_128(data[:_DIGEST_AT] + body).digest():
        return None
    return version, count, sequence, body


def superblock_copy(data: bytes) -> tuple[int, int, bytes] | None:
    """(sequence, format version, body) of one copy; None: damaged."""
    found = _checked(data, b"RplcaMD\n", 1)
    return None if found is None else (found[2], found[0], found[3])


def log_copy(data: bytes) -> tuple[int, frozenset[int]] | tuple[()] | None:
    """(sequence, extents) of one copy of the activity log; (): never written; None: damaged."""
    found = _checked(data, b"RplcaAL\n", 4)
    if found is None:
        return () if data == bytes(len(data)) else None
    if found[0] != 1:
        return None
    return found[2], frozenset(struct.unpack(f"<{found[1]}I", found[3]))


def superblock_fields(body: bytes) -> SimpleNamespace:
    """What is stored, by its names; `peers` and `generations` likewise. Unreadable when that can't be used."""
    try:
        stored = _DEFAULTS | msgpack.unpackb(body)
        if missing := [name for name in _REQUIRED if not isinstance(stored.get(name), int)]:
            raise Unreadable(f"the superblock lacks {', '.join(missing)}")
        stored["peers"] = [SimpleNamespace(**({"bitmap_slot": 0, "outdated": False} | one)) for one in stored["peers"]]
        ids = {"current": 0, "base": 0, "history": []} | stored["generations"]
        stored["generations"] = SimpleNamespace(**ids)
        stored["blocks"] = -(-stored["size_bytes"] // BLOCK_BYTES)
    except (ValueError, TypeError) as error:
        raise Unreadable(f"the superblock can't be used: {error}") from error
    return SimpleNamespace(**stored)


def log_extents(copies: list[Any]) -> frozenset[int] | None:
    """The extents that may have been written to, from what `log_copy` says of each copy; None: the whole volume."""
    valid = [copy for copy in copies if copy]
    if not valid:
        return None
    newest = max(sequence for sequence, _ in valid)
    counting = valid if None in copies else [copy for copy in valid if copy[0] == newest]
    return frozenset().union(*(extents for _, extents in counting))


def bitmap_sector(data: bytes, number: int, epoch: int, default_ones: bool, sector_bits: int) -> int:
    """The bits of one sector of the bitmap, as a number whose lowest bit is the first block."""
    full = (1 << sector_bits) - 1
    if data == _HOLE:
        return full if default_ones else 0
    bits, stored = data[:BITS_BYTES], int.from_bytes(data[BITS_BYTES:], "little")
    seed = xxhash.xxh64(struct.pack("<QQ", number, epoch)).intdigest()
    if stored != (xxhash.xxh64(bits, seed).intdigest() or 1):
        return full
    return int.from_bytes(bits, "little") & full


class Reader:
    """Reads one image of a metadata file, as often as it changes; only what is different is decoded again.

    superblock  the fields of the one that counts, by name; None: there is none
    raw         the copy that it is from
    extents     the activity log's; None: all of them
    bits        the bitmap's dirty blocks, as a number whose lowest bit is block 0
    """

    def __init__(self, image: bytes | bytearray, *, sector_bits: int = BITS_BYTES * 8) -> None:
        self._image = image
        self._sector_bits = sector_bits
        self._seen: dict[int, tuple[bytes, Any]] = {}  # offset -> what was there, and what it says
        self._bitmap: tuple[Any, ...] = ()
        self.superblock: SimpleNamespace | None = None
        self.raw = b""
        self.extents: frozenset[int] | None = None
        self.bits = 0

    def read(self) -> None:
        """Decode what is there now. Unreadable, with `superblock` None, when no superblock can be used."""
        previous, self.superblock = self.superblock, None
        copies = [(at, self._decoded(at, SUPERBLOCK_BYTES, superblock_copy)) for at in (0, SUPERBLOCK_BYTES)]
        valid = [(found, at) for at, found in copies if found is not None]
        if not valid:
            raise Unreadable("both copies of the superblock are damaged")
        (_, version, body), at = max(valid, key=lambda one: one[0][0])
        if version != 1:
            raise Unreadable(f"format version {version}")
        raw = self._seen[at][0]
        if previous is None or raw != self.raw:
            previous, self.raw = superblock_fields(body), raw
        self.superblock = previous
        self._read_log(previous)
        self._read_bitmap(previous)

    def _decoded(self, at: int, length: int, decode: Any) -> Any:
        seen = self._seen.get(at)
        if seen is None or not self._image.startswith(seen[0], at) or len(seen[0]) != length:
            raw = bytes(self._image[at : at + length])
            seen = self._seen[at] = (raw, decode(raw))
        return seen[1]

    def _read_log(self, superblock: SimpleNamespace) -> None:
        size = superblock.al_copy_bytes
        at = superblock.al_offset
        self.extents = log_extents([self._decoded(at + size * copy, size, log_copy) for copy in range(AL_COPIES)])

    def _read_bitmap(self, superblock: SimpleNamespace) -> None:
        sector_bits, blocks = self._sector_bits, superblock.blocks
        slot = superblock.peers[0].bitmap_slot if superblock.peers else 0
        start = superblock.bitmap_offset + slot * REGION_STRIDE
        data = self._image[start : start + -(-blocks // sector_bits) * SECTOR_BYTES]
        epoch, default_ones = superblock.bitmap_epoch, superblock.bitmap_default_ones
        key = (data, epoch, default_ones, blocks)
        if key == self._bitmap:
            return
        self._bitmap = key
        bits = 0
        for number, at in enumerate(range(0, len(data), SECTOR_BYTES)):
            sector = bytes(data[at : at + SECTOR_BYTES])
            bits |= bitmap_sector(sector, number, epoch, default_ones, sector_bits) << number * sector_bits
        self.bits = bits & ((1 << blocks) - 1)
