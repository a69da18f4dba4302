"""What the benchmarks share: servers that run once per mode, libnbd, and the comparison's table at the end."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import peers, servers
from bench.load import libnbd
from bench.servers import Target

MODES = {"A": ("A", False), "B": ("B", False), "C": ("C", False), "C-alone": ("C", True)}
COMPARISON = pytest.StashKey[peers.Comparison]()


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


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of the comparison, when it was made."""
    comparison = config.stash.get(COMPARISON, None)
    if comparison is not None:
        terminalreporter.section("Replica beside other servers")
        console = Console(width=max(170, terminalreporter._tw.fullwidth))
        console.print(peers.as_table(comparison))
        for name in comparison.left_out:
            terminalreporter.write_line(f"not installed: {name}")
