"""Reads what an NBD server sends, by the protocol text alone: anything that is not valid is an AssertionError.

Source: NetworkBlockDevice/nbd, doc/proto.md. Nothing of `nbdserver` is used here, so that a mistake made there is not
made twice.
"""

import struct
from dataclasses import dataclass, field

OPTION_MAGIC = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
GREETING = b"NBDMAGICIHAVEOPT"

OPT_EXPORT_NAME = 1
CMD_READ, CMD_WRITE, CMD_DISC = 0, 1, 2

_REPLY_KINDS = {1, 2, 3, 4, *(1 << 31 | number for number in range(1, 11))}
_ERRORS = {0, 1, 5, 12, 22, 28, 75, 95, 108}
_CHUNK_DONE = 1
_MAX_REPLY_BYTES = 16 << 20


@dataclass(frozen=True)
class Request:
    """One request whose bytes have all been sent: `length` in bytes."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int


@dataclass
class Answers:
    """What a server sent in the transmission phase: the error number (0: done) for each cookie, in order of arrival."""

    errors: list[tuple[int, int]] = field(default_factory=list)
    data: dict[int, bytes] = field(default_factory=dict)


def requests_in(stream: bytes) -> tuple[list[Request], bool]:
    """The whole requests at the start of what a client sends, and whether the server has to hang up behind them."""
    found: list[Request] = []
    at = 0
    while len(stream) - at >= 28:
        magic, flags, command, cookie, offset, length = struct.unpack_from(">IHHQQI", stream, at)
        if magic != REQUEST_MAGIC or command == CMD_DISC:
            return found, True
        at += 28 + (length if command == CMD_WRITE else 0)
        if at > len(stream):
            break
        found.append(Request(flags, command, cookie, offset, length))
    return found, False


def with_own_cookies(stream: bytes) -> bytes:
    """The same requests, each with a cookie of its own, so that their replies can be told apart."""
    out, at, number = bytearray(stream), 0, 0
    while len(out) - at >= 28 and struct.unpack_from(">I", out, at)[0] == REQUEST_MAGIC:
        struct.pack_into(">Q", out, at + 8, number)
        command, length = struct.unpack_from(">H", out, at + 6)[0], struct.unpack_from(">I", out, at + 24)[0]
        at += 28 + (length if command == CMD_WRITE else 0)
        number += 1
    return bytes(out)


def option_replies(sent: bytes) -> int:
    """Check replies to options (behind the greeting); returns how many bytes they are."""
    at = 0
    while len(sent) - at >= 8 and struct.unpack_from(">Q", sent, at)[0] == OPTION_REPLY_MAGIC:
        assert len(sent) - at >= 20, "half an option reply"
        _, _, kind, length = struct.unpack_from(">QIII", sent, at)
        assert kind in _REPLY_KINDS, f"option reply {kind:#x} is not in the protocol"
        assert length <= _MAX_REPLY_BYTES
        at += 20 + length
        assert at <= len(sent), "an option reply is shorter than it says"
    return at


def handshake_replies(sent: bytes, *, opened: bool) -> None:
    """Check everything that was sent in a handshake: the greeting, then replies, then perhaps an EXPORT_NAME's."""
    assert sent[:16] == GREETING
    assert len(sent) >= 18
    rest = sent[18 + option_replies(sent[18:]) :]
    # Only an EXPORT_NAME is answered by something else: size and flags, with or without 124 zeroes.
    assert rest == b"" or (opened and len(rest) in (10, 134)), f"{len(rest)} bytes that are no option reply"


def transmission_replies(sent: bytes, requests: list[Request]) -> Answers:
    """Check replies, simple and structured; the data of reads is taken with the length of the request of that cookie.

    Each request must have a cookie of its own.
    """
    lengths = {request.cookie: request.length if request.command == CMD_READ else 0 for request in requests}
    answers = Answers()
    at = 0
    while at < len(sent):
        assert len(sent) - at >= 16, "half a reply"
        (magic,) = struct.unpack_from(">I", sent, at)
        if magic == STRUCTURED_REPLY_MAGIC:
            at = _chunk(sent, at, lengths, answers)
            continue
        assert magic == SIMPLE_REPLY_MAGIC, f"{magic:#x} is no reply's magic"
        error, cookie = struct.unpack_from(">IQ", sent, at + 4)
        assert cookie in lengths, "a reply to nothing that was asked"
        at += 16
        if not error and lengths[cookie]:
            answers.data[cookie] = sent[at : at + lengths[cookie]]
            at += lengths[cookie]
        _answer(answers, cookie, error)
    assert at == len(sent), "the last reply is shorter than it has to be"
    return answers


def _chunk(sent: bytes, at: int, lengths: dict[int, int], answers: Answers) -> int:
    assert len(sent) - at >= 20, "half a chunk"
    flags, kind, cookie, length = struct.unpack_from(">HHQI", sent, at + 4)
    assert cookie in lengths, "a chunk for nothing that was asked"
    at += 20
    assert at + length <= len(sent), "a chunk is shorter than it says"
    assert not flags & ~_CHUNK_DONE
    error = 0
    if kind & 1 << 15:
        error, text_length = struct.unpack_from(">IH", sent, at)
        assert error, "an error chunk without an error"
        assert 6 + text_length <= length
    else:
        assert kind in (0, 1, 2, 5), f"chunk type {kind} was not negotiated"
        assert kind != 0 or (length == 0 and flags & _CHUNK_DONE)
    if error:
        answers.data[cookie] = b""
    if flags & _CHUNK_DONE:
        _answer(answers, cookie, error)
    return at + length


def _answer(answers: Answers, cookie: int, error: int) -> None:
    assert error in _ERRORS, f"error {error} is not in the protocol"
    answers.errors.append((cookie, error))
