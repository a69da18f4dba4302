"""How fast a resync is said to be."""

import pytest

from replica.bitmap import BLOCK_SIZE
from replica.progress import SyncProgress


def test_the_rate_is_that_of_lately() -> None:
    progress, left = SyncProgress(1_000_000, 100.0), 1_000_000
    for second in range(1, 101):
        left -= 9000 if second <= 50 else 1000
        rate = progress.rate_bytes_s(left, 100.0 + second)
    assert rate == pytest.approx(1000 * BLOCK_SIZE)
    assert progress.done_percent(left) == 50.0


def test_who_looks_for_the_first_time_gets_the_average() -> None:
    assert SyncProgress(1000, 100.0).rate_bytes_s(900, 200.0) == pytest.approx(BLOCK_SIZE)


def test_who_looks_often_gets_the_same() -> None:
    progress = SyncProgress(1000, 100.0)
    rates = [progress.rate_bytes_s(1000 - step, 100.0 + step / 100) for step in range(1, 500)]
    assert rates == pytest.approx([100 * BLOCK_SIZE] * len(rates))


def test_a_pause_does_not_count() -> None:
    progress = SyncProgress(1000, 100.0)
    assert progress.rate_bytes_s(500, 110.0) == pytest.approx(50 * BLOCK_SIZE)
    progress.resumed(500, 1000.0)
    assert progress.rate_bytes_s(450, 1001.0) == pytest.approx(50 * BLOCK_SIZE)


def test_blocks_that_became_dirty_make_no_negative_rate() -> None:
    progress = SyncProgress(10, 100.0)
    assert progress.rate_bytes_s(20, 101.0) == 0
    assert progress.done_percent(20) == 0
    assert SyncProgress(0, 100.0).done_percent(0) == 100.0


def test_at_the_very_beginning_there_is_no_rate() -> None:
    assert SyncProgress(10, 100.0).rate_bytes_s(10, 100.0) == 0
