"""The comparison with other servers, in short; the table comes at the end of the run."""

from typing import Any

import pytest

from bench import peers
from bench.conftest import COMPARISON


@pytest.mark.benchmark(group="the comparison as a whole")
def test_beside_other_servers(benchmark: Any, request: pytest.FixtureRequest) -> None:
    """One round of this benchmark is the whole comparison."""
    try:
        comparison = benchmark.pedantic(lambda: peers.compare(rounds=3, seconds=0.5), rounds=1)
    except RuntimeError as error:
        pytest.skip(str(error))
    request.config.stash[COMPARISON] = comparison
    for row in comparison.rows:
        benchmark.extra_info[row.name] = {name: row.median(name) for name in comparison.names}
