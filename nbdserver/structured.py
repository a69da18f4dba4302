"""Coding of structured replies: chunks, without I/O.

Source: NetworkBlockDevice/nbd, doc/proto.md, "Structured reply chunk message".
"""

from collections.abc import Sequence
from struct import Struct

from nbdserver import constants as c
from nbdserver.extents import Extent
from nbdserver.meta_context import BASE_ALLOCATION_ID

# Magic, flags and type are one field here, the kind, as in a request; as bytes they are packed faster.
_CHUNK = Struct(">8s8sI")  # kind, cookie, length of what follows
_DATA = Struct(">8s8sIQ")  # …, offset
_HOLE = Struct(">8s8sIQI")  # …, offset, length of the hole
_ERROR = Struct(">8s8sIIH")  # …, error number, length of the text
_U32 = Struct(">I")
_DESCRIPTOR = Struct(">II")

#: What `data` does, for reads that are answered in place: of (kind, cookie, length + 8, offset).
pack_data = _DATA.pack


def _kind(chunk_type: int, flags: int) -> bytes:
    return (c.STRUCTURED_REPLY_MAGIC << 32 | flags << 16 | chunk_type).to_bytes(8, "big")


_NONE_DONE = _kind(c.REPLY_NONE, c.REPLY_FLAG_DONE)
DATA_DONE = _kind(c.REPLY_OFFSET_DATA, c.REPLY_FLAG_DONE)
_DATA_MORE = _kind(c.REPLY_OFFSET_DATA, 0)
_HOLE_DONE = _kind(c.REPLY_OFFSET_HOLE, c.REPLY_FLAG_DONE)
_HOLE_MORE = _kind(c.REPLY_OFFSET_HOLE, 0)
_STATUS_DONE = _kind(c.REPLY_BLOCK_STATUS, c.REPLY_FLAG_DONE)
_ERROR_DONE = _kind(c.REPLY_ERROR, c.REPLY_FLAG_DONE)

_ERROR_TEXTS = {
    c.EPERM: "the export is read-only",
    c.EIO: "the storage reports an error",
    c.ENOMEM: "the server is out of memory",
    c.EINVAL: "the request is malformed, out of range, or needs what was not negotiated",
    c.ENOSPC: "no space is left, or the range is beyond the end",
    c.EOVERFLOW: "the range is too long for one chunk",
    c.ESHUTDOWN: "the export is no longer served here",
}


def data(cookie: bytes, offset: int, length: int, *, last: bool = True) -> bytes:
    """The header of a READ's chunk; `length` > 0 bytes of data have to follow it."""
    return pack_data(DATA_DONE if last else _DATA_MORE, cookie, length + 8, offset)


def hole(cookie: bytes, offset: int, length: int, *, last: bool) -> bytes:
    """`length` > 0 bytes of a READ that are zeroes."""
    return _HOLE.pack(_HOLE_DONE if last else _HOLE_MORE, cookie, 12, offset, length)


def nothing(cookie: bytes) -> bytes:
    """The whole reply to a READ of no bytes."""
    return _CHUNK.pack(_NONE_DONE, cookie, 0)


def block_status(cookie: bytes, extents: Sequence[Extent]) -> bytes:
    """The whole reply to a BLOCK_STATUS, in the one context there is; at least one extent."""
    descriptors = b"".join([_DESCRIPTOR.pack(length, flags) for length, flags in extents])
    header = _CHUNK.pack(_STATUS_DONE, cookie, _U32.size + len(descriptors))
    return header + _U32.pack(BASE_ALLOCATION_ID) + descriptors


def error(cookie: bytes, number: int) -> bytes:
    """The whole reply to a request that failed with one of the protocol's error numbers."""
    text = _ERROR_TEXTS.get(number, "the request failed").encode()
    return _ERROR.pack(_ERROR_DONE, cookie, 6 + len(text), number, len(text)) + text
