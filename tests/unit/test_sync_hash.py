"""Questions and answers about blocks, as bytes."""

import random

import pytest

from replica import sync_hash
from replica.bitmap import BLOCK_SIZE
from replica.digests import block_digests

SEED = 0x1234


@pytest.mark.parametrize("length", [1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 5 * BLOCK_SIZE + 512])
def test_each_block_has_one_hash(length: int) -> None:
    hashes = block_digests(random.Random(1).randbytes(length), SEED)
    assert sync_hash.count_of(hashes) == -(-length // BLOCK_SIZE)


def test_hashes_are_of_the_session() -> None:
    data = b"x" * BLOCK_SIZE
    assert block_digests(data, 1) != block_digests(data, 2)


@pytest.mark.parametrize("length", [0, 15, 17])
def test_what_is_no_list_of_hashes(length: int) -> None:
    with pytest.raises(ValueError, match="no hashes"):
        sync_hash.count_of(bytes(length))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64])
def test_an_answer_names_the_blocks_that_differ(count: int) -> None:
    rng = random.Random(count)
    for _ in range(50):
        mine = bytearray(rng.randbytes(count * BLOCK_SIZE))
        theirs = bytearray(mine)
        changed = {block for block in range(count) if rng.random() < rng.choice((0.0, 0.1, 0.5, 1.0))}
        for block in changed:
            theirs[block * BLOCK_SIZE + rng.randrange(BLOCK_SIZE)] ^= 1
        answer = sync_hash.differing(block_digests(mine, SEED), block_digests(theirs, SEED))
        found: list[bool] = []
        for differ, first, length in sync_hash.runs(answer, count):
            assert first == len(found) and length > 0
            found += [differ] * length
        assert found == [block in changed for block in range(count)]


@pytest.mark.parametrize(("answer", "count"), [(b"", 1), (b"\0\0", 8), (b"\0", 9), (b"\2", 1), (b"\x80", 7)])
def test_what_is_no_answer(answer: bytes, count: int) -> None:
    with pytest.raises(ValueError, match="no answer"):
        list(sync_hash.runs(answer, count))


def test_all_is_asked_while_blocks_are_equal() -> None:
    sampling = sync_hash.Sampling()
    for _ in range(100):
        assert sampling.wanted(64)
        sampling.learned(48, 64)


def test_where_nothing_is_equal_only_a_sample_is_asked_until_it_says_otherwise() -> None:
    sampling = sync_hash.Sampling()
    for _ in range(20):
        if sampling.wanted(64):
            sampling.learned(0, 64)
    asked = [sampling.wanted(64) for _ in range(10 * sync_hash.SAMPLE_EVERY)]
    assert sum(asked) == 10
    for _ in range(4):
        sampling.learned(64, 64)
    assert sampling.wanted(64)


def test_short_runs_are_not_asked_about() -> None:
    assert not sync_hash.Sampling().wanted(sync_hash.LEAST_BLOCKS - 1)
