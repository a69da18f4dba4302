"""Seeds of the simulator: ordinary ones, and those that once found a bug."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.run import quiet, run_seed

#: Seeds for one run of the tests; SIM_SEEDS and SIM_START ask for others (`make sim` runs campaigns).
SEEDS = int(os.environ.get("SIM_SEEDS", "500"))
START = int(os.environ.get("SIM_START", "1"))
BATCH = 50

#: Each of these found a bug of the node once (docs/testing.md); what a seed does changes with the simulator.
REMEMBERED = (117, 120, 1149, 1192, 1602, 3344, 4009, 4020, 4043)


def _run(seeds: range | tuple[int, ...]) -> None:
    with quiet() as listen:
        for seed in seeds:
            outcome = run_seed(seed, listen)
            if outcome.violation is not None:
                trace = "\n".join(outcome.trace[-60:])
                pytest.fail(
                    f"seed {seed}: {outcome.violation}\n{trace}\n"
                    f"replay: python -m tests.sim --seeds 1 --start {seed} --verbose",
                    pytrace=False,
                )


@pytest.mark.parametrize("first", range(START, START + SEEDS, BATCH))
def test_seeds_keep_the_rules(first: int) -> None:
    _run(range(first, min(first + BATCH, START + SEEDS)))


def test_remembered_seeds() -> None:
    _run(REMEMBERED)


def test_one_seed_is_one_run() -> None:
    """Two processes with different hash seeds do the same, byte for byte."""
    checksums = []
    for hash_seed in ("1", "4242"):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.sim",
                "--seeds",
                "12",
                "--start",
                "40",
                "--keep-going",
                "--checksums",
            ],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=False,
        )
        checksums.append(re.findall(r"^seed \d+ checksum [0-9a-f]{8}$", done.stdout, re.MULTILINE))
    assert len(checksums[0]) == 12
    assert checksums[0] == checksums[1]
