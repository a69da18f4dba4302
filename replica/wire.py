"""The frames of the peer link: a fixed 32-byte header, then raw data or one msgpack map.

    offset  size  field
    0       1     kind          one of the constants below
    1       1     flags
    2       2     volume        volume number inside the resource (this version serves volume 0)
    4       4     length        payload bytes, at most MAX_PAYLOAD_BYTES
    8       8     sequence      write number (hot path) or request number (control)
    16      8     offset        byte offset in the volume, or an argument of the kind
    24      8     checksum      xxh3_64 of the payload seeded with xxh3_64 of bytes 0..23; 0 without data-integrity

All integers are little endian. This module is pure: it turns values into bytes and back, and rejects what does not fit.
"""

import struct
from typing import Any, Final

import msgpack
import xxhash

from replica.errors import ReplicaError

#: The protocol versions this program speaks. A pair uses the highest version both know.
VERSION_MIN: Final = 1
VERSION_MAX: Final = 1

MAX_PAYLOAD_BYTES: Final = 1 << 20
#: Bound for what may be said before the peer has proven that it knows the secret.
MAX_GREETING_BYTES: Final = 4096

HEADER: Final = struct.Struct("<BBHIQQQ")
HEADER_BYTES: Final = HEADER.size
_U64: Final = struct.Struct("<Q")

# Greeting and control. Payloads are msgpack maps unless said otherwise.
HELLO: Final = 0x52  # "R": a stray client's first byte is hardly ever this one
AUTH: Final = 0x02  # payload: 32 bytes of HMAC-SHA-256
ERROR: Final = 0x03  # payload: one UTF-8 sentence; the sender closes; FLAG_AGAIN: to negotiate anew at once
PING: Final = 0x04
PONG: Final = 0x05
STATE: Final = 0x06  # the whole state of the sender, opens the handshake
UPDATE: Final = 0x07  # what changed since (role, disk, pause)
REQUEST: Final = 0x08  # {"op": …}; sequence = request number
REPLY: Final = 0x09  # {"ok": True} or {"error": sentence}

# Replication, Primary to Secondary.
WRITE: Final = 0x10  # offset, payload = data
WRITE_DURABLE: Final = 0x11  # the same with FUA; answered by DONE
ZERO: Final = 0x12  # offset, payload = u64 length; FLAG_PUNCH: deallocate; answered by DONE
FLUSH: Final = 0x13  # answered by DONE
# Secondary to Primary.
RECEIVED: Final = 0x18  # all WRITEs up to sequence are in this node's memory (protocol B)
APPLIED: Final = 0x19  # all WRITEs up to sequence are applied (page cache or better)
DONE: Final = 0x1A  # the one request `sequence` is done; FLAG_ERROR: offset = errno

# Resynchronisation. "Source" and "target" are decided by replica.generation.
BITMAP: Final = 0x20  # payload: one message of Bitmap.pack(); FLAG_LAST on the last one
SYNC_START: Final = 0x21  # source: {"base", "current", "history", "dirty"}
SYNC_READY: Final = 0x22  # target: its superblock says what it is now
SYNC_DATA: Final = 0x23  # offset, payload = data
SYNC_ZERO: Final = 0x24  # offset, payload = u64 length: the source has a hole here; answered by SYNC_ACK
SYNC_ACK: Final = 0x25  # target: sync frame `sequence` is applied (not yet durable)
SYNC_FLUSH: Final = 0x26  # make every sync frame before this one durable
SYNC_FLUSHED: Final = 0x27  # answer, same sequence
SYNC_FINISH: Final = 0x28  # source: nothing is dirty any more; {"current", "history"}
SYNC_DONE: Final = 0x29  # target: recorded as UpToDate

# A Primary without a good disk works through its peer's volume: it sends its clients' changes in the frames above
# (WRITE to FLUSH, answered by APPLIED and DONE), between these.
SERVE: Final = 0x30  # Primary: begin; nothing follows before the answer. FLAG_TARGET: its disk is being resynced
SERVING: Final = 0x31  # {"current"}: recorded that the Primary's disk lacks what comes now; or {"error": sentence}
READ: Final = 0x32  # offset, payload = u64 length, at most MAX_PAYLOAD_BYTES
READ_DATA: Final = 0x33  # the answer, same sequence; FLAG_ERROR: offset = errno
YIELD: Final = 0x34  # Primary: end; everything sent before is answered
YIELDED: Final = 0x35  # both copies are flushed and no extent is hot on this side any more

# Resynchronisation, if the target's STATE says "sync_hashes": which blocks have to be sent at all.
SYNC_HASH: Final = 0x3E  # source: offset of the first block, payload = the blocks' hashes (replica.sync_hash)
SYNC_DIFFERS: Final = 0x3F  # target: the answer, same sequence; payload = one bit for each block, 1: it differs

