"""Validation and coding of requests and replies, line by line of the protocol text."""

import errno
import struct

import pytest

from nbdserver import constants as c
from nbdserver.streamed_write import MIN_PIECE_BYTES, StreamedWrite
from nbdserver.transmission import REQUEST, Dialect, reply, split_kind, validate, wire_error, write_replies

SIZE = 100 * 1024 * 1024
FUA, NO_HOLE, DF = c.CMD_FLAG_FUA, c.CMD_FLAG_NO_HOLE, c.CMD_FLAG_DF
READ, WRITE, TRIM, ZEROES, FLUSH = c.CMD_READ, c.CMD_WRITE, c.CMD_TRIM, c.CMD_WRITE_ZEROES, c.CMD_FLUSH
MIB = 1024 * 1024


@pytest.mark.parametrize(
    ("command", "flags", "offset", "length", "expected"),
    [
        (READ, 0, 0, 4096, 0),
        (READ, 0, SIZE - 1, 1, 0),
        (READ, 0, SIZE - 1, 2, c.EINVAL),
        (READ, 0, SIZE, 0, 0),
        (READ, 0, SIZE + 1, 0, c.EINVAL),
        (READ, 0, 2**64 - 1, 2, c.EINVAL),  # would wrap in 64 bits
        (READ, FUA, 0, 1, 0),
        (READ, DF, 0, 1, c.EINVAL),  # needs structured replies
        (READ, FUA | NO_HOLE, 0, 1, c.EINVAL),
        (READ, 0, 0, 48 * MIB, 0),
        (READ, 0, 0, 48 * MIB + 1, c.EINVAL),
        (WRITE, 0, 0, 4096, 0),
        (WRITE, FUA, 4096, 4096, 0),
        (WRITE, NO_HOLE, 0, 1, c.EINVAL),
        (WRITE, 1 << 15, 0, 1, c.EINVAL),
        (WRITE, 0, SIZE - 1, 2, c.ENOSPC),
        (WRITE, 0, 2**64 - 4096, 4096, c.ENOSPC),
        (WRITE, 0, 0, 49_865_728, 0),  # a well-known tester sends this
        (WRITE, 0, 0, 48 * MIB + 1, c.EINVAL),
        (WRITE, 0, SIZE, 0, 0),
        (TRIM, 0, 0, SIZE, 0),
        (TRIM, FUA, 0, 1, 0),
        (TRIM, NO_HOLE, 0, 1, c.EINVAL),
        (TRIM, 0, 1, SIZE, c.EINVAL),
        (ZEROES, 0, 0, SIZE, 0),
        (ZEROES, FUA | NO_HOLE, 0, 1, 0),
        (ZEROES, FUA | NO_HOLE | c.CMD_FLAG_FAST_ZERO, 0, 1, 0),
        (TRIM, c.CMD_FLAG_FAST_ZERO, 0, 1, c.EINVAL),
        (ZEROES, 0, 1, SIZE, c.ENOSPC),
        (FLUSH, 0, 0, 0, 0),
        (FLUSH, FUA, 0, 0, 0),
        (FLUSH, NO_HOLE, 0, 0, c.EINVAL),
        (FLUSH, 0, 1, 0, c.EINVAL),
        (FLUSH, 0, 0, 1, c.EINVAL),
        (c.CMD_CACHE, 0, 0, 1, 0),
        (c.CMD_CACHE, FUA, SIZE, 0, 0),
        (c.CMD_CACHE, 0, 0, SIZE, 0),  # carries no data: any length
        (c.CMD_CACHE, 0, 1, SIZE, c.EINVAL),
        (c.CMD_CACHE, c.CMD_FLAG_REQ_ONE, 0, 1, c.EINVAL),
        (c.CMD_BLOCK_STATUS, 0, 0, 1, c.EINVAL),  # no context was negotiated
        (8, 0, 0, 0, c.EINVAL),
        (65535, 0, 0, 0, c.EINVAL),
    ],
)
def test_validate(command, flags, offset, length, expected):
    found = validate(command, flags, offset, length, size_bytes=SIZE, read_only=False, dialect=Dialect())
    assert found == expected


