"""What the benchmarks share: servers that run once per mode, and libnbd."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import servers
from bench.in_process import InProcess, pair
from bench.load import libnbd
from bench.servers import Target

MODES = {"A": ("A", False), "B": ("B", False), "C": ("C", False), "C-alone": ("C", True)}


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """An empty folder for images."""
    with servers.image_folder() as path:
        yield path


@pytest.fixture(scope="session")
def need_libnbd() -> None:
    """Skips without libnbd."""
    if libnbd() is None:
        pytest.skip("libnbd's Python module is not installed (Debian: python3-libnbd)")


@pytest.fixture(scope="session", params=MODES)
def target(request: pytest.FixtureRequest, need_libnbd: None, folder: Path) -> Iterator[Target]:
    """A pair in each mode, one after the other."""
    protocol, alone = MODES[request.param]
    own = folder / request.param
    own.mkdir()
    with servers.replica(own, protocol, alone=alone) as running:
        yield running


@pytest.fixture(scope="session", params=MODES)
def in_process(request: pytest.FixtureRequest, folder: Path) -> Iterator[InProcess]:
    """Both nodes in this process, in each mode."""
    protocol, alone = MODES[request.param]
    own = folder / f"in-{request.param}"
    own.mkdir()
    with pair(own, protocol, alone=alone) as both:
        yield both
