"""Walks over data and holes: pure, on a map that the test gives."""

import asyncio
import itertools
import random

import pytest

from nbdserver.extents import DATA, HOLE, WALK_S, walk, without_small_holes, zeroes_fast


def walked(runs, offset, length, most=1000, now_s=lambda: 0.0):
    """`walk` over a disk with data in these (start, stop) runs."""

    async def next_data(at, end):
        for start, stop in runs:
            if stop > at and start < end:
                return max(start, at), min(stop, end)
        return end, end

    return asyncio.run(walk(next_data, offset, length, most, now_s))


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, 100, [(10, HOLE), (10, DATA), (20, HOLE), (20, DATA), (40, HOLE)]),
        (10, 10, [(10, DATA)]),
        (15, 30, [(5, DATA), (20, HOLE), (5, DATA)]),
        (60, 40, [(40, HOLE)]),
        (0, 1, [(1, HOLE)]),
    ],
)
def test_walk(offset, length, expected):
    assert walked([(10, 20), (40, 60)], offset, length) == expected


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_a_walk_has_no_more_extents_than_it_may(most):
    assert walked([(10, 20), (40, 60)], 0, 100, most) == [(10, HOLE), (10, DATA), (20, HOLE), (20, DATA)][:most]


def test_a_walk_ends_when_its_time_is_up_but_not_without_progress():
    clock = itertools.count(0.0, WALK_S * 2)
    assert walked([(10, 20), (40, 60)], 0, 100, now_s=lambda: next(clock)) == [(10, HOLE), (10, DATA)]


def test_neighbours_that_are_alike_become_one():
    assert walked([(0, 10), (10, 20), (20, 30)], 0, 30) == [(30, DATA)]


def test_a_file_that_changes_meanwhile_is_data():
    async def next_data(at, end):
        return at, at  # its data was there when it was looked for, and not when its end was

    assert asyncio.run(walk(next_data, 5, 20, 10, lambda: 0.0)) == [(20, DATA)]


def test_random_maps():
    seed = random.randrange(2**32)
    print(f"replay with random.Random({seed})")
    rng = random.Random(seed)
    for _ in range(300):
        disk = [rng.random() < 0.5 for _ in range(40)]
        runs = [(at, at + 1) for at, is_data in enumerate(disk) if is_data]
        offset = rng.randrange(40)
        length, most = rng.randint(1, 40 - offset), rng.randint(1, 12)
        found = walked(runs, offset, length, most)
        assert 1 <= len(found) <= most
        flat = [flags == DATA for count, flags in found for _ in range(count)]
        assert flat == disk[offset : offset + len(flat)]
        assert len(flat) == length or len(found) == most
        assert all(one[1] != other[1] for one, other in itertools.pairwise(found))


def test_small_holes_are_data():
    extents = [(10, HOLE), (5, DATA), (3, HOLE), (5, DATA), (10, HOLE), (4, HOLE)]
    assert without_small_holes(extents, 4) == [(10, HOLE), (13, DATA), (14, HOLE)]


@pytest.mark.parametrize(
    ("punches_fast", "offset", "length", "punch", "expected"),
    [
        (True, 4096, 8192, True, True),
        (False, 4096, 8192, True, False),
        (True, 4096, 8192, False, False),  # NO_HOLE
        (True, 4095, 8192, True, False),
        (True, 4096, 8191, True, False),
    ],
)
def test_zeroes_fast(punches_fast, offset, length, punch, expected):
    assert zeroes_fast(punches_fast, offset, length, punch) is expected
