"""Requests and replies of the transmission phase: coding and validation, without I/O.

Source: NetworkBlockDevice/nbd, doc/proto.md, "Transmission phase" and "Request types".
"""

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from struct import Struct

from nbdserver import constants as c


@dataclass(frozen=True)
class Dialect:
    """What the transmission phase may use beyond its first version."""

    structured_replies: bool = False
    base_allocation: bool = False


# Magic, flags and command are one number here, so that the commonest requests are told apart by a single
# comparison; the cookie stays the eight opaque bytes it is.
REQUEST = Struct(">Q8sQI")  # kind, cookie, offset, length
REQUEST_BYTES = REQUEST.size
_ERROR = Struct(">II")

PLAIN_READ = c.REQUEST_MAGIC << 32 | c.CMD_READ
PLAIN_WRITE = c.REQUEST_MAGIC << 32 | c.CMD_WRITE

REPLY_OK = _ERROR.pack(c.SIMPLE_REPLY_MAGIC, 0)  # followed by the cookie

_ALLOWED_FLAGS = {
    c.CMD_READ: c.CMD_FLAG_FUA | c.CMD_FLAG_DF,
    c.CMD_WRITE: c.CMD_FLAG_FUA,
    c.CMD_FLUSH: c.CMD_FLAG_FUA,
    c.CMD_TRIM: c.CMD_FLAG_FUA,
    c.CMD_CACHE: c.CMD_FLAG_FUA,
    c.CMD_WRITE_ZEROES: c.CMD_FLAG_FUA | c.CMD_FLAG_NO_HOLE | c.CMD_FLAG_FAST_ZERO,
    c.CMD_BLOCK_STATUS: c.CMD_FLAG_FUA | c.CMD_FLAG_REQ_ONE,
}

_CHANGES_DATA = frozenset((c.CMD_WRITE, c.CMD_TRIM, c.CMD_WRITE_ZEROES))
_CARRIES_DATA = frozenset((c.CMD_READ, c.CMD_WRITE))
# The protocol text wants ENOSPC where data would have to be stored behind the end, EINVAL elsewhere.
_ENOSPC_BEYOND_END = frozenset((c.CMD_WRITE, c.CMD_WRITE_ZEROES))

_WIRE_ERRORS = {
    errno.EPERM: c.EPERM,
    errno.EACCES: c.EPERM,
    errno.EROFS: c.EPERM,
    errno.EIO: c.EIO,
    errno.ENOMEM: c.ENOMEM,
    errno.EINVAL: c.EINVAL,
    errno.ENOSPC: c.ENOSPC,
    errno.EDQUOT: c.ENOSPC,
    errno.EFBIG: c.ENOSPC,
    errno.ESHUTDOWN: c.ESHUTDOWN,
    # On the wire, ENOTSUP and EOVERFLOW speak of the request (FAST_ZERO, DF), never of what storage says.
    errno.EOPNOTSUPP: c.EINVAL,
    errno.EOVERFLOW: c.EINVAL,
}


def split_kind(kind: int) -> tuple[int, int, int]:
    """(magic, flags, command) of a request's first eight bytes."""
    return kind >> 32, kind >> 16 & 0xFFFF, kind & 0xFFFF


def validate(
    command: int, flags: int, offset: int, length: int, *, size_bytes: int, read_only: bool, dialect: Dialect
) -> int:
    """The NBD error number a request deserves before anything is done about it; 0 when it is in order.

    A DISC is not a request in this sense: it has no reply, whatever its other fields say.
    """
    allowed_flags = _ALLOWED_FLAGS.get(command)
    if allowed_flags is None or flags & ~allowed_flags:
        return c.EINVAL
    if flags & c.CMD_FLAG_DF and not dialect.structured_replies:
        return c.EINVAL
    if command == c.CMD_BLOCK_STATUS and not (length and dialect.base_allocation):
        return c.EINVAL
    if command == c.CMD_FLUSH:
        return c.EINVAL if offset or length else 0
    if read_only and command in _CHANGES_DATA:
        return c.EPERM
    if command in _CARRIES_DATA and length > c.MAX_REQUEST_BYTES:
        return c.EINVAL
    if offset + length > size_bytes:  # Python's integers do not wrap
        return c.ENOSPC if command in _ENOSPC_BEYOND_END else c.EINVAL
    if flags & c.CMD_FLAG_DF and length > c.MAX_BLOCK_BYTES:
        return c.EOVERFLOW  # a single chunk must not be longer than the maximum that was advertised
    return 0


def wire_error(number: int | None) -> int:
    """The protocol's error number for an errno; EIO for what the protocol has no number for."""
    if number is None:
        return c.EIO
    return _WIRE_ERRORS.get(number, c.EIO)


def reply(cookie: bytes, error: int) -> bytes:
    """A simple reply; the data of a successful READ has to follow it."""
    return _ERROR.pack(c.SIMPLE_REPLY_MAGIC, error) + cookie


def write_replies(cookies: Sequence[bytes], errors: Mapping[int, int]) -> bytes:
    """The replies to a batch of writes; `errors` maps indexes in it to error numbers, empty for none."""
    if not errors:
        return REPLY_OK + REPLY_OK.join(cookies)
    return b"".join(
        reply(cookie, wire_error(errors[index]) if index in errors else 0) for index, cookie in enumerate(cookies)
    )
