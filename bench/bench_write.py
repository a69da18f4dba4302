"""Write latency: protocols A, B and C with the peer in sync, and C with the peer away."""

from typing import Any

import pytest

from bench.load import Client, Workload
from bench.servers import Target

_MANY = 320


def _of_size(name: str, length: int, rounds: int) -> Any:
    group = pytest.mark.benchmark(group=f"one write of {name}")
    return pytest.param(Workload("write", length), rounds, id=name.replace(" ", ""), marks=group)


@pytest.mark.parametrize(
    ("workload", "rounds"),
    [_of_size("4 KiB", 4 << 10, 2000), _of_size("64 KiB", 64 << 10, 500), _of_size("1 MiB", 1 << 20, 100)],
)
def test_one_write(benchmark: Any, target: Target, workload: Workload, rounds: int) -> None:
    """A round is one write: its time is the latency a client sees."""
    with Client(target.uri, workload) as client:
        client.warm_up()
        benchmark.pedantic(client.one, rounds=rounds, warmup_rounds=50)


@pytest.mark.benchmark(group="320 writes of 4 KiB at depth 16")
def test_writes_at_depth_16(benchmark: Any, target: Target) -> None:
    """A round is 320 writes of 4 KiB, 16 of them always under way."""
    with Client(target.uri, Workload("write", 4 << 10, 16)) as client:
        client.warm_up()
        benchmark.pedantic(lambda: client.many(_MANY), rounds=50, warmup_rounds=3)
        benchmark.extra_info["writes_per_second"] = round(_MANY / benchmark.stats.stats.median)


@pytest.mark.benchmark(group="a write of 4 KiB and a flush")
def test_write_and_flush(benchmark: Any, target: Target) -> None:
    """A round is a write of 4 KiB and a flush: durable on both nodes."""
    with Client(target.uri, Workload("flush", 4 << 10)) as client:
        client.warm_up()
        benchmark.pedantic(client.one, rounds=300, warmup_rounds=20)
