"""Digests of a volume's blocks, and what two copies' digests say about where they differ. Pure.

xxh3-128, with a seed that is drawn for each run of a verification (a resync takes the number of its session): who
writes to the volume cannot prepare blocks that collide. A verification compares a range by one digest first, and block
by block only where that differs.
"""

import struct
from collections.abc import Iterable
from typing import Final

import xxhash

from replica.bitmap import BLOCK_SIZE, add_run
from replica.wire import ProtocolError

DIGEST_BYTES: Final = 16
_RUN: Final = struct.Struct("<II")

#: (first, count): blocks, numbered from the beginning of the range that was compared.
Runs = list[tuple[int, int]]


def digest(data: bytes, seed: int) -> bytes:
    """Of a range as a whole."""
    return xxhash.xxh3_128_digest(data, seed)


def block_digests(data: bytes, seed: int) -> bytes:
    """Of each 4 KiB of a range (its last block may be shorter), one after the other."""
    view, digest_of = memoryview(data), xxhash.xxh3_128_digest
    return b"".join(digest_of(view[at : at + BLOCK_SIZE], seed) for at in range(0, len(data), BLOCK_SIZE))


def differing(mine: bytes, theirs: bytes) -> Runs:
    """The blocks whose digests differ. ProtocolError when these are not the digests of equally many blocks."""
    if len(mine) != len(theirs) or len(mine) % DIGEST_BYTES:
        raise ProtocolError("the peer's digests are not those of the blocks that it was asked for.")
    runs: Runs = []
    for block in range(len(mine) // DIGEST_BYTES):
        at = block * DIGEST_BYTES
        if mine[at : at + DIGEST_BYTES] == theirs[at : at + DIGEST_BYTES]:
            continue
        add_run(runs, block, 1)
    return runs


def pack_runs(runs: Iterable[tuple[int, int]]) -> bytes:
    """The payload that names blocks."""
    return b"".join(_RUN.pack(first, count) for first, count in runs)


def unpack_runs(payload: bytes | memoryview, blocks: int) -> Runs:
    """The blocks that a payload names, all of them below `blocks`. ProtocolError."""
    if len(payload) % _RUN.size:
        raise ProtocolError("a list of blocks is cut short.")
    runs = list(_RUN.iter_unpack(payload))
    if any(not count or first + count > blocks for first, count in runs):
        raise ProtocolError("a list of blocks goes beyond the range that it is about.")
    return runs
