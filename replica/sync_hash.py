"""Comparing blocks by their hashes before they are sent. After a crash whole extents are dirty, and few blocks differ.

Pure. The hashes are `replica.digests.block_digests`, seeded with the number of the session, so that no two sessions
would miss the same pair of blocks. Two blocks that differ have the same hash with a probability of 2**-128; it is no
protection against blocks that are made to collide (of the kernel's hashes, DRBD's csums-alg may be one that is none
either).
"""

from collections.abc import Collection, Iterator
from typing import Final

from replica.digests import DIGEST_BYTES

#: Shorter runs are sent at once: a question and an answer would cost as much.
LEAST_BLOCKS: Final = 8
#: Asking pays when so many of the blocks are equal. (It spares the network, and costs both nodes a read.)
WORTH_SHARE: Final = 0.25
#: Where it does not pay, one of so many pieces is asked about all the same: the next extent may be another matter.
SAMPLE_EVERY: Final = 16
#: How much one answer counts for the next question.
_WEIGHT: Final = 0.25


def count_of(hashes: bytes | memoryview) -> int:
    """How many blocks these hashes are of; ValueError when that is no whole number."""
    count, rest = divmod(len(hashes), DIGEST_BYTES)
    if rest or not count:
        raise ValueError(f"{len(hashes)} bytes are no hashes")
    return count


def differing(mine: bytes, theirs: bytes, zeroes: Collection[bytes] = ()) -> bytes:
    """One bit for each block, lowest first: 1 where the two lists of hashes, of the same length, differ. A block whose
    hash is one of `zeroes` counts as different: it may be a hole on one node and not on the other.
    """
    bits, bit = 0, 1
    if mine != theirs or any(zero in mine for zero in zeroes):
        for at in range(0, len(mine), DIGEST_BYTES):
            one = mine[at : at + DIGEST_BYTES]
            if one != theirs[at : at + DIGEST_BYTES] or one in zeroes:
                bits |= bit
            bit <<= 1
    return bits.to_bytes(-(-len(mine) // DIGEST_BYTES // 8), "little")


def runs(answer: bytes | memoryview, count: int) -> Iterator[tuple[bool, int, int]]:
    """(whether they differ, first, how many) of neighbouring blocks that are alike; ValueError when `answer` is none
    about `count` blocks.
    """
    bits = int.from_bytes(answer, "little")
    if len(answer) != -(-count // 8) or bits >> count:
        raise ValueError(f"{len(answer)} bytes are no answer about {count} blocks")
    first = 0
    while first < count:
        rest = bits >> first
        differ = bool(rest & 1)
        alike = ~rest if differ else rest
        length = min((alike & -alike).bit_length() - 1, count - first) if alike else count - first
        yield differ, first, length
        first += length


class Sampling:
    """Which pieces are asked about: all, as long as enough of them turn out to be equal, and else a sample."""

    def __init__(self) -> None:
        # Of what was not looked at yet, the best is expected: a question is cheap.
        self._equal_share = 1.0
        self._not_asked = 0

    def wanted(self, blocks: int) -> bool:
        """Whether to ask about the next piece, which has so many blocks."""
        if blocks < LEAST_BLOCKS:
            return False
        if self._equal_share >= WORTH_SHARE:
            return True
        self._not_asked = (self._not_asked + 1) % SAMPLE_EVERY
        return not self._not_asked

    def learned(self, equal: int, blocks: int) -> None:
        """Of so many blocks, so many were equal."""
        self._equal_share += _WEIGHT * (equal / blocks - self._equal_share)
