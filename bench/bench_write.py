"""Write latency: protocols A, B and C with the peer in sync, and C with the peer away."""

from typing import Any

import pytest

from bench.extra import per_request
from bench.load import Client, Workload
from bench.servers import Target

_MANY = 640


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


@pytest.mark.parametrize("depth", [pytest.param(depth, id=f"depth{depth}") for depth in (16, 64)])
@pytest.mark.benchmark(group="640 writes of 4 KiB at a depth")
def test_writes_at_depth(benchmark: Any, target: Target, depth: int) -> None:
    """A round is 640 writes of 4 KiB, so many of them always under way."""
    with Client(target.uri, Workload("write", 4 << 10, depth)) as client:
        client.warm_up()
        benchmark.pedantic(lambda: client.many(_MANY), rounds=30, warmup_rounds=3)
        per_request(benchmark, _MANY)


@pytest.mark.parametrize("kind", ["fua", "flush"])
@pytest.mark.benchmark(group="a write of 4 KiB that is durable on both nodes")
def test_durable_write(benchmark: Any, target: Target, kind: str) -> None:
    """A round is a write with FUA, or a write and a flush."""
    with Client(target.uri, Workload(kind, 4 << 10)) as client:
        client.warm_up()
        benchmark.pedantic(client.one, rounds=300, warmup_rounds=20)


@pytest.mark.benchmark(group="64 writes of 4 KiB at depth 16, then a flush")
def test_writes_and_one_flush(benchmark: Any, target: Target) -> None:
    """As a file system does it: many writes, and a flush now and then."""
    with Client(target.uri, Workload("write", 4 << 10, 16)) as client:
        client.warm_up()

        def writes_and_flush() -> None:
            client.many(64)
            client.flush()

        benchmark.pedantic(writes_and_flush, rounds=100, warmup_rounds=3)
