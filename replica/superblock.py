"""The superblock: what a node durably knows about its copy of one volume, and where the rest of its metadata is.

Pure: no I/O.  docs/on-disk.md describes the bytes.
"""

import struct
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import msgpack
import xxhash

from replica.activity_log import copy_bytes
from replica.bitmap import BLOCK_SIZE, SECTOR_BITS, SECTOR_BYTES, sectors_for
from replica.errors import ReplicaError
from replica.generation import HISTORY_LENGTH, MAX_ID, Generations

FORMAT_VERSION: Final = 1
SUPERBLOCK_BYTES: Final = 4096
AL_OFFSET: Final = 2 * SUPERBLOCK_BYTES
# Room for the bitmap of a 2 PiB volume; the file is sparse, so a distant second region costs nothing.
BITMAP_STRIDE: Final = 64 << 30
MAX_BITMAP_SLOTS: Final = 32
MAX_AL_SLOTS: Final = 1 << 16
MAX_VOLUME_BYTES: Final = BITMAP_STRIDE // SECTOR_BYTES * SECTOR_BITS * BLOCK_SIZE

_MAGIC = b"RplcaMD\n"
_HEADER = struct.Struct("<8sIIQ")
_HEADER_BYTES = _HEADER.size + 16
_MAX_NAME = 255


class MetadataError(ReplicaError):
    """The metadata can't be read, used or made; the text is one sentence."""


@dataclass(slots=True)
class PeerRecord:
    """What is kept about one peer.

    bitmap_slot  which bitmap region is kept against it
    outdated     it is known to lack writes that we acknowledged
    """

    name: str
    bitmap_slot: int = 0
    outdated: bool = False