# Verification (replica.verify). "Driver" is the node that was asked to; `sequence` numbers the driver's ranges.
VERIFY_HASH: Final = 0x50  # driver: hold this range and hash it: offset, payload = u64 length
VERIFY_DIGEST: Final = 0x51  # the answer, same sequence: digests of 16 bytes; FLAG_ERROR: offset = errno
VERIFY_BLOCKS: Final = 0x52  # driver: the digests of each block of a range that is held; answered by VERIFY_DIGEST
VERIFY_HOLE: Final = 0x53  # driver: hold this range, which is a hole here: offset, payload = u64 length
VERIFY_DATA: Final = (
    0x54  # the answer, same sequence: offset, payload = u64 length of the first data in it; or FLAG_ERROR
)
VERIFY_DONE: Final = 0x55  # driver: let go of a range, compared up to offset; payload = its blocks that differ
VERIFY_CLEAN: Final = 0x56  # Primary: offset, payload = u64 length: repaired, and durable on both nodes
VERIFY_END: Final = 0x57  # either: the run is over; {"reason": "" or why, "found", "repaired", "position"}

FLAG_PUNCH: Final = 0x01
FLAG_LAST: Final = 0x02
FLAG_TARGET: Final = 0x04
FLAG_AGAIN: Final = 0x04
FLAG_ERROR: Final = 0x80

KIND_NAMES: Final = {
    value: name
    for name, value in list(globals().items())
    if isinstance(value, int) and name.isupper() and not name.startswith(("FLAG", "MAX", "VERSION", "HEADER", "_"))
}


class ProtocolError(ReplicaError):
    """The peer sent something this protocol does not allow; the connection cannot go on."""


def pack(
    kind: int,
    payload: bytes = b"",
    *,
    flags: int = 0,
    volume: int = 0,
    sequence: int = 0,
    offset: int = 0,
    integrity: bool = False,
) -> bytes:
    """One whole frame. The hot path packs headers itself (see replica.volume)."""
    return pack_header(kind, payload, flags, volume, sequence, offset, integrity) + payload


def pack_header(
    kind: int,
    payload: bytes | memoryview,
    flags: int,
    volume: int,
    sequence: int,
    offset: int,
    integrity: bool,
) -> bytes:
    """The header of a frame whose payload is sent from where it is."""
    check = checksum(kind, flags, volume, len(payload), sequence, offset, payload) if integrity else 0
    return HEADER.pack(kind, flags, volume, len(payload), sequence, offset, check)


_PREFIX: Final = struct.Struct("<BBHIQQ")


def checksum(
    kind: int,
    flags: int,
    volume: int,
    length: int,
    sequence: int,
    offset: int,
    payload: bytes | memoryview,
) -> int:
    """xxh3_64 over header and payload; the header's own hash is the seed, so that neither can be swapped alone."""
    seed = xxhash.xxh3_64_intdigest(_PREFIX.pack(kind, flags, volume, length, sequence, offset))
    return xxhash.xxh3_64_intdigest(payload, seed)


def pack_map(value: dict[str, Any]) -> bytes:
    """The payload of a control frame."""
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    if len(packed) > MAX_PAYLOAD_BYTES:
        raise ProtocolError(f"a control message of {len(packed)} bytes is over the bound of {MAX_PAYLOAD_BYTES}.")
    return packed


def unpack_map(payload: bytes | memoryview) -> dict[str, Any]:
    """The map in a control frame's payload; ProtocolError when it is anything else."""
    try:
        value = msgpack.unpackb(
            payload,
            raw=False,
            strict_map_key=True,
            max_str_len=4096,
            max_bin_len=4096,
            max_array_len=1024,
            max_map_len=256,
            max_ext_len=0,
        )
    except Exception as error:  # msgpack raises a family of unrelated types on bad input
        raise ProtocolError(f"a control message could not be read ({type(error).__name__}).") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ProtocolError("a control message is not a map with names as keys.")
    return value


def field(message: dict[str, Any], name: str, kind: type) -> Any:
    """The named value of a control message, checked for its type; ProtocolError when missing or of another type."""
    value = message.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ProtocolError(f"a control message lacks a proper {name!r}.")
    return value


def pack_length(length: int) -> bytes:
    """The payload of ZERO, SYNC_ZERO and READ: a u64 length in bytes."""
    return _U64.pack(length)


def unpack_length(payload: bytes | memoryview) -> int:
    """The u64 length in the payload of ZERO, SYNC_ZERO and READ."""
    if len(payload) != _U64.size:
        raise ProtocolError("a frame that names a range must carry a 64-bit length.")
    value: int = _U64.unpack(payload)[0]
    return value


def kind_name(kind: int) -> str:
    """The name of a frame kind, for logs."""
    return KIND_NAMES.get(kind, f"0x{kind:02x}")
