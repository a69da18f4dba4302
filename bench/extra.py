"""What a benchmark tells besides the times of its rounds."""

from typing import Any


def per_request(benchmark: Any, requests: int) -> None:
    """A round has so many requests: note the time for one, and how many that are in a second."""
    if benchmark.stats is not None:  # it is when nothing is measured (--benchmark-disable)
        median_s = benchmark.stats.stats.median
        benchmark.extra_info["microseconds_each"] = round(median_s * 1e6 / requests, 1)
        benchmark.extra_info["per_second"] = round(requests / median_s)
