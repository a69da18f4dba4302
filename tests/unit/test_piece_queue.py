"""Data that waits to be encrypted."""

import random

import pytest

from nbdserver.piece_queue import PIECE_BYTES, PieceQueue


def test_small_buffers_are_one_piece():
    queue = PieceQueue()
    queue.put([b"head", memoryview(b"data" * 2000), b"", b"head"])
    queue.put([b"more"])
    assert queue.size_bytes == 4 + 8000 + 4 + 4
    assert queue.take() == b"head" + b"data" * 2000 + b"headmore"
    assert not queue


def test_a_long_buffer_is_cut_and_not_copied():
    data = bytes(2 * PIECE_BYTES + 5)
    queue = PieceQueue()
    queue.put([data])
    pieces = [queue.take() for _ in range(2)]
    assert [len(piece) for piece in pieces] == [PIECE_BYTES] * 2
    assert all(isinstance(piece, memoryview) and piece.obj is data for piece in pieces)
    assert (queue.size_bytes, len(queue.take())) == (5, 5)


def test_many_tiny_buffers_do_not_stay_objects_of_their_own():
    queue = PieceQueue()
    for _ in range(PIECE_BYTES // 8):
        queue.put([b"12345678"])
    assert len(queue.take()) == PIECE_BYTES
    assert not queue


def test_a_buffer_of_the_caller_is_not_appended_to():
    own = bytearray(5000)
    queue = PieceQueue()
    queue.put([own, b"more"])
    assert len(own) == 5000
    assert queue.take() == own + b"more"


@pytest.mark.parametrize("seed", range(20))
def test_what_goes_in_comes_out(seed):
    rng = random.Random(seed)
    queue, expected, found = PieceQueue(), bytearray(), bytearray()
    for _ in range(100):
        buffers = [rng.randbytes(int(2 ** rng.uniform(0, 19))) for _ in range(rng.randrange(4))]
        expected += b"".join(buffers)
        queue.put(buffers)
        while queue and rng.random() < 0.5:
            piece = queue.take()
            assert 0 < len(piece) <= PIECE_BYTES
            found += piece
        assert queue.size_bytes == len(expected) - len(found), f"seed {seed}"
    while queue:
        found += queue.take()
    assert found == expected, f"seed {seed}"
