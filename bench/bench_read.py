"""Reads of 4 KiB: answered by the Primary alone, from its page cache."""

from typing import Any

import pytest

from bench.extra import per_request
from bench.load import Client, Workload
from bench.servers import Target

_MANY = 320


@pytest.mark.benchmark(group="one read of 4 KiB")
def test_one_read(benchmark: Any, target: Target) -> None:
    """A round is one read."""
    with Client(target.uri, Workload("read", 4 << 10)) as client:
        client.warm_up()
        benchmark.pedantic(client.one, rounds=2000, warmup_rounds=50)


@pytest.mark.benchmark(group="320 reads of 4 KiB at depth 16")
def test_reads_at_depth_16(benchmark: Any, target: Target) -> None:
    """A round is 320 reads, 16 of them always under way."""
    with Client(target.uri, Workload("read", 4 << 10, 16)) as client:
        client.warm_up()
        benchmark.pedantic(lambda: client.many(_MANY), rounds=50, warmup_rounds=3)
        per_request(benchmark, _MANY)
