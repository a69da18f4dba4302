"""What all tests share: libnbd's module, a seed that can be replayed, short paths, a configuration."""

import importlib.util
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Debian's python3-libnbd is installed for the system's Python; a virtual environment does not see it. At the
# end of the path, so that nothing else is taken from there.
if importlib.util.find_spec("nbd") is None:
    sys.path.append("/usr/lib/python3/dist-packages")

SEED_VARIABLE = "REPLICA_TEST_SEED"


def pytest_configure() -> None:
    """SIGTERM, by which `timeout` and make end a run, takes down what the tests have started, as Ctrl-C does. (That is
    ignored in a job that a shell has put into the background, and the programs under test would inherit it.)
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)


@pytest.fixture
def seed() -> int:
    """A seed for random tests, printed (pytest shows it when the test fails); set the variable to replay."""
    value = int(os.environ.get(SEED_VARIABLE) or random.SystemRandom().getrandbits(32))
    print(f"replay with {SEED_VARIABLE}={value}")
    return value


@pytest.fixture
def rng(seed: int) -> random.Random:
    """A random generator made of `seed`."""
    return random.Random(seed)


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """An empty directory whose path leaves room for Unix sockets (at most 107 bytes), unlike tmp_path."""
    with tempfile.TemporaryDirectory(prefix="rp-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def make_config(short_dir: Path) -> Callable[..., Path]:
    """Write a cluster of node1 and node2 on this machine, with the key file; returns the TOML file's path.

    ``make_config("r0", "r1", extra="…")``: resources by name (default r0), TOML text to append.
    """

    def make(*resources: str, extra: str = "") -> Path:
        key = short_dir / "cluster.key"
        key.write_text("0123456789abcdef" * 4 + "\n")
        key.chmod(0o600)
        text = (
            '[cluster]\nname = "test"\nsecret-file = "cluster.key"\nstate-dir = "state"\nrun-dir = "run"\n'
            '[node.node1]\naddress = "127.0.0.1"\n[node.node2]\naddress = "127.0.0.2"\n'
        )
        for number, name in enumerate(resources or ("r0",)):
            text += (
                f"[resource.{name}]\nport = {7789 + number}\n"
                f'nbd = "unix:{name}.nbd"\nbacking = "{name}.img"\n'
                f'[resource.{name}.on.node2]\nnbd = "unix:{name}-2.nbd"\nbacking = "{name}-2.img"\n'
            )
        file = short_dir / "replica.toml"
        file.write_text(text + extra)
        return file

    return make
