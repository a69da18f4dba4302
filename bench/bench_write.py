"""Write latency: protocols A, B and C with the peer in sync, and C with the peer away."""

from typing import Any

import pytest

from bench.load import Client, Workload
from bench.servers import Target

_MANY = 320


@pytest.mark.parametrize(
    ("workload", "rounds"),
    [
        pytest.param(Workload("write", 4 << 10), 2000, id="4KiB"),
        pytest.param(Workload("write", 64 << 10), 500, id="64KiB"),
        pytest.param(Workload("write", 1 << 20), 100, id="1MiB"),
    ],
)
def test_one_write(benchmark: Any, target: Target, workload: Workload, rounds: int) -> None:
    """A round is one write: its time is the latency a client sees."""
    with Client(target.uri, workload) as client:
        client.warm_up()
        benchmark.pedantic(client.one, rounds=rounds, warmup_rounds=50)


def test_writes_at_depth_16(benchmark: Any, target: Target) -> None:
    """A round is 320 writes of 4 KiB, 16 of them always under way."""
    with Client(target.uri, Workload("write", 4 << 10, 16)) as client:
        client.warm_up()
        benchmark.pedantic(lambda: client.many(_MANY), rounds=50, warmup_rounds=3)
        benchmark.extra_info["writes_per_second"] = round(_MANY / benchmark.stats.stats.median)


def test_write_and_flush(benchmark: Any, target: Target) -> None:
    """A round is a write of 4 KiB and a flush: durable on both nodes."""
    with Client(target.uri, Workload("flush", 4 << 10)) as client:
        client.warm_up()
        benchmark.pedantic(client.one, rounds=300, warmup_rounds=20)
