"""Writes without a client: the volume, the link and the peer, on one event loop."""

from typing import Any

import pytest

from bench.extra import per_request
from bench.in_process import InProcess
from bench.load import offsets

_WRITES, _IN_BATCHES = 100, 640


def _of_size(name: str, length: int) -> Any:
    group = pytest.mark.benchmark(group=f"in process: {_WRITES} writes of {name}, one by one")
    return pytest.param(length, id=name.replace(" ", ""), marks=group)


@pytest.mark.parametrize(
    "length", [_of_size("4 KiB", 4 << 10), _of_size("64 KiB", 64 << 10), _of_size("1 MiB", 1 << 20)]
)
def test_one_by_one(benchmark: Any, in_process: InProcess, length: int) -> None:
    """Each is answered before the next one begins."""
    places, data = offsets(length)[:_WRITES], bytes(length)
    benchmark.pedantic(lambda: in_process.write(places, data), rounds=30, warmup_rounds=2)
    per_request(benchmark, _WRITES)


@pytest.mark.parametrize("depth", [pytest.param(depth, id=f"depth{depth}") for depth in (16, 64)])
@pytest.mark.benchmark(group="in process: 640 writes of 4 KiB in batches")
def test_batches(benchmark: Any, in_process: InProcess, depth: int) -> None:
    """As many at once as a client that keeps so many under way would bring."""
    places, data = offsets(4 << 10)[:_IN_BATCHES], bytes(4 << 10)
    benchmark.pedantic(lambda: in_process.write(places, data, depth), rounds=30, warmup_rounds=2)
    per_request(benchmark, _IN_BATCHES)
