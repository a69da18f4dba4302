"""The pace of a resync, on a model of a target that has one queue and works off so many bytes per second."""

import math
from collections import deque
from collections.abc import Callable

import pytest

from replica.sync_rate import (
    CLIENTS_GONE_S,
    LEAST_BYTES_S,
    LIMIT,
    PIECE_BYTES,
    QUEUE_S,
    READ_QUEUE_S,
    FeedbackRate,
    FixedRate,
    Pace,
)

Told = Callable[[Pace, float, float], None]


def wrote(pace: Pace, begun_s: float, now_s: float) -> None:
    pace.wrote(begun_s, now_s)


def read(pace: Pace, begun_s: float, now_s: float) -> None:
    pace.read(begun_s, now_s)


def read_at_once(pace: Pace, begun_s: float, now_s: float) -> None:
    pace.read_at_once(now_s)


MIB = 1 << 20
CHUNK_BYTES, WINDOW_BYTES = 256 << 10, 4 * MIB
STEP_S = 1e-5


class Model:
    """Resync pieces and a client's requests (writes, but for `told`) wait in one queue; what is worked off is
    acknowledged `trip_s` later.
    """

    def __init__(self, pace: Pace, bytes_s: float, trip_s: float = 1e-4, told: Told = wrote) -> None:
        self.pace = pace
        self.told = told
        self.bytes_s = bytes_s
        self.trip_s = trip_s
        self.now_s = 100.0
        self._free_s = 0.0
        self._pieces: deque[tuple[float, float, int]] = deque()
        self._write: tuple[float, float] | None = None
        self._next_write_s = 0.0
        self.in_flight = 0
        self.most_in_flight = 0
        self.synced_bytes = 0
        self.latencies: list[float] = []

    def run(self, seconds: float, write_every_s: float = math.inf) -> "Model":
        """`write_every_s`: from the answer to one write to the next one."""
        self._next_write_s = self.now_s if write_every_s < math.inf else math.inf
        self.latencies.clear()
        self.synced_bytes = self.most_in_flight = 0
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self._step(write_every_s)
            self.now_s += STEP_S
        return self

    def _step(self, write_every_s: float) -> None:
        now_s, pace = self.now_s, self.pace
        while self._pieces and self._pieces[0][0] <= now_s:
            _, sent_s, length = self._pieces.popleft()
            self.in_flight -= length
            self.synced_bytes += length
            pace.acknowledged(length, now_s - sent_s, self.in_flight, now_s)
        if self._write is not None and self._write[0] <= now_s:
            sent_s = self._write[1]
            self._write = None
            self.latencies.append(now_s - sent_s)
            self.told(pace, sent_s, now_s)
            self._next_write_s = now_s + write_every_s
        length = pace.piece_bytes(now_s)
        while pace.wait_s(length, self.in_flight, now_s) <= 0:
            self.in_flight += length
            self._pieces.append((self._through(length), now_s, length))
            pace.sent(length, length, now_s)
            length = pace.piece_bytes(now_s)
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        if self._write is None and now_s >= self._next_write_s:
            self._write = self._through(4096), now_s

    def _through(self, length: int) -> float:
        self._free_s = max(self._free_s, self.now_s) + length / self.bytes_s
        return self._free_s + self.trip_s

    def slowed(self, without_s: float) -> float:
        return sum(latency > LIMIT * without_s for latency in self.latencies) / len(self.latencies)


def feedback() -> FeedbackRate:
    return FeedbackRate(CHUNK_BYTES, WINDOW_BYTES)


@pytest.mark.parametrize("bytes_s", [30e6, 100e6, 300e6])
def test_without_clients_the_target_is_never_idle_and_the_queue_short(bytes_s: float) -> None:
    model = Model(feedback(), bytes_s).run(0.5)
    model.run(0.5)
    assert model.synced_bytes > 0.95 * bytes_s * 0.5
    assert model.most_in_flight < bytes_s * (3 * QUEUE_S) + 2 * CHUNK_BYTES


def test_without_clients_a_fast_target_gets_the_whole_window() -> None:
    model = Model(feedback(), 5e9, trip_s=2e-3).run(0.5)
    assert model.most_in_flight > 0.9 * WINDOW_BYTES
    assert model.most_in_flight <= WINDOW_BYTES


