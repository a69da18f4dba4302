"""Digests of blocks, and what two copies' digests say."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replica.bitmap import BLOCK_SIZE
from replica.digests import DIGEST_BYTES, block_digests, differing, digest, pack_runs, unpack_runs
from replica.wire import ProtocolError

BLOCKS = 64


def blocks_of_runs(runs: list[tuple[int, int]]) -> set[int]:
    return {block for first, count in runs for block in range(first, first + count)}


@given(st.sets(st.integers(0, BLOCKS - 1)), st.integers(1, BLOCK_SIZE), st.integers(1, (1 << 64) - 1))
def test_exactly_the_blocks_that_differ(bad: set[int], last_bytes: int, seed: int) -> None:
    mine = random.Random(seed).randbytes((BLOCKS - 1) * BLOCK_SIZE + last_bytes)
    theirs = bytearray(mine)
    for block in bad:
        theirs[block * BLOCK_SIZE + last_bytes - 1] ^= 0x80
    runs = differing(block_digests(mine, seed), block_digests(bytes(theirs), seed))
    assert blocks_of_runs(runs) == bad
    assert all(first + count < following for (first, count), (following, _) in itertools.pairwise(runs))
    assert (digest(mine, seed) == digest(bytes(theirs), seed)) is (not bad)
    assert unpack_runs(pack_runs(runs), BLOCKS) == runs


def test_the_seed_is_part_of_it() -> None:
    data = bytes(BLOCK_SIZE)
    assert digest(data, 1) != digest(data, 2)
    assert block_digests(data, 1) == digest(data, 1)
    assert len(block_digests(data * 3, 1)) == 3 * DIGEST_BYTES


@pytest.mark.parametrize("theirs", [b"", bytes(DIGEST_BYTES - 1), bytes(2 * DIGEST_BYTES)])
def test_digests_of_another_number_of_blocks(theirs: bytes) -> None:
    with pytest.raises(ProtocolError, match="digests"):
        differing(bytes(DIGEST_BYTES), theirs)


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (pack_runs([(0, 1)])[:-1], "cut short"),
        (pack_runs([(0, 0)]), "beyond"),
        (pack_runs([(7, 2)]), "beyond"),
        (pack_runs([(0, 1), ((1 << 32) - 1, (1 << 32) - 1)]), "beyond"),
    ],
)
def test_lists_of_blocks_that_do_not_fit(payload: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        unpack_runs(payload, 8)
