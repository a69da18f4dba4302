"""What the cluster tests share: clusters that end with their test, a seed that can be replayed."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import Cluster


@pytest.fixture
def new_cluster(short_dir: Path) -> Iterator[Callable[..., Cluster]]:
    """``new_cluster(**settings)``: see `Cluster`; its daemons end with the test."""
    with ExitStack() as stack:

        def make(**settings: Any) -> Cluster:
            return stack.enter_context(Cluster(short_dir, **settings))

        yield make


@pytest.fixture
def cluster(new_cluster: Callable[..., Cluster]) -> Cluster:
    """Two nodes, configured and nothing more."""
    return new_cluster()


@pytest.fixture
def libnbd() -> Any:
    """libnbd's module; the test is skipped without it."""
    if importlib.util.find_spec("nbd") is None:
        pytest.skip("libnbd's Python module is not installed (Debian: python3-libnbd)")
    import nbd

    return nbd


@pytest.fixture
def pair(libnbd: Any, cluster: Cluster) -> Cluster:
    """Two nodes in sync; node1 is Primary."""
    return cluster.up()


@pytest.fixture
def seed() -> int:
    """The seed of random tests, printed; REPLICA_SEED replays it."""
    value = int(os.environ.get("REPLICA_SEED") or os.environ.get("REPLICA_TEST_SEED") or int.from_bytes(os.urandom(4)))
    print(f"replay with REPLICA_SEED={value}")
    return value