@pytest.mark.parametrize("told", [wrote, read])
@pytest.mark.parametrize("bytes_s", [30e6, 100e6, 500e6, 2e9])
def test_few_requests_of_a_client_are_slowed_down(bytes_s: float, told: Told) -> None:
    without_s = 4096 / bytes_s + 1e-4
    model = Model(feedback(), bytes_s, told=told).run(1)
    model.run(3, write_every_s=5e-5)
    assert model.slowed(without_s + STEP_S) < 0.12
    assert model.synced_bytes > 3 * 0.8 * LEAST_BYTES_S


def test_a_target_that_is_fast_enough_for_both_is_used() -> None:
    model = Model(feedback(), 2e9, trip_s=5e-4).run(2, write_every_s=5e-5)
    model.run(2, write_every_s=5e-5)
    assert model.synced_bytes > 2 * 200e6


def test_the_resync_does_not_starve() -> None:
    """A piece takes long in relation to a write, so that every one is felt: it gets what it gets at least."""
    model = Model(feedback(), 10e6).run(2, write_every_s=1e-5)
    model.run(4, write_every_s=1e-5)
    assert 0.7 * LEAST_BYTES_S < model.synced_bytes / 4 < 1.3 * LEAST_BYTES_S


def test_after_the_clients_have_gone_everything_is_used_again() -> None:
    model = Model(feedback(), 100e6).run(2, write_every_s=1e-5)
    held_back = model.run(2, write_every_s=1e-5).synced_bytes
    model.run(4)
    assert model.run(1).synced_bytes > 0.95 * 100e6 > 4 * held_back / 2


@pytest.mark.parametrize("told", [wrote, read, read_at_once])
def test_the_first_request_makes_the_pieces_small(told: Told) -> None:
    pace = feedback()
    assert pace.piece_bytes(1.0) == CHUNK_BYTES
    told(pace, 1.0, 1.001)
    assert pace.piece_bytes(1.002) == PIECE_BYTES
    assert pace.window_bytes(1.002) <= PIECE_BYTES
    gone_s = 1.01 + CLIENTS_GONE_S
    assert pace.piece_bytes(gone_s) == CHUNK_BYTES


@pytest.mark.parametrize(("bytes_s", "trip_s"), [(100e6, 1e-4), (500e6, 1e-4), (2e9, 1e-4), (2e9, 5e-3)])
def test_beside_reads_from_the_page_cache_the_queue_is_short(bytes_s: float, trip_s: float) -> None:
    """They wait in line with the pieces; and what a long way has room for is used, as nobody waits on the way."""
    model = Model(feedback(), bytes_s, trip_s, told=read_at_once).run(1)
    model.run(0.05, write_every_s=5e-5)
    model.run(2, write_every_s=5e-5)
    queue_bytes = 2 * READ_QUEUE_S * bytes_s + 2 * PIECE_BYTES
    assert model.most_in_flight <= queue_bytes + trip_s * bytes_s + PIECE_BYTES
    one_at_a_time = PIECE_BYTES / (trip_s + PIECE_BYTES / bytes_s)
    assert model.synced_bytes > 2 * min(0.8 * one_at_a_time, 0.5 * bytes_s)
    if trip_s > 1e-3:
        assert model.synced_bytes > 2 * 5 * one_at_a_time


def test_of_two_kinds_of_requests_the_one_that_suffers_decides() -> None:
    """Writes that feel nothing, however many, do not outvote reads that do."""
    pace, now_s = feedback(), 100.0
    for _ in range(200):
        now_s += 1e-4
        pace.wrote(now_s - 1e-4, now_s)
        pace.read(now_s - 1e-4, now_s)
    now_s += 0.1
    for _ in range(200):
        now_s += 1e-3
        pace.sent(PIECE_BYTES, PIECE_BYTES, now_s)
        for _ in range(50):
            pace.wrote(now_s - 1e-4, now_s)
        pace.read(now_s - 1e-3, now_s)
        pace.acknowledged(PIECE_BYTES, 1e-3, 0, now_s)
    assert pace.window_bytes(now_s) < PIECE_BYTES / 2
    beyond_s = now_s + CLIENTS_GONE_S
    assert pace.window_bytes(beyond_s) > pace.window_bytes(now_s)