@pytest.mark.parametrize(
    ("command", "flags", "offset", "length", "expected"),
    [
        (READ, DF, 0, 1, 0),
        (READ, DF | FUA, 0, 32 * MIB, 0),
        (READ, DF, 0, 32 * MIB + 1, c.EOVERFLOW),  # over what one chunk may hold
        (READ, DF, SIZE, 1, c.EINVAL),
        (WRITE, DF, 0, 1, c.EINVAL),
        (c.CMD_BLOCK_STATUS, 0, 0, 1, 0),
        (c.CMD_BLOCK_STATUS, c.CMD_FLAG_REQ_ONE | FUA, 0, SIZE, 0),
        (c.CMD_BLOCK_STATUS, DF, 0, 1, c.EINVAL),
        (c.CMD_BLOCK_STATUS, 0, 0, 0, c.EINVAL),
        (c.CMD_BLOCK_STATUS, 0, SIZE, 1, c.EINVAL),
        (c.CMD_BLOCK_STATUS, 0, 2**64 - 1, 2, c.EINVAL),
        (READ, c.CMD_FLAG_REQ_ONE, 0, 1, c.EINVAL),
    ],
)
def test_validate_with_everything_negotiated(command, flags, offset, length, expected):
    dialect = Dialect(structured_replies=True, base_allocation=True)
    assert validate(command, flags, offset, length, size_bytes=SIZE, read_only=False, dialect=dialect) == expected


@pytest.mark.parametrize(
    ("command", "expected"),
    [(READ, 0), (FLUSH, 0), (WRITE, c.EPERM), (TRIM, c.EPERM), (ZEROES, c.EPERM), (c.CMD_CACHE, 0)],
)
def test_validate_read_only(command, expected):
    assert validate(command, 0, 0, 0, size_bytes=SIZE, read_only=True, dialect=Dialect()) == expected


def test_only_the_protocols_error_numbers_reach_the_wire():
    allowed = {1, 5, 12, 22, 28, 108}
    assert {wire_error(number) for number in errno.errorcode} == allowed
    assert wire_error(None) == wire_error(errno.ENODEV) == wire_error(99999) == c.EIO
    assert wire_error(errno.EROFS) == c.EPERM
    assert wire_error(errno.EDQUOT) == c.ENOSPC
    assert wire_error(errno.ESHUTDOWN) == c.ESHUTDOWN


def test_request_and_reply_coding():
    wire = struct.pack(">IHHQQI", 0x25609513, 3, 6, 0x0102030405060708, 2**63, 77)
    kind, cookie, offset, length = REQUEST.unpack(wire)
    assert split_kind(kind) == (c.REQUEST_MAGIC, 3, 6)
    assert (cookie, offset, length) == (b"\1\2\3\4\5\6\7\x08", 2**63, 77)
    assert reply(cookie, 28) == struct.pack(">IIQ", 0x67446698, 28, 0x0102030405060708)


def test_write_replies():
    cookies = [bytes([n]) * 8 for n in range(4)]
    assert write_replies(cookies, {}) == b"".join(reply(cookie, 0) for cookie in cookies)
    mixed = write_replies(cookies, {1: 28, 3: 9999})
    assert mixed == b"".join(reply(cookie, error) for cookie, error in zip(cookies, (0, 28, 0, 5), strict=True))


@pytest.mark.parametrize(
    ("offset", "length", "available", "expected"),
    [
        (0, MIB, 0, 0),
        (0, MIB, MIN_PIECE_BYTES - 1, 0),
        (0, MIB, MIN_PIECE_BYTES, MIN_PIECE_BYTES),
        (0, MIB, MIN_PIECE_BYTES + 5000, MIN_PIECE_BYTES + 4096),
        (512, MIB, MIN_PIECE_BYTES + 4096, MIN_PIECE_BYTES + 4096 - 512),  # ends on a block boundary
        (0, MIB, MIB, MIB),
        (0, MIB, MIB + 100, MIB),
        (0, 100, 100, 100),  # the end may be small
        (0, 100, 99, 0),
    ],
)
def test_pieces(offset, length, available, expected):
    assert StreamedWrite(b"", offset, length, fua=False, error=0).next_piece(available) == expected


def test_rejected_payload_is_taken_as_it_comes():
    stream = StreamedWrite(b"", 0, MIB, fua=False, error=28)
    assert stream.next_piece(7) == 7
    stream.take(7)
    assert not stream.is_complete
    stream.take(MIB - 7)
    assert stream.is_complete


def test_first_error_of_a_streamed_write_stays():
    stream = StreamedWrite(b"", 0, 10, fua=False, error=0)
    stream.take(10)
    stream.outstanding = 3
    stream.piece_done({})
    stream.piece_done({0: 28})
    assert not stream.is_complete
    stream.piece_done({0: 5})
    assert stream.is_complete
    assert stream.error == 28