@dataclass(slots=True)
class Superblock:
    """All durable state but the activity log and the bitmap.

    device_id            random, made with the metadata
    size_bytes           size of the volume
    al_slots             extents the activity log has room for
    backing_fingerprint  tells the backing file from another one, as replica.store makes it
    just_created         this copy never held data
    inconsistent         a resync is unfinished: not a complete copy of any moment
    outdated             complete, but the peer has newer data
    primary              Primary, or was and has not been stopped cleanly
    ahead                may hold writes that the peer lost (source among equals)
    promoted_alone       was promoted without its peer in this generation, and flushed then: holds, durably, everything
                         that was ever acknowledged in it (source among equals, before `ahead`)
    parted_as_primary    was Primary when the two were last in touch (`after-split-brain`: who is the older Primary)
    bitmap_epoch         part of every bitmap sector's checksum: a new epoch makes all stored sectors "all dirty"
    bitmap_default_ones  what a bitmap sector of zeroes means: all dirty, or all clean
    """

    cluster: str
    resource: str
    volume: int
    node: str
    device_id: int
    size_bytes: int
    al_slots: int
    backing_fingerprint: str
    peers: list[PeerRecord]
    block_size: int = BLOCK_SIZE
    generations: Generations = field(default_factory=Generations)
    just_created: bool = True
    inconsistent: bool = True
    outdated: bool = False
    primary: bool = False
    ahead: bool = False
    promoted_alone: bool = False
    parted_as_primary: bool = False
    bitmap_epoch: int = 1
    bitmap_default_ones: bool = False
    al_offset: int = AL_OFFSET
    al_copy_bytes: int = 0
    bitmap_offset: int = 0

    def __post_init__(self) -> None:
        if not self.al_copy_bytes:
            self.al_copy_bytes = copy_bytes(self.al_slots)
        if not self.bitmap_offset:
            self.bitmap_offset = self.al_offset + 4 * self.al_copy_bytes

    @property
    def blocks(self) -> int:
        """Blocks of the volume, the last one possibly partial."""
        return -(-self.size_bytes // self.block_size)

    def bitmap_region(self, slot: int = 0) -> tuple[int, int]:
        """(offset, length) of a peer's bitmap in the file, in bytes."""
        return self.bitmap_offset + slot * BITMAP_STRIDE, sectors_for(self.blocks) * SECTOR_BYTES


def encode(superblock: Superblock, sequence: int) -> bytes:
    """One copy, 4096 bytes.  MetadataError when names are too long or a value can't be stored."""
    fields = asdict(superblock)
    # Anything `decode` would refuse must never get to the disk.
    try:
        body: bytes = msgpack.packb(fields)
        _from_body(msgpack.unpackb(body))
    except (OverflowError, TypeError, MetadataError) as error:
        raise MetadataError(f"the metadata can't be stored: {error}") from error
    if _HEADER_BYTES + len(body) > SUPERBLOCK_BYTES:
        raise MetadataError("the names in the configuration are too long for the metadata: use shorter ones.")
    header = _HEADER.pack(_MAGIC, FORMAT_VERSION, len(body), sequence)
    data = header + xxhash.xxh3_128_digest(header + body) + body
    return data.ljust(SUPERBLOCK_BYTES, b"\0")


@dataclass(frozen=True, slots=True)
class Chosen:
    """The superblock to use; `stale` are the copies (0, 1) to rewrite with `data`."""

    superblock: Superblock
    sequence: int
    data: bytes
    stale: tuple[int, ...]
    warnings: tuple[str, ...]


def choose(copies: list[bytes], where: str) -> Chosen:
    """The newest valid of the two copies.  MetadataError when there is none, or when it is of a newer format."""
    found = [_open_copy(data) for data in copies]
    valid = [copy for copy in found if copy is not None]
    if not valid:
        if not any(map(any, copies)):
            raise MetadataError(f"{where} holds no metadata: make it with 'replicactl create-md'.")
        raise MetadataError(
            f"{where}: both copies of the superblock are damaged: restore the file, or make new metadata with "
            "'replicactl create-md --force' and let the peer resync this node in full."
        )
    version, sequence, body = max(valid, key=lambda copy: copy[1])
    if version != FORMAT_VERSION:
        raise MetadataError(
            f"{where} has format version {version}, this program knows {FORMAT_VERSION} only: install the version "
            "of Replica that wrote it."
        )
    data = next(raw for raw, copy in zip(copies, found, strict=True) if copy and copy[1] == sequence)
    try:
        superblock = _from_body(msgpack.unpackb(body))
    except (MetadataError, ValueError, msgpack.UnpackException) as error:
        raise MetadataError(f"{where} can't be used: {error}") from error
    warnings = tuple(
        f"{where}: copy {'AB'[at]} of the superblock was damaged, the other one is used."
        for at, copy in enumerate(found)
        if copy is None
    )
    stale = tuple(at for at, raw in enumerate(copies) if raw != data)
    return Chosen(superblock, sequence, data, stale, warnings)


def _open_copy(data: bytes) -> tuple[int, int, bytes] | None:
    """(format version, sequence, body) of a copy whose checksum holds; every version keeps this header."""
    magic, version, length, sequence = _HEADER.unpack_from(data)
    body = data[_HEADER_BYTES : _HEADER_BYTES + length]
    if magic != _MAGIC or len(body) != length:
        return None
    if data[_HEADER.size : _HEADER_BYTES] != xxhash.xxh3_128_digest(data[: _HEADER.size] + body):
        return None
    return version, sequence, body


def _from_body(body: Any) -> Superblock:
    generations = _map(body, "generations")
    history = _list(generations, "history", HISTORY_LENGTH)
    peers = [
        PeerRecord(_text(peer, "name"), _number(peer, "bitmap_slot", 0, MAX_BITMAP_SLOTS - 1), _flag(peer, "outdated"))
        for peer in _list(body, "peers", MAX_BITMAP_SLOTS)
    ]
    if not peers:
        raise MetadataError("its peers are missing.")
    return Superblock(
        cluster=_text(body, "cluster"),
        resource=_text(body, "resource"),
        volume=_number(body, "volume", 0, 65535),
        node=_text(body, "node"),
        device_id=_number(body, "device_id", 0, MAX_ID),
        size_bytes=_number(body, "size_bytes", 1, MAX_VOLUME_BYTES),
        al_slots=_number(body, "al_slots", 1, MAX_AL_SLOTS),
        backing_fingerprint=_text(body, "backing_fingerprint"),
        peers=peers,
        block_size=_number(body, "block_size", BLOCK_SIZE, BLOCK_SIZE),
        generations=Generations(
            _number(generations, "current", 0, MAX_ID),
            _number(generations, "base", 0, MAX_ID),
            tuple(_id(one) for one in history),
        ),
        just_created=_flag(body, "just_created"),
        inconsistent=_flag(body, "inconsistent"),
        outdated=_flag(body, "outdated"),
        primary=_flag(body, "primary"),
        ahead=_flag(body, "ahead"),
        promoted_alone=_flag(body, "promoted_alone"),
        # Written since there are policies; without it no policy can tell who was Primary first.
        parted_as_primary="parted_as_primary" in body and _flag(body, "parted_as_primary"),
        bitmap_epoch=_number(body, "bitmap_epoch", 0, MAX_ID),
        bitmap_default_ones=_flag(body, "bitmap_default_ones"),
        al_offset=_number(body, "al_offset", AL_OFFSET, MAX_ID),
        al_copy_bytes=_number(body, "al_copy_bytes", 4096, 1 << 20),
        bitmap_offset=_number(body, "bitmap_offset", AL_OFFSET, MAX_ID),
    )


def _wrong(key: str, value: object) -> MetadataError:
    return MetadataError(f"its field '{key}' is {value!r}.")


def _map(body: Any, key: str) -> dict[str, Any]:
    if not isinstance(body, dict) or not isinstance(body.get(key), dict):
        raise _wrong(key, None)
    value: dict[str, Any] = body[key]
    return value


def _list(body: Any, key: str, longest: int) -> list[Any]:
    value = body.get(key) if isinstance(body, dict) else None
    if not isinstance(value, list) or len(value) > longest:
        raise _wrong(key, value)
    return value


def _text(body: Any, key: str) -> str:
    value = body.get(key) if isinstance(body, dict) else None
    if not isinstance(value, str) or len(value) > _MAX_NAME:
        raise _wrong(key, value)
    return value


def _number(body: Any, key: str, low: int, high: int) -> int:
    value = body.get(key) if isinstance(body, dict) else None
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _wrong(key, value)
    return value


def _id(value: object) -> int:
    if not isinstance(value, int) or not 0 < value <= MAX_ID:
        raise _wrong("history", value)
    return value


def _flag(body: Any, key: str) -> bool:
    value = body.get(key) if isinstance(body, dict) else None
    if not isinstance(value, bool):
        raise _wrong(key, value)
    return value
