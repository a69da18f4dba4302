"""Changes an input message by message, so that mutated streams still get past magics and lengths. Pure.

A `split` cuts an input into its first byte (how it is delivered) and its messages; what does not look like a message
ends up in the last one.
"""

import random
from collections.abc import Callable
from typing import Literal

_EDGES = (
    0,
    1,
    2,
    4,
    511,
    512,
    4095,
    4096,
    4097,
    65535,
    65536,
    1 << 17,
    (1 << 20) - 1,
    1 << 20,
    (1 << 20) + 1,
    48 << 20,
)
_WRAPS = (1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1)
_MAX_BYTES = 1 << 17


#: Where the numbers are in a message: (offset, size) in bytes.
OPTION_FIELDS = ((8, 4), (12, 4), (16, 4))
REQUEST_FIELDS = ((4, 2), (6, 2), (16, 8), (24, 4))
FRAME_FIELDS = ((0, 2), (2, 2), (4, 4), (8, 8), (16, 8))
Fields = tuple[tuple[int, int], ...]


def whole(data: bytes) -> list[bytearray]:
    """An input that is one message and says nothing of its delivery."""
    return [bytearray(data)]


def options(data: bytes) -> list[bytearray]:
    """Client flags, then NBD options: IHAVEOPT, number, length, data."""
    return _cut(data, 5, 16, lambda rest: 16 + int.from_bytes(rest[12:16]))


def requests(data: bytes) -> list[bytearray]:
    """NBD requests; a WRITE (command 1) has its data behind it."""
    return _cut(data, 1, 28, lambda rest: 28 + (int.from_bytes(rest[24:28]) if rest[6:8] == b"\0\1" else 0))


def frames(data: bytes) -> list[bytearray]:
    """Frames of the peer link: 32 bytes of header, then the payload."""
    return _cut(data, 1, 32, lambda rest: 32 + int.from_bytes(rest[4:8], "little"))


def _cut(data: bytes, first: int, header: int, size_of: Callable[[bytes], int]) -> list[bytearray]:
    parts, at = [bytearray(data[:first])], first
    while len(data) - at >= header:
        size = size_of(data[at : at + header])
        parts.append(bytearray(data[at : at + size]))
        at += size
    parts.append(bytearray(data[at:]))
    return parts


def mutate(parts: list[bytearray], rng: random.Random, others: list[bytearray], fields: Fields) -> bytes:
    """One to three changes; messages of another input (`others`) may be put in."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        where = rng.randrange(len(parts))
        action = rng.randrange(12)
        if action == 0 and len(parts) > 2:
            del parts[where]
        elif action == 1:
            parts.insert(where, bytearray(parts[where]))
        elif action == 2:
            other = rng.randrange(len(parts))
            parts[where], parts[other] = parts[other], parts[where]
        elif action == 3 and others:
            parts.insert(where + 1, bytearray(rng.choice(others)))
        elif action == 4:
            at = rng.randint(0, len(parts[where]))
            parts[where][at:at] = rng.randbytes(rng.choice((1, 4, 28, 500)))
        elif action == 5:
            at = rng.randint(0, len(parts[where]))
            del parts[where][at : at + rng.choice((1, 4, 16))]
        elif action == 6 and rng.random() < 0.2:
            parts[where:where] = [parts[where]] * rng.choice((10, 100))
        elif action >= 6 and rng.random() < 0.8:
            _set_field(parts[where], rng, fields)
        elif parts[where]:
            parts[where][rng.randrange(len(parts[where]))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return b"".join(parts)[:_MAX_BYTES]


def _set_field(part: bytearray, rng: random.Random, fields: Fields) -> None:
    """A number at the edge of something into a field, or anywhere in a header; or one more or less than was there."""
    if fields and rng.random() < 0.8:
        at, width = rng.choice(fields)
    else:
        at, width = rng.randrange(40) & ~1, rng.choice((2, 4, 8))
    if len(part) < at + width:
        return
    order: Literal["big", "little"] = "little" if fields is FRAME_FIELDS or rng.random() < 0.2 else "big"
    if rng.random() < 0.3:
        value = int.from_bytes(part[at : at + width], order) + rng.choice((-1, 1))
    else:
        value = rng.choice(rng.choice((_EDGES, _WRAPS)))
    part[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, order)
