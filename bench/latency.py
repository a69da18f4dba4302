"""Latencies as histograms (HdrHistogram): percentiles that can be merged over rounds, which means cannot."""

from collections.abc import Iterable, Mapping
from typing import Final

from hdrh.histogram import HdrHistogram

_MOST_NS: Final = 600 * 10**9
#: Of a value; 3 digits are 0.1 %.
_DIGITS: Final = 3
#: What the tables show.
PERCENTILES: Final = (50.0, 99.0, 99.9)


class Latencies:
    """How often each latency was seen."""

    def __init__(self, latencies_ns: Iterable[int] = ()) -> None:
        self._histogram = HdrHistogram(1, _MOST_NS, _DIGITS)
        for latency_ns in latencies_ns:
            self.add(latency_ns)

    @classmethod
    def from_bins(cls, bins: Mapping[str, int]) -> "Latencies":
        """From the bins that fio writes with --output-format=json+: nanoseconds → how often."""
        made = cls()
        for latency_ns, count in bins.items():
            made.add(int(latency_ns), count)
        return made

    def add(self, latency_ns: int, count: int = 1) -> None:
        """Count one latency; what is beyond ten minutes counts as ten minutes."""
        self._histogram.record_value(max(1, min(latency_ns, _MOST_NS)), count)

    def merge(self, other: "Latencies") -> None:
        """Count all of another one's."""
        self._histogram.add(other._histogram)

    @property
    def count(self) -> int:
        """How many there are."""
        count: int = self._histogram.get_total_count()
        return count

    def percentile_us(self, percentile: float) -> float | None:
        """So many percent took at most this long; None when there are none."""
        return self._histogram.get_value_at_percentile(percentile) / 1e3 if self.count else None


def merged(many: Iterable[Latencies]) -> Latencies:
    """All of them in one."""
    whole = Latencies()
    for each in many:
        whole.merge(each)
    return whole


def duration(microseconds: float | None) -> str:
    """ "87 µs", "1.25 ms", "0.31 s": three digits."""
    if microseconds is None:
        return "–"
    for unit, size in (("µs", 1.0), ("ms", 1e3), ("s", 1e6)):
        value = microseconds / size
        if value < 999.5 or unit == "s":
            digits = 0 if value >= 100 else 1 if value >= 10 else 2
            return f"{value:.{digits}f} {unit}"
    raise AssertionError("unreachable")