def test_a_long_way_is_no_reason_to_starve() -> None:
    """Rests are a small part of the time, however long a write takes, and one piece at a time would be too little."""
    model = Model(feedback(), 100e6, trip_s=0.1).run(3, write_every_s=1e-3)
    assert model.run(3, write_every_s=1e-3).synced_bytes > 3 * 0.8 * LEAST_BYTES_S


def test_a_fixed_rate_is_kept_whatever_clients_do() -> None:
    model = Model(FixedRate(8 * MIB, CHUNK_BYTES, WINDOW_BYTES), 1e9).run(2, write_every_s=1e-4)
    assert model.synced_bytes == pytest.approx(2 * 8 * MIB, rel=0.05)


def test_a_fixed_rate_counts_what_goes_over_the_wire() -> None:
    pace = FixedRate(1024, CHUNK_BYTES, WINDOW_BYTES)
    pace.sent(CHUNK_BYTES, 1024, 10.0)
    pace.acknowledged(CHUNK_BYTES, 0.001, 0, 10.001)
    assert pace.wait_s(CHUNK_BYTES, 0, 10.25) == pytest.approx(0.75)
    assert pace.wait_s(CHUNK_BYTES, 0, 11.0) == 0


def test_a_fixed_rate_has_a_window_too() -> None:
    pace = FixedRate(1 << 40, CHUNK_BYTES, WINDOW_BYTES)
    assert pace.wait_s(CHUNK_BYTES, WINDOW_BYTES - CHUNK_BYTES, 1.0) == 0
    assert pace.wait_s(CHUNK_BYTES, WINDOW_BYTES - 1, 1.0) == math.inf


def test_what_reads_take_anyway_does_not_count_as_slowed_down() -> None:
    """A disk has no two reads alike: of these, four in ten take 490 µs, and the others less than half of that."""
    pace, now_s = feedback(), 100.0
    natural_s = [1e-4] * 12 + [4.9e-4] * 8
    for number in range(2000):
        now_s += 1e-3
        pace.read(now_s - natural_s[number * 7 % 20], now_s)

    def read_beside_a_piece(latency_s: float) -> None:
        nonlocal now_s
        now_s += 1e-3
        pace.sent(PIECE_BYTES, PIECE_BYTES, now_s)
        pace.read(now_s - latency_s, now_s)
        pace.acknowledged(PIECE_BYTES, 1e-3, 0, now_s)

    for _ in range(60):
        read_beside_a_piece(1e-2)
    slowed = pace.window_bytes(now_s)
    assert slowed < WINDOW_BYTES / 8
    for number in range(200):
        read_beside_a_piece(natural_s[number * 7 % 20])
    assert pace.window_bytes(now_s) > 4 * slowed


def test_a_window_never_vanishes() -> None:
    """On a clock that stands still between sending and acknowledgement; it could never grow again."""
    pace = feedback()
    for number in range(100):
        pace.wrote(1.0 + number * 1e-3, 1.0005 + number * 1e-3)
    for number in range(5000):
        now_s = 2.0 + number * 1e-3
        pace.sent(PIECE_BYTES, PIECE_BYTES, now_s)
        pace.wrote(now_s - 0.5, now_s)
        pace.acknowledged(PIECE_BYTES, 0.0, 0, now_s)
        assert 0 <= pace.wait_s(PIECE_BYTES, 0, now_s) < 1
    assert pace.window_bytes(now_s) >= 1


def test_a_slow_begin_is_not_taken_for_what_writes_take() -> None:
    """The first writes wait for what was under way, a flush say; from then on a slowed write counts as one."""
    pace, now_s = feedback(), 100.0
    for latency_s in (0.004, 0.004, 0.003, *[0.0001] * 15):  # the first one only tells that there is a client
        now_s += latency_s
        pace.wrote(now_s - latency_s, now_s)
    pace.sent(PIECE_BYTES, PIECE_BYTES, now_s)  # nothing is quiet any more
    window = pace.window_bytes(now_s)
    pace.wrote(now_s, now_s + 0.0005)
    assert pace.window_bytes(now_s) < window
